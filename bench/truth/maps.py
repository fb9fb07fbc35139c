"""Invertible maps with known inverse and log-determinant, to stand where a flow stands."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AffineMap(nn.Module):
    """z = A x + b for a matrix A (D, D) or one number, b (D,) or one number; log|det| = log|det A|."""

    def __init__(self, matrix: Tensor | float, shift: Tensor | float = 0.0):
        super().__init__()
        self.matrix = torch.as_tensor(matrix, dtype=torch.float64)
        self.shift = torch.as_tensor(shift, dtype=torch.float64)

    def _square(self, x: Tensor) -> Tensor:
        matrix = self.matrix.to(x)
        return matrix if matrix.dim() else matrix * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, D) -> z (B, D) and log|det dz/dx| (B,), nats."""
        matrix = self._square(x)
        return x @ matrix.T + self.shift.to(x), torch.linalg.slogdet(matrix).logabsdet.expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """x (B, D) with forward(x) = z."""
        return torch.linalg.solve(self._square(z), (z - self.shift.to(z)).T).T


class Warp(nn.Module):
    """A nonlinear map with a full triangular Jacobian: u = sinh(a x) / a + b, then z_i = u_i e^{s_i} + u_{i-1}^2 / 4.

    s_i = tanh(u_{i-1}) / 2 and s_0 = 0, so that log|det| = sum_i [log cosh(a x_i) + s_i] varies over space.
    """

    def __init__(self, rate: float = 0.8, shift: float = 0.2):
        super().__init__()
        self.rate, self.shift = rate, shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, D) -> z (B, D) and log|det dz/dx| (B,), nats."""
        u = torch.sinh(self.rate * x) / self.rate + self.shift
        stretch = 0.5 * torch.tanh(u[:, :-1])
        z = torch.cat([u[:, :1], u[:, 1:] * stretch.exp() + 0.25 * u[:, :-1].square()], 1)
        return z, torch.cosh(self.rate * x).log().sum(1) + stretch.sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        """x (B, D) with forward(x) = z, one axis after the other."""
        axes = [z[:, 0]]
        for i in range(1, z.shape[1]):
            before = axes[-1]
            axes.append((z[:, i] - 0.25 * before.square()) * (-0.5 * torch.tanh(before)).exp())
        return torch.asinh((torch.stack(axes, 1) - self.shift) * self.rate) / self.rate


def autograd_log_det(function, x: Tensor) -> Tensor:
    """log|det| of the Jacobian of ``function`` (B, *shape) -> (B, *shape), sample by sample, by autograd; (B,)."""
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x).flatten(1).sum(0), x)
    dims = x[0].numel()
    return torch.linalg.slogdet(jacobian.reshape(dims, len(x), dims).transpose(0, 1)).logabsdet
