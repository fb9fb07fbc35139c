"""Noise levels for the likelihood integral: where to draw them, and how to weight what is measured there.

A bound's integral is int e d lambda over [lambda(eps), lambda(1)], lambda = log(sigma / alpha), d lambda =
g^2 / (2 sigma^2) dt. A *proposal* turns uniform numbers into times and weights with E[weight e(t)] = int e d lambda,
whatever e is: all proposals are unbiased for one integral, and differ in variance only. A *draw* says how the uniform
numbers of one image depend on each other.
"""

from __future__ import annotations

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


def importance(sde: LinearSDE, u: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform in lambda: the likelihood-importance density of Song et al. 2021 (arXiv 2101.09258, section 5).

    The weight is lambda(1) - lambda(eps) = Z / 2 everywhere.
    """
    t, normaliser = sde.importance_time(u)
    return t, (0.5 * normaliser).expand(u.shape)


def uniform_time(sde: LinearSDE, u: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform in t on [eps, 1]; the weight (1 - eps) d lambda / dt grows like 1 / t towards eps for VP."""
    t = sde.eps + (1 - sde.eps) * u
    return t, (1 - sde.eps) * log_ratio_rate(sde, t)


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


def choose(options: dict[str, Callable], what: str, name: str) -> Callable:
    """The option called ``name``; ValueError with the accepted names otherwise."""
    if name not in options:
        raise ValueError(f"{what} = {name!r}: accepted are {', '.join(options)}")
    return options[name]
