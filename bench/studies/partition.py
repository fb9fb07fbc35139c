"""Total variation on one fixed partition of the plane: squares of one side over a centred region, and all the rest.

Every law is pushed through the same map, point -> bin. Total variation of the images is at most that of the laws (data
processing), and it is itself a metric, so a triangle inequality between laws holds between their bin masses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import toy

SIDE = 0.5  # half a square of the checkerboard, whose edges are edges of bins


@dataclass(frozen=True)
class Partition:
    """``across`` x ``across`` squares of side ``side`` about the origin and, last, the bin of everything outside."""

    across: int
    side: float = SIDE

    @property
    def bins(self) -> int:
        return self.across**2 + 1

    @property
    def edges(self) -> Tensor:
        """The squares' edges along an axis, float64 (across + 1,)."""
        return (torch.arange(self.across + 1, dtype=torch.float64) - self.across / 2) * self.side

    def index(self, x: Tensor) -> Tensor:
        """Bin of each point x (B, 2), int64 (B,); a point that is not finite is outside."""
        cell = torch.floor(x.double() / self.side) + self.across // 2
        inside = ((cell >= 0) & (cell < self.across)).all(1)
        cell = torch.where(inside[:, None], cell, torch.zeros_like(cell)).long()
        return torch.where(inside, cell[:, 0] * self.across + cell[:, 1], torch.full_like(cell[:, 0], self.across**2))

    def masses(self, x: Tensor) -> Tensor:
        """Shares of the points x (B, 2) in the bins, float64 (bins,) on the CPU."""
        return torch.bincount(self.index(x).cpu(), minlength=self.bins).double() / len(x)

    def normal_masses(self, mean: Tensor, std: Tensor) -> Tensor:
        """Exact masses of N(mean, diag std^2), both (2,): products of differences of the normal's distribution."""
        below = torch.special.ndtr((self.edges[:, None] - mean.double()) / std.double()).diff(dim=0)
        inside = torch.outer(below[:, 0], below[:, 1]).flatten()
        return torch.cat([inside, (1 - inside.sum()).clamp_min(0)[None]])


def data_partition(name: str) -> tuple[Partition, Tensor] | None:
    """The partition for a density of :mod:`bench.toy` and the density's exact masses; None where it is not known.

    The region is the checkerboard itself, and the circle of the Gaussians with three standard deviations around it.
    """
    if name == "checkerboard":
        per_unit = round(1 / SIDE)
        board = Partition(toy.BOARD * per_unit)
        centres = (board.edges[:-1] + board.side / 2).double()
        grid = torch.cartesian_prod(centres, centres)
        inside = toy.log_prob_checkerboard(grid).exp() * board.side**2
        return board, torch.cat([inside, torch.zeros(1, dtype=torch.float64)])
    if name == "gaussians":
        half = math.ceil((toy.GAUSSIAN_RADIUS + 3 * toy.GAUSSIAN_SIGMA) / SIDE)
        plane = Partition(2 * half)
        angles = [2 * math.pi * k / toy.GAUSSIANS for k in range(toy.GAUSSIANS)]
        centres = toy.GAUSSIAN_RADIUS * torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64)
        std = torch.full((2,), toy.GAUSSIAN_SIGMA, dtype=torch.float64)
        return plane, torch.stack([plane.normal_masses(centre, std) for centre in centres]).mean(0)
    return None


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of |p - q| over bins, in [0, 1]."""
    return float(0.5 * (p - q).abs().sum())


def sampling_floor(p: Tensor, n: int, m: int | None = None) -> float:
    """Expected total variation between the shares of n points and those of m points of the same law, masses p.

    Without ``m`` between the shares of n points and p itself. Normal limit: E|N(0, v)| = sqrt(2 v / pi) in each bin.
    """
    variance = p * (1 - p) * (1 / n + (1 / m if m else 0))
    return float(0.5 * (2 * variance / math.pi).sqrt().sum())


def standard_error(p: Tensor, q: Tensor, n: int, m: int | None = None) -> float:
    """Of ``total_variation(p, q)`` for shares p of n points and, with ``m``, q of m points, by the delta method.

    With signs s of p - q the distance is half the mean of s over the first points less that over the second.
    """
    sign = torch.sign(p - q)
    variance = sum(
        float((law * sign.square()).sum() - (law * sign).sum().square()) / size
        for law, size in ((p, n), (q, m))
        if size
    )
    return 0.5 * math.sqrt(max(variance, 0.0))
