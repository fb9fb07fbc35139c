"""Likelihoods that need no training: what any model of a data set has to beat."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.data import Dataset, bits_per_dim

LARGEST = 4096  # dimensions whose covariance matrix is still worth a laptop's memory
CHUNK = 4096


def gaussian_nll(data: Dataset) -> float | None:
    """Test NLL of the Gaussian with the training set's mean and full covariance: bits/dim, or nats for points.

    Images are dequantised uniformly; both the fit and the test's mean over the dequantisation noise are exact, so the
    number has no randomness: u of width w = 2 / levels adds w^2 / 12 to the covariance and tr(precision) w^2 / 12 to
    the expected square. None where the covariance is singular or has more than ``LARGEST`` dimensions.
    """
    dims = math.prod(data.shape)
    if dims > LARGEST:
        return None
    noise = 0.0 if data.levels is None else (2.0 / data.levels) ** 2 / 12
    mean = sum(part.sum(0) for part in _centres(data, data.train)) / len(data.train)
    scatter = sum((part - mean).T @ (part - mean) for part in _centres(data, data.train))
    covariance = scatter / len(data.train) + noise * torch.eye(dims, dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or not bool(torch.isfinite(factor).all()):
        return None
    precision = torch.cholesky_inverse(factor)
    square = sum(float((((part - mean) @ precision) * (part - mean)).sum()) for part in _centres(data, data.test))
    square = square / len(data.test) + noise * float(precision.diagonal().sum())
    nats = 0.5 * (square + dims * math.log(2 * math.pi)) + float(factor.diagonal().log().sum())
    return nats if data.levels is None else bits_per_dim(nats, dims, data.levels)


def _centres(data: Dataset, items: Tensor) -> list[Tensor]:
    """Items as rows in float64, in parts: points as they are, pixels at the middle of their level in [-1, 1)."""
    parts = items.flatten(1).split(CHUNK)
    if data.levels is None:
        return [part.double() for part in parts]
    return [(part.double() + 0.5) * (2.0 / data.levels) - 1.0 for part in parts]
