"""Means of stochastic estimators, sharpened by control variates that are made of the estimator's own draws.

An estimator's noise is drawn from a generator that the caller supplies. One that remembers what it drew gives functions
of it with known mean zero, and regressing on them leaves the expectation as it is while it removes most of the noise: a
thousand images then tell errors that would need a million. Nothing is assumed about the order or the use of the draws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.noise import IndexedGenerator


class Recorder(IndexedGenerator):
    """An IndexedGenerator whose draws are the same, and kept: ``normals`` and ``uniforms``, each float64 (B, size)."""

    def __init__(self, seed: int, purpose: str, index: Tensor):
        super().__init__(seed, purpose, index)
        self.normals: list[Tensor] = []
        self.uniforms: list[Tensor] = []

    def normal(self, shape, device=None, dtype=None) -> Tensor:
        values = super().normal(shape, device, dtype)
        self.normals.append(values.flatten(1).double())
        return values

    def uniform(self, shape, device=None, dtype=None) -> Tensor:
        values = super().uniform(shape, device, dtype)
        self.uniforms.append(values.reshape(len(values), -1).double())
        return values


def variates(source: Recorder, basis: Tensor, d: Tensor, cross: bool = False) -> Tensor:
    """Functions (B, P) of the recorded draws with mean zero given the data.

    For each normal draw n, in the axes ``basis``, (D, D) or each row's own (B, D, D): n_i, n_i^2 - 1 and n_i d_i, with
    ``d`` (B, D) the standardised data; and, if ``cross``, n_i n_j and n_i d_j, i != j. For each uniform number
    v = u - 1/2 an image: v, v^2 - 1/12 and v times all of the former, since a shifted grid of times moves every
    coefficient. For a vector of uniforms, from which signs are made: the products of two signs.
    """
    normals = [values for n in source.normals for values in _powers(_turned(n, basis), d, cross)]
    columns, shifts = list(normals), [u - 0.5 for u in source.uniforms if u.shape[1] == 1]
    for v in shifts:
        columns += [v, v.square() - 1 / 12, *(v * values for values in normals)]
    for u in source.uniforms:
        if u.shape[1] > 1:
            signs = torch.where(u >= 0.5, 1.0, -1.0)
            i, j = torch.triu_indices(u.shape[1], u.shape[1], 1)
            columns.append(signs[:, i] * signs[:, j])
    return torch.cat(columns, 1) if columns else d.new_zeros(len(d), 0)


def _turned(n: Tensor, basis: Tensor) -> Tensor:
    return n @ basis if basis.dim() == 2 else torch.einsum("bi,bij->bj", n, basis)


def _powers(n: Tensor, d: Tensor, cross: bool) -> list[Tensor]:
    if not cross:
        return [n, n.square() - 1, n * d]
    i, j = torch.triu_indices(n.shape[1], n.shape[1], 1)
    return [n, n.square() - 1, n[:, i] * n[:, j], (n[:, :, None] * d[:, None, :]).flatten(1)]


def controlled_mean(values: Tensor, covariates: Tensor | None = None) -> tuple[float, float]:
    """(mean, standard error) of ``values`` (B,), adjusted for ``covariates`` (B, P) of known mean zero.

    The intercept of a least-squares fit, by its normal equations; its bias is of the order of P / B standard errors.
    """
    design = torch.ones(len(values), 1, dtype=values.dtype)
    if covariates is not None:
        design = torch.cat([design, covariates], 1)
    root = torch.linalg.cholesky(design.T @ design)
    fit = torch.cholesky_solve((design.T @ values)[:, None], root)[:, 0]
    variance = float((values - design @ fit).square().sum()) / (len(values) - design.shape[1])
    first = torch.zeros(design.shape[1], 1, dtype=values.dtype)
    first[0] = 1
    leverage = float(torch.cholesky_solve(first, root)[0])
    return float(fit[0]), math.sqrt(variance * leverage)
