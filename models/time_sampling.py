"""Noise levels for the likelihood integral: where to draw them, and how to weight what is measured there.

A bound's integral is int e d lambda over [lambda(eps), lambda(1)], lambda = log(sigma / alpha), d lambda =
g^2 / (2 sigma^2) dt. A *proposal* turns uniform numbers into times and weights with E[weight e(t)] = int e d lambda,
whatever e is: all proposals are unbiased for one integral, and differ in variance only. A *draw* says how the uniform
numbers of one image depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.noise import Generator, uniform
from models.sde import LinearSDE

# (sde, u (B,) in [0, 1)) -> (t (B,) in [eps, 1], weight (B,), nats per unit of e)
Proposal = Callable[[LinearSDE, Tensor], tuple[Tensor, Tensor]]

# Huang, Lim and Courville hold their density constant below this time
DEBIASED_FLOOR = 1e-3


def log_ratio_rate(sde: LinearSDE, t: Tensor) -> Tensor:
    """d lambda / dt = g^2 / (2 sigma^2), the shape of t."""
    return 0.5 * (sde.diffusion(t) / sde.marginal(t)[1]).square()


def importance(sde: LinearSDE, u: Tensor, t_min: float | None = None) -> tuple[Tensor, Tensor]:
    """Uniform in lambda: the likelihood-importance density of Song et al. 2021 (arXiv 2101.09258, section 5).

    The weight is lambda(1) - lambda(t_min) = Z / 2 everywhere; t_min defaults to eps.
    """
    t, normaliser = sde.importance_time(u, t_min)
    return t, (0.5 * normaliser).expand(u.shape)


def uniform_time(sde: LinearSDE, u: Tensor, t_min: float | None = None) -> tuple[Tensor, Tensor]:
    """Uniform in t on [t_min, 1]; the weight (1 - t_min) d lambda / dt grows like 1 / t towards 0 for VP."""
    low = sde.eps if t_min is None else t_min
    t = low + (1 - low) * u
    return t, (1 - low) * log_ratio_rate(sde, t)


def soft_truncation(u: float, eps: float, exponent: float) -> float:
    """A truncation tau in [eps, 1] with density proportional to tau^-exponent, from one uniform ``u``.

    Soft Truncation (Kim et al. 2022, arXiv 2106.05527, section 4): one tau a batch, and the likelihood-weighted loss
    on [tau, 1]. Averaged over tau that is the loss whose weight at t is multiplied by P(tau <= t).
    """
    if exponent == 1:
        return eps ** (1 - u)
    power = 1 - exponent
    # between the ends as powers: rounding could leave the interval by a unit in the last place
    return min(max((eps**power + u * (1 - eps**power)) ** (1 / power), eps), 1.0)


def soft_truncation_share(t: Tensor, eps: float, exponent: float) -> Tensor:
    """P(tau <= t) of :func:`soft_truncation`, the shape of t."""
    if exponent == 1:
        return 1 - t.log() / math.log(eps)
    power = 1 - exponent
    return (t**power - eps**power) / (1 - eps**power)


def debiased(sde: LinearSDE, u: Tensor, floor: float = DEBIASED_FLOOR) -> tuple[Tensor, Tensor]:
    """Density proportional to r = g^2 / sigma^2 above ``floor`` and to r(floor) below.

    Huang, Lim and Courville 2021 (arXiv 2106.02808, and its code), here on [eps, 1] and for every linear SDE. They
    train with the weight left out; it is constant above ``floor`` and that times r / r(floor) below, and keeping it
    makes the integral exact. With eps = 0, as theirs, VP (0.1, 20) has Z = 20.256. An SDE whose eps is not below
    ``floor`` has nothing to hold constant: importance.
    """
    if sde.eps >= floor:
        return importance(sde, u)
    low, high = sde.log_ratio_range(u, floor)
    head, normaliser = debiased_share(sde, floor)
    near = u < head
    above = sde.time(low + ((u - head) / (1 - head)).clamp_min(0) * (high - low)).clamp(floor, 1.0)
    t = torch.where(near, sde.eps + (u / head) * (floor - sde.eps), above)
    bottom = torch.full_like(u, floor)
    weight = 0.5 * normaliser * torch.where(near, log_ratio_rate(sde, t) / log_ratio_rate(sde, bottom), 1.0)
    return t, weight


def debiased_share(sde: LinearSDE, floor: float = DEBIASED_FLOOR) -> tuple[float, float]:
    """(P(t < floor), Z) of :func:`debiased`: Z = r(floor) (floor - eps) + int_floor^1 r dt, in float64."""
    low, high = sde.log_ratio_range(torch.zeros((), dtype=torch.float64), floor)
    below = 2 * float(log_ratio_rate(sde, torch.tensor(floor, dtype=torch.float64))) * (floor - sde.eps)
    normaliser = below + 2 * float(high - low)
    return below / normaliser, normaliser


def independent(count: int, times: int, generator: Generator = None, device=None, dtype=None) -> Tensor:
    """Uniforms (count, times), all independent."""
    return uniform((count, times), generator, device, dtype)


def stratified(count: int, times: int, generator: Generator = None, device=None, dtype=None) -> Tensor:
    """Uniforms (count, times): each image's are a regular grid of spacing 1 / times with one random shift.

    Each value alone is uniform, so nothing is biased; together they cover [0, 1) evenly (a rank-1 lattice, as in
    Kingma et al. 2021, arXiv 2107.00630, appendix I.1, there over a batch).
    """
    shift = uniform((count, 1), generator, device, dtype)
    return (torch.arange(times, device=shift.device, dtype=shift.dtype) + shift) / times


PROPOSALS: dict[str, Proposal] = {"importance": importance, "uniform": uniform_time, "debiased": debiased}
DRAWS: dict[str, Callable[..., Tensor]] = {"stratified": stratified, "independent": independent}
