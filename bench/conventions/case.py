"""What every convention is measured on: one trained model, its first test images, its samples, one set of draws.

The right value and the convention's are taken on the same images with the same noise, so that the standard error of
their difference is that of the effect and not of the likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.likelihood import Units
from models.base import NotDefined
from models.indm import INDM
from models.integrators import MAX_STEP, dormand_prince, flow_field, state_scale
from models.noise import IndexedGenerator, normal, rademacher
from models.sde import expand

if TYPE_CHECKING:
    from bench.studies import Context

Row = dict[str, Any]
Array = np.ndarray


class Latents(NamedTuple):
    """Samples of the model in latent space: ``noisy`` at eps, and the two factors of Tweedie's formula there."""

    noisy: Tensor  # z_eps (n, *shape)
    noise: Tensor  # the noise predicted in it
    alpha: float
    sigma: float

    @property
    def clean(self) -> Tensor:
        """z_0 = (z_eps - sigma noise) / alpha."""
        return (self.noisy - self.sigma * self.noise) / self.alpha


@dataclass
class Case:
    """A trained model with what its conventions share; per-image values are float64 arrays (n,) in nats.

    ``images`` test images, ``times`` noise levels of a bound, ``draws`` pairs of noise draws at eps, ``samples``
    samples by the ODE at ``tolerance``, ``steps`` of the stochastic path, taken for the first ``path_images`` (None:
    all images).
    """

    context: Context
    images: int = 100
    times: int = 16
    draws: int = 4
    samples: int = 400
    steps: int = 100
    tolerance: float = 1e-2
    path_images: int | None = None

    @property
    def model(self) -> INDM:
        return self.context.model

    @property
    def levels(self) -> int | None:
        return self.context.data.levels

    @cached_property
    def units(self) -> Units:
        return Units(self.context.data)

    @cached_property
    def x(self) -> Tensor:
        """The test images as model variables, (n, *shape)."""
        return self.context.points(self.images)

    def source(self, what: str, rows: Tensor) -> IndexedGenerator:
        """The draws ``what`` of the images ``rows``: the same ones whenever they are asked for."""
        return IndexedGenerator(self.context.run.seed, f"conventions {what}", rows)

    def batches(self, count: int) -> Iterator[Tensor]:
        """Indices 0..count-1 in batches."""
        yield from torch.arange(count).split(self.context.run.evaluate.batch_size)

    @torch.no_grad()
    def per_image(self, function: Callable[[Tensor, Tensor], Any], x: Tensor | None = None) -> Any:
        """``function(x, rows)`` over batches of ``x`` (default: the test images); one array (n,) a returned tensor."""
        x = self.x if x is None else x
        pieces = [function(x[rows.to(x.device)], rows) for rows in self.batches(len(x))]
        if isinstance(pieces[0], Tensor):
            return np.concatenate([piece.double().cpu().numpy() for piece in pieces])
        return [np.concatenate([value.double().cpu().numpy() for value in column]) for column in zip(*pieces)]

    # Likelihoods ---------------------------------------------------------------------------------------------------

    def nelbo(self, model: INDM | None = None, x: Tensor | None = None) -> Array:
        """The bound of each image, corrected at eps, nats (n,)."""
        model = model or self.model

        def one(x: Tensor, rows: Tensor) -> Tensor:
            parts = model.nelbo_parts(x, times=self.times, generator=self.source("nelbo", rows))
            residual = residuals(model, model.latent(x), self.source("eps", rows), self.draws)[0]
            return sum(part for name, part in parts.items() if name != "reconstruction") + residual

        return self.per_image(one, x)

    @cached_property
    def right_nelbo(self) -> Array:
        return self.nelbo()

    def nll(self, x: Tensor | None = None, corrected: bool = True) -> Array:
        """The ODE's negative log-likelihood of each image, nats (n,), by the run's own tolerances and probes."""
        settings = self.context.run.evaluate
        options = {"rtol": settings.rtol, "atol": settings.atol, "probes": settings.probes, "corrected": corrected}

        def one(x: Tensor, rows: Tensor) -> Tensor:
            # the draws for the log-determinant come first, so that they are those of encode(x, source("flow", rows))
            return self.model.nll(x, generator=self.source("flow", rows), **options)

        return self.per_image(one, x)

    @cached_property
    def right_nll(self) -> Array:
        return self.nll()

    @cached_property
    def residual_pair(self) -> tuple[Array, Array]:
        """The residual with one noise draw, and with two, of each image, nats (n,)."""
        model = self.model
        one, two = self.per_image(
            lambda x, rows: residuals(model, model.latent(x), self.source("eps", rows), self.draws)
        )
        return one, two

    @cached_property
    def stein(self) -> tuple[Array, Array]:
        """(sigma tr d noise/dz, residual) of each image, from draws and a trace that the residuals above do not use.

        Stein's identity E[n . noise(alpha z_0 + sigma n)] = sigma E[tr d noise/dz] turns the inner product of the
        residual into a trace; for the exact score it is sigma^2 E|score|^2.
        """
        model = self.model

        def one(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            z0, source = model.latent(x), self.source("stein", rows)
            t = at_eps(model, z0)
            sigma = model.sde.marginal(t.double())[1]
            trace = square = torch.zeros(len(z0), dtype=torch.float64, device=z0.device)
            for _ in range(self.draws):
                z = model.perturb(z0, t, normal(z0.shape, source, z0.device, z0.dtype))
                seen, jacobian = noise_trace(model, z, t, self.probes(z, source))
                trace, square = trace + sigma * jacobian / self.draws, square + dot(seen, seen) / self.draws
            return trace, 0.5 * square - trace - z0[0].numel() * model.sde.log_alpha(model.sde.eps)

        trace, residual = self.per_image(one)
        return trace, residual

    def probes(self, like: Tensor, source: IndexedGenerator) -> Tensor:
        """Vectors v (K, B, ...) with E sum_k v_k v_k' = I: the basis where the suite's trace is exact."""
        count = self.context.run.evaluate.probes
        if count == "exact":
            basis = torch.eye(like[0].numel(), dtype=like.dtype, device=like.device)
            return basis.view(-1, 1, *like.shape[1:]).expand(-1, len(like), *like.shape[1:])
        vectors = [rademacher(like.shape, source, like.device, like.dtype) for _ in range(count)]
        return torch.stack(vectors) / math.sqrt(count)

    # Samples -------------------------------------------------------------------------------------------------------

    @cached_property
    def latents(self) -> Latents:
        """Samples of the probability-flow ODE at eps, before they are denoised."""
        with torch.no_grad():
            pieces = [self._sample(rows) for rows in self.batches(self.samples)]
        noisy, noise = (torch.cat(column) for column in zip(*pieces))
        if not bool(torch.isfinite(noisy).all() and torch.isfinite(noise).all()):
            raise NotDefined("a sample is not finite")
        alpha, sigma = self.model.sde.marginal(torch.tensor([self.model.sde.eps], dtype=torch.float64))
        return Latents(noisy, noise, float(alpha), float(sigma))

    def _sample(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        model, like = self.model, self.x
        z = model.sde.sample_prior((len(rows), *model.shape), self.source("sample", rows), like.device, like.dtype)
        low, high = (end.expand(len(rows)) for end in model.sde.log_ratio_range(z))
        field = flow_field(model.noise, model.sde)
        u = z / expand(state_scale(model.sde, model.sde.time(high))[0], z)
        u, _, _ = dormand_prince(lambda _: field, u, high, low, self.tolerance, self.tolerance, max_step=MAX_STEP)
        t = model.sde.time(low)
        z = u * expand(state_scale(model.sde, t)[0], u)
        return z, model.noise(z, t)

    @cached_property
    def right_samples(self) -> Tensor:
        """The model's samples x (samples, *shape), denoised and decoded as they should be."""
        return self.decode(self.latents.clean)

    def decode(self, z: Tensor) -> Tensor:
        """x = h^{-1}(z), in batches."""
        return torch.cat([self.model.decode(z[rows.to(z.device)]) for rows in self.batches(len(z))])

    # Rows ----------------------------------------------------------------------------------------------------------

    def likelihood_row(
        self, quantity: str, right: Array, official: Array, closed_form: Array | None = None, part: bool = False
    ) -> Row:
        """A row of per-image nats (n,), in the suite's unit; ``part``: without the dequantisation offset.

        ``closed_form``: the difference by theory for each image, which may be an estimate itself. It is of the same
        images, so that ``closed_form_se``, the error of difference - closed form, is without the images' spread.
        """
        scale = self.units.part if part else self.units.total
        row = row_of(quantity, self.units.name, float(scale(right.mean())), float(scale(official.mean())), len(right))
        row["difference"] = float(self.units.part((official - right).mean()))
        row["se"] = float(self.units.part(standard_error(official - right)))
        if closed_form is not None:
            row["closed_form"] = float(self.units.part(closed_form.mean()))
            row["closed_form_se"] = float(self.units.part(standard_error(official - right - closed_form)))
        return row


def row_of(quantity: str, units: str, right: float, official: float, n: int, se: float | None = None) -> Row:
    """A row without its convention's name and status; difference = official - right."""
    row = {"quantity": quantity, "units": units, "right": right, "official": official, "n": n, "se": se}
    return row | {"difference": official - right, "closed_form": None, "closed_form_se": None}


def bootstrap_error(statistic: Callable[[np.ndarray], float], n: int, resamples: int = 200) -> float:
    """Standard error of ``statistic(rows)`` over resamples of n rows; always the same resamples."""
    random = np.random.default_rng(0)
    return float(np.std([statistic(random.integers(0, n, n)) for _ in range(resamples)], ddof=1))


def standard_error(values: Array) -> float:
    """Standard error of the mean of independent values."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, (B,), in float64: its terms may cancel."""
    return (a.double() * b.double()).flatten(1).sum(1)


def at_eps(model: INDM, like: Tensor) -> Tensor:
    """eps as a batch of times (B,)."""
    return torch.full((len(like),), model.sde.eps, dtype=like.dtype, device=like.device)


@torch.no_grad()
def residuals(model: INDM, z0: Tensor, source: IndexedGenerator, draws: int) -> tuple[Tensor, Tensor]:
    """(residual with one draw, residual with two draws) at eps, nats (B,), the mean over ``draws`` pairs.

    0.5 (|n - noise(z_eps)|^2 - D) - D log alpha, where z_eps holds n itself or the pair's other draw. Each pair is used
    both ways round and with both signs, and the known mean of |n|^2 stands for its draw, so that what is left is the
    difference.
    """
    t, dims = at_eps(model, z0), z0[0].numel()
    one = two = torch.zeros(len(z0), dtype=torch.float64, device=z0.device)
    for _ in range(draws):
        pair = [normal(z0.shape, source, z0.device, z0.dtype) for _ in range(2)]
        for first, second in (pair, pair[::-1]):
            seen = [model.noise(model.perturb(z0, t, n), t) for n in (first, -first)]
            square = (dot(seen[0], seen[0]) + dot(seen[1], seen[1])) / 4
            odd = (seen[0] - seen[1]) / 2
            one = one + (square - dot(first, odd)) / 2
            two = two + (square - dot(second, odd)) / 2
    offset = dims * model.sde.log_alpha(model.sde.eps)
    return one / draws - offset, two / draws - offset


def noise_trace(model: INDM, z: Tensor, t: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """(noise(z, t), trace of its Jacobian in z (B,)) by the vectors of :meth:`Case.probes`."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        output = model.noise(leaf, t)
        trace = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for k, probe in enumerate(probes):
            (product,) = torch.autograd.grad(output, leaf, probe, retain_graph=k + 1 < len(probes))
            trace = trace + dot(product, probe)
    return output.detach(), trace
