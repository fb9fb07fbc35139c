"""The linear processes as their papers define them: drift, diffusion and marginals, apart from ``models.sde``.

The models' SDE classes work in lambda = log(sigma / alpha). Here nothing does: integrals are taken over time from f and
g, so that an error in the identity, in a normaliser or in the prior shows as a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.sde import VESDE, VPSDE, LinearSDE, SubVPSDE

SDES: dict[str, type[LinearSDE]] = {"vp": VPSDE, "subvp": SubVPSDE, "ve": VESDE}


@dataclass(frozen=True)
class Process:
    """dz = f(t) z dt + g(t) dw on [eps, 1], z_t | z_0 ~ N(alpha z_0, sigma^2 I), prior N(0, prior_std^2 I).

    The four functions take and give float64 tensors of one shape. Song et al. 2021, arXiv 2011.13456, appendix B.
    """

    name: str
    eps: float
    prior_std: float
    drift: Callable[[Tensor], Tensor]
    diffusion: Callable[[Tensor], Tensor]
    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]

    def at(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) at one time."""
        time = torch.tensor(t, dtype=torch.float64)
        return float(self.alpha(time)), float(self.sigma(time))

    def ratio(self, t: float) -> float:
        """sigma / alpha, the standard deviation of the noise in z_t / alpha."""
        alpha, sigma = self.at(t)
        return sigma / alpha

    def over_time(self, integrand: Callable[[Tensor], Tensor], low: float | None = None) -> Tensor:
        """int_{low}^1 of ``integrand`` (Q,) -> (..., Q), by quadrature in log t; ``low`` defaults to eps."""
        low = math.log(self.eps if low is None else low)
        return integrate(lambda s: integrand(s.exp()) * s.exp(), low, 0.0)

    def normaliser(self, low: float | None = None) -> float:
        """Z = int g^2 / sigma^2 dt."""
        return float(self.over_time(lambda t: (self.diffusion(t) / self.sigma(t)).square(), low))

    def time_of(self, ratios: Tensor) -> Tensor:
        """Times at which sigma / alpha has the given values, by bisection; shape of ``ratios``."""
        low, high = torch.zeros_like(ratios), torch.ones_like(ratios)
        for _ in range(200):
            middle = 0.5 * (low + high)
            below = self.sigma(middle) / self.alpha(middle) < ratios
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 0.5 * (low + high)

    def grid(self, kind: str, steps: int, end: float) -> Tensor:
        """steps + 1 times from 1 to ``end``, equidistant in t ("time") or in log(sigma / alpha) ("log_ratio")."""
        if kind == "time":
            return 1 + (end - 1) * torch.arange(steps + 1, dtype=torch.float64) / steps
        high, low = math.log(self.ratio(1.0)), math.log(self.ratio(end))
        times = self.time_of((high + (low - high) * torch.arange(steps + 1, dtype=torch.float64) / steps).exp())
        times[0], times[-1] = 1.0, end
        return times


def process_of(sde: LinearSDE) -> Process:
    """The textbook process with the parameters of ``sde``; a TypeError names an SDE that has none here."""
    if isinstance(sde, VESDE):
        low, high = sde.sigma_min, sde.sigma_max
        log_range = math.log(high / low)

        def sigma(t):
            return low * (high / low) ** t

        return Process(
            name="ve",
            eps=sde.eps,
            prior_std=high,
            drift=torch.zeros_like,
            # d sigma^2 / dt = 2 sigma^2 log(sigma_max / sigma_min)
            diffusion=lambda t: sigma(t) * math.sqrt(2 * log_range),
            alpha=torch.ones_like,
            sigma=sigma,
        )
    if not isinstance(sde, (VPSDE, SubVPSDE)):
        raise TypeError(f"{type(sde).__name__}: has no textbook process; accepted are {', '.join(SDES)}")
    start, slope = sde.beta_min, sde.beta_max - sde.beta_min

    def beta(t):
        return start + slope * t

    def integral(t):
        return start * t + slope * t**2 / 2

    variance_preserving = isinstance(sde, VPSDE)
    return Process(
        name="vp" if variance_preserving else "subvp",
        eps=sde.eps,
        prior_std=1.0,
        drift=lambda t: -beta(t) / 2,
        diffusion=lambda t: (beta(t) * (1.0 if variance_preserving else -torch.expm1(-2 * integral(t)))).sqrt(),
        alpha=lambda t: torch.exp(-integral(t) / 2),
        sigma=lambda t: (-torch.expm1(-integral(t))) ** (0.5 if variance_preserving else 1.0),
    )


def integrate(integrand: Callable[[Tensor], Tensor], low: float, high: float, panels: int = 40) -> Tensor:
    """Composite Gauss-Legendre quadrature, 16 nodes a panel: ``integrand`` maps nodes (Q,) to (..., Q), float64."""
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(16))
    half = (high - low) / (2 * panels)
    centres = low + half * (2 * torch.arange(panels, dtype=torch.float64) + 1)
    return (integrand((centres[:, None] + half * nodes).flatten()) * (half * weights).repeat(panels)).sum(-1)
