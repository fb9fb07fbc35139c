"""Schrodinger bridges between data and a Gaussian: likelihood training (SB-FBSDE) and iterative proportional fitting.

Base process dx = f dt + g dw with f = -reversion x and constant g on [0, duration]. Two policies bend it: forwards
dx = (f + g Z) dt + g dw from the data, in reverse time dx = (-f + g Zhat) ds + g dw from the prior. At the optimum
Z + Zhat = g grad log p_t. Z = 0, Zhat = g score is a linear diffusion; with it training begins.

"fbsde": Chen, Liu, Theodorou 2022 (ICLR, "Likelihood Training of Schrodinger Bridge using FBSDEs"), algorithm 3.
"joint": its algorithm 2, both policies at once through the whole path. "dsb": De Bortoli et al. 2021 (NeurIPS,
"Diffusion Schrodinger Bridge"), mean matching.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.base import Loss, Phase
from models.chain import Kernel, backward_path, forward_path
from models.noise import StepRandom, normal
from models.nonlinear import NonlinearDiffusion, TimedNetwork
from models.options import Count, NonNegative, Positive, Probability
from models.sde import expand

Method = Literal["fbsde", "joint", "dsb"]
# dimensions up to which the divergence in the loss is exact; above, one Rademacher probe a point
EXACT_DIVERGENCE = 4


class Bridge(NonlinearDiffusion):
    """Policies ``forward_policy`` Z(x, t) and ``backward_policy`` Zhat(x, t), callables (x, t (B,)) -> field.

    Training alternates: ``warm_steps`` steps of denoising score matching for Zhat with Z = 0, then in turn
    ``stage_steps`` steps for Z along paths of the frozen averaged Zhat, and as many for Zhat along paths of Z. Paths
    are drawn again every ``refresh`` steps, and each of their rows gives ``points`` points a step.
    """

    name = "bridge"

    def __init__(
        self,
        forward_policy: nn.Module,
        backward_policy: nn.Module,
        shape: Sequence[int],
        method: Method = "fbsde",
        steps: int = 50,
        duration: float = 1.0,
        g: float = 1.0,
        reversion: float = 0.0,
        growth: float = 1.0,
        prior_std: float = 1.0,
        warm_steps: int = 500,
        stage_steps: int = 250,
        refresh: int = 25,
        points: int = 4,
        average: float = 0.99,
        scale: float = 1.0,
    ):
        # steps grow with time by the factor `growth` from first to last: fine ones at the data, where they set the bound
        widths = torch.logspace(0, math.log10(growth), steps, dtype=torch.float64) if growth != 1 else torch.ones(steps)
        times = torch.cat([torch.zeros(1, dtype=torch.float64), (widths / widths.sum()).cumsum(0).double()]) * duration
        super().__init__(shape, times, prior_std, scale)
        self.forward_policy, self.backward_policy = forward_policy, backward_policy
        self.frozen_forward = copy.deepcopy(forward_policy).requires_grad_(False)
        self.frozen_backward = copy.deepcopy(backward_policy).requires_grad_(False)
        self.method, self.g, self.reversion = method, g, reversion
        self.warm_steps, self.stage_steps, self.refresh, self.points = warm_steps, stage_steps, refresh, points
        self.average = average
        self.register_buffer("paths", torch.zeros(0))

    @classmethod
    def from_options(
        cls,
        shape: Sequence[int],
        drift: dict[str, Any],
        score: dict[str, Any],
        method: Method = "fbsde",
        steps: Count = 50,
        duration: Positive = 1.0,
        g: Positive = 1.0,
        reversion: NonNegative = 0.0,
        growth: Positive = 1.0,
        prior_std: Positive = 1.0,
        warm_steps: Count = 500,
        stage_steps: Count = 250,
        refresh: Count = 25,
        points: Count = 4,
        average: Probability = 0.99,
        scale: Positive = 1.0,
    ) -> Bridge:
        """Build from component options: ``drift`` is the forward policy's network, ``score`` the backward one's."""
        from models.registry import component

        policies = [
            TimedNetwork(component(kind, options, shape=list(shape)), 0.0, duration, 1.0)
            for kind, options in (("drift", drift), ("score", score))
        ]
        numbers = (steps, duration, g, reversion, growth, prior_std, warm_steps, stage_steps, refresh, points, average)
        return cls(*policies, shape, method, *numbers, scale)

    def base_drift(self, x: Tensor) -> Tensor:
        """f of the base process."""
        return -self.reversion * x

    def forward_drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.base_drift(x) + self.g * self.forward_policy(x, t)

    def reverse_drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.g * self.backward_policy(x, t) - self.base_drift(x)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.g)

    # Training ------------------------------------------------------------------------------------------------------

    def half_at(self, step: int) -> tuple[str, int]:
        """(what is trained at a step: "warm", "forward" or "backward"; the step's place within that half)."""
        if step < self.warm_steps:
            return "warm", step
        half, place = divmod(step - self.warm_steps, self.stage_steps)
        return ("backward" if half % 2 else "forward"), place

    def phases(self) -> list[Phase]:
        """One phase a policy, each in its halves; the joint method has one phase for both."""
        groups = {"drift": list(self.forward_policy.parameters()), "score": list(self.backward_policy.parameters())}
        if self.method == "joint":
            return [Phase("joint", groups, self.joint_loss)]
        trains_forward = lambda step: self.half_at(step)[0] == "forward"  # noqa: E731
        return [
            Phase("forward", {"drift": groups["drift"]}, self.forward_loss, when=trains_forward),
            Phase("backward", {"score": groups["score"]}, self.backward_loss, when=lambda s: not trains_forward(s)),
        ]

    def forward_loss(self, x: Tensor, random: StepRandom) -> Loss:
        """Z learns along backward paths of the frozen Zhat."""
        self._follow(self.frozen_backward, self.backward_policy)
        start = self.prior_std * random.normal("prior", x.shape[1:], x.dtype)
        made, met, i = self._points(random, lambda: self._simulate(self.frozen_backward, start, random, forward=False))
        return self._policy_loss(self.forward_policy, self.frozen_backward, made, met, i, random, forward=True)

    def backward_loss(self, x: Tensor, random: StepRandom) -> Loss:
        """Zhat learns along forward paths of the frozen Z; in the warm half, where Z = 0, by denoising."""
        x = x / self.scale
        if self.half_at(random.step)[0] == "warm":
            return self._denoising_loss(x, random)
        self._follow(self.frozen_forward, self.forward_policy)
        made, met, i = self._points(random, lambda: self._simulate(self.frozen_forward, x, random, forward=True))
        return self._policy_loss(self.backward_policy, self.frozen_forward, made, met, i, random, forward=False)

    @torch.no_grad()
    def _follow(self, frozen: nn.Module, live: nn.Module) -> None:
        """The frozen copy is the other policy's moving average, which stands still while that one is not trained."""
        torch._foreach_lerp_(list(frozen.parameters()), list(live.parameters()), 1 - self.average)

    @torch.no_grad()
    def _simulate(self, frozen: nn.Module, x: Tensor, random: StepRandom, forward: bool) -> Tensor:
        """Paths (steps + 1, B, ...) of the chain that a frozen policy drives, from data or from the prior."""
        times, source = self.times.cpu(), random.source("paths")

        def kernel(z: Tensor, i: int) -> Kernel:
            width, t = float(times[i + 1] - times[i]), self._at(times[i if forward else i + 1], z)
            variance = torch.tensor(self.g**2 * width, dtype=z.dtype, device=z.device)
            return Kernel(z + width * self._driven(frozen, z, t, forward), variance)

        steps = len(times) - 1
        if forward:
            return forward_path(x, steps, kernel, source)
        return backward_path(x, steps, kernel, source, last_mean=False)

    def _driven(self, policy: nn.Module, z: Tensor, t: Tensor, forward: bool) -> Tensor:
        """The drift of a policy in its own direction of time."""
        return (1.0 if forward else -1.0) * self.base_drift(z) + self.g * policy(z, t)

    def _points(self, random: StepRandom, simulate: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(x_i, x_{i+1}, i) at ``points`` random places a row of the stored paths, which are drawn anew when due."""
        if self.half_at(random.step)[1] % self.refresh == 0 or not len(self.paths):
            self.paths = simulate()
        steps, rows = self.paths.shape[0] - 1, self.paths.shape[1]
        where = random.uniform("points", (self.points, 2)).flatten(0, 1)
        i = (where[:, 0] * steps).long().clamp_max(steps - 1)
        j = (where[:, 1] * rows).long().clamp_max(rows - 1)
        return self.paths[i, j], self.paths[i + 1, j], i

    def _policy_loss(
        self, live: nn.Module, frozen: nn.Module, x0: Tensor, x1: Tensor, i: Tensor, random: StepRandom, forward: bool
    ) -> Loss:
        """Loss of one policy on steps between x_i = x0 and x_{i+1} = x1 of the paths that the frozen one made.

        A policy is trained where its own kernel is evaluated: Z at the earlier, Zhat at the later end of a step.
        """
        times, dims = self.times.to(x0), x0[0].numel()
        earlier, later = times[i], times[i + 1]
        width = later - earlier
        z, t = (x0, earlier) if forward else (x1, later)
        if self.method == "dsb":
            # the map that undoes the frozen one's step, e.g. B(x_{k+1}) = x_{k+1} + F(x_k) - F(x_{k+1})
            origin, made = (x1, later) if forward else (x0, earlier)
            wide = expand(width, z)
            with torch.no_grad():
                change = self._driven(frozen, origin, made, not forward) - self._driven(frozen, z, made, not forward)
                target = origin - z + wide * change
            error = (wide * self._driven(live, z, t, forward) - target).flatten(1).square().sum(1)
            loss = 0.5 * (error / (self.g**2 * width)).mean() / dims  # in units of the step's own noise
        else:
            with torch.no_grad():
                other = frozen(z, t)
            policy, divergence = self._with_divergence(live, z, t, random)
            rate = (0.5 * policy.square() + policy * other).flatten(1).sum(1) + self.g * divergence
            loss = (len(times) - 1) * (width * rate).mean() / dims
        return loss, {"policy": loss.detach()}

    def _with_divergence(self, policy: nn.Module, z: Tensor, t: Tensor, random: StepRandom) -> tuple[Tensor, Tensor]:
        """(policy(z, t), its divergence in z (B,)) with a graph of the second order."""
        leaf = z if z.requires_grad else z.detach().requires_grad_()
        output = policy(leaf, t)
        if z[0].numel() <= EXACT_DIVERGENCE:
            flat = output.flatten(1)
            columns = [
                torch.autograd.grad(flat[:, d].sum(), leaf, create_graph=True)[0].flatten(1)[:, d]
                for d in range(flat.shape[1])
            ]
            return output, torch.stack(columns).sum(0)
        probe = (random.uniform("probe", (self.points, *z.shape[1:])).flatten(0, 1) >= 0.5).to(z) * 2 - 1
        (product,) = torch.autograd.grad(output, leaf, probe[: len(z)], create_graph=True)
        return output, (product * probe[: len(z)]).flatten(1).sum(1)

    def base_marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the base process, x_t | x_0 ~ N(alpha x_0, sigma^2 I)."""
        if self.reversion == 0:
            return torch.ones_like(t), self.g * t.sqrt()
        decay = torch.exp(-self.reversion * t)
        return decay, self.g * ((1 - decay.square()) / (2 * self.reversion)).sqrt()

    def _denoising_loss(self, x: Tensor, random: StepRandom) -> Loss:
        """1/2 |sigma Zhat / g + noise|^2 / D at the later ends of the grid's steps: Zhat = g score of the base process."""
        i = (random.stratified("time") * (len(self.times) - 1)).long().clamp_max(len(self.times) - 2)
        t = self.times.to(x)[i + 1]
        noise = random.normal("noise", x.shape[1:], x.dtype)
        alpha, sigma = (expand(v, x) for v in self.base_marginal(t))
        error = sigma / self.g * self.backward_policy(alpha * x + sigma * noise, t) + noise
        loss = 0.5 * error.square().mean()
        return loss, {"denoising": loss.detach()}

    def joint_loss(self, x: Tensor, random: StepRandom) -> Loss:
        """Bound / D of both policies through the whole path: sum of D_i [1/2 |Z + Zhat|^2 + div(g Zhat - f)] - log pi."""
        x, source, dims = x / self.scale, random.source("paths"), x[0].numel()
        times, total = self.times.cpu(), 0.0
        for i in range(len(times) - 1):
            width, t = float(times[i + 1] - times[i]), self._at(times[i], x)
            forward = self.forward_policy(x, t)
            # the graph of the path stays whole: the divergence is taken at x itself
            x = x if x.requires_grad else x.requires_grad_()
            backward, divergence = self._with_divergence(self.backward_policy, x, t, random)
            rate = 0.5 * (forward + backward).flatten(1).square().sum(1) + self.g * divergence + self.reversion * dims
            total = total + width * rate
            noise = normal(x.shape, source, x.device, x.dtype)
            x = x + width * (self.base_drift(x) + self.g * forward) + self.g * width**0.5 * noise
        loss = (total - self.prior_log_prob(x)).mean() / dims + math.log(self.scale)
        return loss, {"bound": loss.detach()}
