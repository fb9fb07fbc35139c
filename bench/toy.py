"""Two-dimensional densities with endless samples: the ground truth of the harness.

Coordinates are left as they are (overall standard deviation about 1.2 for the checkerboard and 2 for the Gaussians), so
that likelihoods are comparable with the entropies that other papers print. Uniform and normal numbers of the two curved
densities are drawn in float64 and rounded once, so that the fixed test sets, and hence their hashes, do not depend on a
machine's cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BOARD = 4  # squares a side, each of unit area, centred on the origin
GAUSSIANS = 8
GAUSSIAN_RADIUS = 4 / math.sqrt(2)
GAUSSIAN_SIGMA = 0.5 / math.sqrt(2)
SWISSROLL_SCALE = 5.0
SWISSROLL_SIGMA = 0.2


@dataclass(frozen=True)
class Density:
    """A density on the plane: ``draw(n, generator) -> float32 (n, 2)``; where known, ``log_prob(x) -> nats (B,)``."""

    draw: Callable[[int, torch.Generator], Tensor]
    log_prob: Callable[[Tensor], Tensor] | None
    seed: int  # of the fixed train and test sets; never the seed of a run


def draw_checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """Sample the uniform density on the 8 filled squares of a 4x4 board on [-2, 2)^2; float32 (n, 2)."""
    uniform = torch.rand(n, 3, generator=generator)
    x = BOARD * uniform[:, 0] - BOARD / 2
    column = torch.floor(x).long() + BOARD // 2
    row = 2 * torch.floor(uniform[:, 1] * (BOARD // 2)).long() + column % 2
    # one float32 step below 1: row + offset must not round up into the empty square above
    offset = uniform[:, 2].clamp(max=1 - 2.0**-23)
    return torch.stack([x, (row - BOARD // 2) + offset], dim=1)


def log_prob_checkerboard(x: Tensor) -> Tensor:
    """Exact log-density, nats (B,): -ln 8 on the filled squares and -inf elsewhere. ``x`` is (B, 2)."""
    square = torch.floor(x).long() + BOARD // 2
    inside = ((square >= 0) & (square < BOARD)).all(dim=1) & (square.sum(dim=1) % 2 == 0) & torch.isfinite(x).all(dim=1)
    area = BOARD * BOARD / 2
    return torch.where(inside, -math.log(area), -math.inf).to(x.dtype)


def _gaussian_centres(dtype: torch.dtype) -> Tensor:
    angle = torch.arange(GAUSSIANS, dtype=torch.float64) * (2 * math.pi / GAUSSIANS)
    return (GAUSSIAN_RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)).to(dtype)


def draw_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """Sample the equal mixture of 8 Gaussians on a circle of radius 4/sqrt(2), sigma 0.5/sqrt(2); float32 (n, 2)."""
    component = torch.randint(GAUSSIANS, (n,), generator=generator)
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return (_gaussian_centres(torch.float64)[component] + GAUSSIAN_SIGMA * noise).float()


def log_prob_gaussians(x: Tensor) -> Tensor:
    """Exact log-density of the mixture, nats (B,); ``x`` is (B, 2)."""
    centres = _gaussian_centres(x.dtype).to(x.device)
    square = (x[:, None, :] - centres).square().sum(dim=2)
    log_normaliser = math.log(2 * math.pi * GAUSSIAN_SIGMA**2) + math.log(GAUSSIANS)
    return torch.logsumexp(-square / (2 * GAUSSIAN_SIGMA**2), dim=1) - log_normaliser


def draw_swissroll(n: int, generator: torch.Generator) -> Tensor:
    """Sample an Archimedean spiral of one and a half turns with Gaussian noise, scaled by 1/5; float32 (n, 2).

    The curve is scikit-learn's ``make_swiss_roll`` seen from above; its noise of standard deviation 1 becomes 0.2.
    """
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator, dtype=torch.float64))
    curve = angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) / SWISSROLL_SCALE
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return (curve + SWISSROLL_SIGMA * noise).float()


DENSITIES: dict[str, Density] = {
    "checkerboard": Density(draw_checkerboard, log_prob_checkerboard, seed=1_000_003),
    "gaussians": Density(draw_gaussians, log_prob_gaussians, seed=1_000_033),
    "swissroll": Density(draw_swissroll, None, seed=1_000_037),
}


def fixed_sets(name: str, train: int = 10_000, test: int = 5_000) -> tuple[Tensor, Tensor]:
    """The fixed train sample (statistics only: training itself draws afresh) and the fixed test set, float32 (N, 2)."""
    density = DENSITIES[name]
    return (
        density.draw(train, torch.Generator().manual_seed(density.seed)),
        density.draw(test, torch.Generator().manual_seed(density.seed + 1)),
    )
