"""Densities on the plane diffused exactly: a mixture of Gaussians, and the checkerboard through normal CDFs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench import toy
from models.sde import LinearSDE

DOUBLE = torch.float64


class DiffusedMixture(nn.Module):
    """Score and density at every t of data sum_k weights_k N(means_k, stds_k^2 I); means (K, D), the others (K,)."""

    def __init__(
        self, sde: LinearSDE, means: Tensor, stds: Tensor | float, weights: Sequence[float] | Tensor | None = None
    ):
        super().__init__()
        self.sde = sde
        means = torch.as_tensor(means, dtype=DOUBLE)
        stds = torch.as_tensor(stds, dtype=DOUBLE).expand(len(means))
        weights = torch.ones(len(means)) if weights is None else torch.as_tensor(weights)
        weights = weights.to(DOUBLE) / weights.sum()
        for name, value in (("means", means), ("stds", stds), ("log_weights", weights.log())):
            self.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))

    def _terms(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log joint density of z and its component (B, K), offsets (B, K, D) and variances (B, K)."""
        alpha, sigma = (value[:, None] for value in self.sde.marginal(t))
        offsets = z[:, None, :] - alpha[..., None] * self.means.to(z)
        variances = (alpha * self.stds.to(z)) ** 2 + sigma**2
        log_normal = -0.5 * (offsets.square().sum(2) / variances + z.shape[1] * (2 * math.pi * variances).log())
        return self.log_weights.to(z) + log_normal, offsets, variances

    def log_prob(self, z: Tensor, t: Tensor) -> Tensor:
        """log p_t(z), nats (B,); z (B, D), t (B,)."""
        return torch.logsumexp(self._terms(z, t)[0], 1)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(z), of z's shape."""
        joint, offsets, variances = self._terms(z, t)
        shares = torch.softmax(joint, 1) / variances
        return -(shares[..., None] * offsets).sum(1)


def eight_gaussians(sde: LinearSDE) -> DiffusedMixture:
    """``bench.toy``'s ring of 8 Gaussians under ``sde``."""
    angle = torch.arange(toy.GAUSSIANS, dtype=DOUBLE) * (2 * math.pi / toy.GAUSSIANS)
    means = toy.GAUSSIAN_RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    return DiffusedMixture(sde, means, toy.GAUSSIAN_SIGMA)


class DiffusedCheckerboard(nn.Module):
    """Score and density at every t of ``bench.toy``'s uniform checkerboard.

    In y = z / alpha a square of the board is convolved with N(0, rho^2 I), rho = sigma / alpha, and a side [l, l + 1]
    becomes Phi((y - l) / rho) - Phi((y - l - 1) / rho). Its logarithm is taken in the tail where both are small, so
    that the score is right far from the board too.
    """

    def __init__(self, sde: LinearSDE):
        super().__init__()
        self.sde = sde
        low = torch.arange(toy.BOARD, dtype=DOUBLE) - toy.BOARD / 2
        self.low = nn.Parameter(low, requires_grad=False)
        column, row = torch.meshgrid(torch.arange(toy.BOARD), torch.arange(toy.BOARD), indexing="ij")
        filled = (column + row) % 2 == 0
        self.columns, self.rows = column[filled], row[filled]

    def _sides(self, y: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        """Log mass of each interval under N(y, rho^2) and its derivative in y, both (B, intervals); y and rho (B,)."""
        low = self.low.to(y)
        u = (y[:, None] - low) / rho[:, None]
        v = (y[:, None] - low - 1) / rho[:, None]  # u > v
        # by symmetry the mass of (v, u) is that of (-u, -v); the side with the smaller tails loses no digits
        flip = v > 0
        upper, lower = torch.where(flip, -v, u), torch.where(flip, -u, v)
        log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
        log_mass = log_upper + torch.log(-torch.expm1(log_lower - log_upper))
        constant = -0.5 * math.log(2 * math.pi)
        slope = (-0.5 * u**2 + constant - log_mass).exp() - (-0.5 * v**2 + constant - log_mass).exp()
        return log_mass, slope / rho[:, None]

    def _terms(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, sigma = self.sde.marginal(t)
        y, rho = z / alpha[:, None], sigma / alpha
        (log_x, slope_x), (log_y, slope_y) = self._sides(y[:, 0], rho), self._sides(y[:, 1], rho)
        joint = log_x[:, self.columns] + log_y[:, self.rows]
        return joint, slope_x[:, self.columns], slope_y[:, self.rows], alpha

    def log_prob(self, z: Tensor, t: Tensor) -> Tensor:
        """log p_t(z), nats (B,); z (B, 2), t (B,)."""
        joint, _, _, alpha = self._terms(z, t)
        return torch.logsumexp(joint, 1) - math.log(len(self.columns)) - 2 * alpha.log()

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(z), of z's shape."""
        joint, slope_x, slope_y, alpha = self._terms(z, t)
        shares = torch.softmax(joint, 1)
        return torch.stack([(shares * slope_x).sum(1), (shares * slope_y).sum(1)], 1) / alpha[:, None]
