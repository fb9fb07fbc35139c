"""The path-KL objective of a chain with learned forward drift, its gradient by replaying the stored trajectory.

Zhang and Chen 2021 (NeurIPS, "Diffusion Normalizing Flow"), section 3.3. Only the states x_0..x_N are kept; the graph
of one step at a time is built again on the way back, so that memory does not grow with the number of steps. The
forward drift at x_i serves the backward kernel into x_{i-1} and the forward kernel out of x_i: it is evaluated once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.noise import Generator, normal

Drift = Callable[[Tensor, Tensor], Tensor]


class Path:
    """What one evaluation of the objective needs: drifts F and s, times (N + 1,), g(t), prior variance, noise."""

    def __init__(
        self,
        drift: Drift,
        score: Drift,
        times: Tensor,
        diffusion: Callable[[Tensor], Tensor],
        prior_variance: float,
        generator: Generator = None,
    ):
        self.drift, self.score, self.generator, self.prior_variance = drift, score, generator, prior_variance
        self.times = [float(t) for t in times]
        self.widths = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        self.g = [float(diffusion(t)) for t in times]

    def at(self, i: int, x: Tensor) -> Tensor:
        """Time i for every row of x."""
        return torch.full((len(x),), self.times[i], dtype=x.dtype, device=x.device)

    def draw(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """(states x_0..x_N, sum of half the squared forward noises (B,)), without a graph."""
        states, spent = [x], torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for i, width in enumerate(self.widths):
            noise = normal(x.shape, self.generator, x.device, x.dtype)
            x = x + width * self.drift(x, self.at(i, x)) + self.g[i] * width**0.5 * noise
            states.append(x)
            spent = spent + 0.5 * noise.flatten(1).square().sum(1)
        return states, spent

    def backward_noise(self, i: int, earlier: Tensor, later: Tensor, drift: Tensor, score: Tensor) -> Tensor:
        """The noise of the backward step that leads from x_{i+1} to x_i; drift and score taken at x_{i+1}."""
        width, g = self.widths[i], self.g[i + 1]
        return (earlier - later + width * (drift - g**2 * score)) / (g * width**0.5)

    def prior_energy(self, x: Tensor) -> Tensor:
        """|x|^2 / (2 prior variance), (B,)."""
        return x.flatten(1).square().sum(1) / (2 * self.prior_variance)


class _Replay(torch.autograd.Function):
    """Sum over the batch of prior energy + 1/2 sum |backward noise|^2, and its gradient by replay.

    All parameters are inputs, so that autograd, and the hooks of distributed training, see their gradients.
    """

    @staticmethod
    def forward(ctx, path: Path, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        states, spent = path.draw(x)
        gradients = [torch.zeros_like(p) for p in parameters]
        last = len(path.widths)
        energy, carried = torch.zeros_like(spent), None  # carried: gradient with respect to x_i from later nodes
        direct = torch.zeros_like(x)
        for i in range(last, -1, -1):
            with torch.enable_grad():
                leaf = states[i].detach().requires_grad_()
                drift = path.drift(leaf, path.at(i, leaf))
                total = torch.zeros((), dtype=x.dtype, device=x.device)
                if i == last:
                    prior = path.prior_energy(leaf)
                    total = total + prior.sum()
                    energy = energy + prior.detach()
                else:
                    total = total + (carried * (leaf + path.widths[i] * drift)).sum()
                if i:
                    score = path.score(leaf, path.at(i, leaf))
                    noise = path.backward_noise(i - 1, states[i - 1], leaf, drift, score)
                    half = 0.5 * noise.flatten(1).square().sum(1)
                    total = total + half.sum()
                    energy = energy + half.detach()
                wanted = torch.autograd.grad(total, (leaf, *parameters), allow_unused=True)
            for own, new in zip(gradients, wanted[1:], strict=True):
                if new is not None:
                    own += new
            carried = wanted[0] + direct
            if i:
                # x_{i-1} also stands in the noise of the step just replayed
                direct = noise.detach() / (path.g[i] * path.widths[i - 1] ** 0.5)
        ctx.save_for_backward(carried, *gradients)
        return energy, spent

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_energy: Tensor, _: Tensor):
        # the objective is a mean over the batch: every image's energy arrives with one and the same weight
        weight = grad_energy.flatten()[0]
        if not bool((grad_energy == weight).all()):
            raise ValueError("the replayed gradient belongs to a mean over the batch; the images' weights differ")
        carried, *gradients = ctx.saved_tensors
        return None, weight * carried, *(weight * gradient for gradient in gradients)


def replayed_energy(path: Path, x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(energy (B,) with gradient, half squared forward noises (B,) without); bound = energy - noises + constants."""
    return _Replay.apply(path, x, *parameters)


def stored_energy(path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same by ordinary back-propagation through all steps: what the replay is tested against."""
    spent = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    energy = torch.zeros_like(spent)
    for i, width in enumerate(path.widths):
        noise = normal(x.shape, path.generator, x.device, x.dtype)
        later = x + width * path.drift(x, path.at(i, x)) + path.g[i] * width**0.5 * noise
        t = path.at(i + 1, x)
        backward = path.backward_noise(i, x, later, path.drift(later, t), path.score(later, t))
        energy = energy + 0.5 * backward.flatten(1).square().sum(1)
        spent = spent + 0.5 * noise.flatten(1).square().sum(1)
        x = later
    return energy + path.prior_energy(x), spent
