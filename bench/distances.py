"""Distances between two samples of points, without a feature extractor: sliced Wasserstein and energy distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.errors import InputError


def _check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise InputError(f"samples: shapes {tuple(x.shape)} and {tuple(y.shape)} are not (n, d) and (m, d)")
    for name, values in (("first", x), ("second", y)):
        if not torch.isfinite(values).all():
            raise InputError(f"samples: the {name} sample holds values that are not finite")


def _directions(dims: int, count: int, seed: int) -> Tensor:
    """Unit directions (dims, count), float64: equally spaced in the plane, random from ``seed`` above.

    In the plane the average over directions is a smooth periodic integral, for which equal spacing beats random
    directions.
    """
    if dims == 2:
        angle = (torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / count)
        return torch.stack([angle.cos(), angle.sin()])
    normal = torch.randn(dims, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normal / normal.norm(dim=0, keepdim=True)


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 128, order: int = 2, seed: int = 0) -> float:
    """Sliced Wasserstein distance (Bonneel et al. 2015): (mean over directions of W_p^p)^(1/p), in the data's unit.

    ``x`` and ``y`` are (n, d) with the same n: sorted projections give each one-dimensional problem its exact solution.
    Biased upwards for finite n (about n**-1/2), so compare equal n only. Raises InputError for unequal n, another
    order, or values that are not finite.
    """
    _check(x, y)
    if len(x) != len(y) or len(x) == 0:
        raise InputError(f"samples: sliced Wasserstein needs two samples of one size, got {len(x)} and {len(y)}")
    if order not in (1, 2):
        raise InputError(f"order: {order} is not accepted; use 1 or 2")
    if projections < 1:
        raise InputError(f"projections: {projections} is not accepted; use at least 1")
    directions = _directions(x.shape[1], projections, seed).to(x.device, x.dtype)
    # (projections, n): sorting along the contiguous axis is several times faster
    difference = (x @ directions).T.contiguous().sort(dim=1).values - (y @ directions).T.contiguous().sort(dim=1).values
    return float(difference.double().abs().pow(order).mean() ** (1 / order))


def _sum_between(x: Tensor, y: Tensor, chunk: int) -> float:
    total = 0.0
    for part in x.split(chunk):
        # the matrix-product shortcut loses the digits of short distances
        rows = torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)
        total += float(rows.sum(dtype=torch.float64))
    return total


def _sum_within(x: Tensor, chunk: int) -> float:
    """Sum of |x_i - x_j| over ordered pairs i != j, each unordered block of the matrix computed once."""
    total = 0.0
    for start in range(0, len(x), chunk):
        part = x[start : start + chunk]
        total += _sum_between(part, part, chunk)
        total += 2 * _sum_between(part, x[start + chunk :], chunk)
    return total


def energy_distance(x: Tensor, y: Tensor, chunk: int = 1024) -> float:
    """Energy distance 2 E|X-Y| - E|X-X'| - E|Y-Y'| (Szekely and Rizzo 2013), the *squared* form: no root.

    ``x`` (n, d), ``y`` (m, d). Exact over all pairs, O(nm), chunked in memory; the within terms leave out i = j
    (U-statistic), so the estimate is unbiased and may be slightly negative when the distributions agree. A sample of
    one point has within term 0. Raises InputError for an empty sample, mismatched dimensions, or values that are not
    finite.
    """
    _check(x, y)
    n, m = len(x), len(y)
    if n == 0 or m == 0:
        raise InputError(f"samples: energy distance needs at least one point each, got {n} and {m}")
    between = _sum_between(x, y, chunk) / (n * m)
    within_x = _sum_within(x, chunk) / (n * (n - 1)) if n > 1 else 0.0
    within_y = _sum_within(y, chunk) / (m * (m - 1)) if m > 1 else 0.0
    return 2 * between - within_x - within_y
