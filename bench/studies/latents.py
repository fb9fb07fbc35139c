"""Study: what the flow does to the law of the data, and how far from Gaussian the diffusion's two ends are.

One row a quantity, at time 0 (z_0 = h(x)) and at time 1 (z_1 = alpha z_0 + sigma n). Moments of z_1 follow exactly from
those of z_0 (cumulants of independent sums add), so no noise is drawn for them.

- mean_norm: |E z| / sqrt(D); variance: mean over dimensions;
- eigenvalue_spread: standard deviation of the logarithms of the covariance's eigenvalues (finite n widens it);
- skewness, excess_kurtosis: mean over dimensions of their absolute values; Gaussian points of n images would show about
  sqrt(2 / pi) sqrt(6 / n) and sqrt(2 / pi) sqrt(24 / n) at time 0;
- kl_gaussian: KL(law of z || Gaussian of its mean and covariance), the negentropy, nats an image. The entropy of z_0 is
  that of x plus E log|det dh/dx|; that of x is known, or is estimated from all the data's points by nearest neighbours;
- kl_gaussian_change: kl_gaussian of z_0 minus that of x, which needs no entropy: positive where the flow moves the data
  away from Gaussian, 0 for the identity;
- kl_prior: KL(Gaussian of z_1's mean and covariance || prior). With kl_gaussian it sums to KL(law of z_1 || prior).

Divergences have their bias of order 1/n removed, so that they may fall below zero by their error.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bench.data import Dataset
from bench.studies import Context
from bench.studies.entropy import (
    NEIGHBOUR_DIMS,
    covariance,
    divergence_from_isotropic,
    gaussian_entropy,
    neighbour_entropy,
    smoothed_negentropy,
)
from bench.studies.resampling import Estimate, jackknife, mean_and_error
from models.indm import INDM
from models.noise import IndexedGenerator
from models.options import Count

COLUMNS = ("time", "quantity", "value", "se", "n", "status")
MOMENTS = ("mean_norm", "variance", "skewness", "excess_kurtosis", "eigenvalue_spread")
QUANTITIES = {0: (*MOMENTS, "kl_gaussian", "kl_gaussian_change"), 1: (*MOMENTS, "kl_gaussian", "kl_prior")}
NEEDS_COVARIANCE = ("eigenvalue_spread", "kl_gaussian_change", "kl_prior")


def measure(
    context: Context,
    *,
    images: Count | None = None,
    groups: Annotated[int, Field(ge=2)] = 20,
    batch_size: Count = 256,
) -> list[dict[str, Any]]:
    """Rows of latents.csv. ``images``: test images used (null: all); ``groups``: of the jackknife over images."""
    model = context.model
    if not isinstance(model, INDM):
        return _undefined("the model has no flow before a linear diffusion", 0)
    x = context.points(images)
    n = len(x)
    if n < groups:
        return _undefined(f"{n} images are fewer than {groups}, the groups of the jackknife", n)
    z, log_det = encode(model, x, context.run.seed, batch_size)
    # what the model's own number type leaves of a mean log-determinant
    rounding = torch.finfo(x.dtype).eps * abs(float(log_det.mean()))
    if not bool(torch.isfinite(z).all() and torch.isfinite(log_det).all()):
        return _undefined("the flow's latents are not all finite", n)

    enough = n - -(-n // groups) > x[0].numel() + 1
    ends = [float(v) for v in model.sde.marginal(torch.ones((), dtype=torch.float64))]
    found = _estimates(x.flatten(1).double(), z, log_det, *ends, model.sde.prior_std, groups, enough)
    rows = []
    for time, quantities in QUANTITIES.items():
        for name in quantities:
            if name == "kl_gaussian":
                continue
            if name in NEEDS_COVARIANCE and not enough:
                rows.append(_row(time, name, n, f"{n} images do not determine a covariance of {z.shape[1]} dimensions"))
                continue
            estimate = found[f"{name} {time}"]
            value = estimate.corrected if name.startswith("kl") else estimate.value
            se = max(estimate.se, rounding) if name == "kl_gaussian_change" else estimate.se
            rows.append(_row(time, name, n, value=value, se=se))
    rows.append(_start(context, found, n, enough, x))
    rows.append(_end(context, z, *ends))
    order = [(time, name) for time, names in QUANTITIES.items() for name in names]
    return sorted(rows, key=lambda row: order.index((row["time"], row["quantity"])))


def encode(model: INDM, x: Tensor, seed: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """(z_0 (n, D), log|det dz_0/dx| (n,)) of x (n, *shape), float64."""
    pieces = []
    with torch.no_grad():
        for rows in torch.arange(len(x), device=x.device).split(batch_size):
            pieces.append(model.encode(x[rows], IndexedGenerator(seed, "latents flow", rows)))
    z, log_det = (torch.cat(parts).double() for parts in zip(*pieces, strict=True))
    return z.flatten(1), log_det


def _estimates(
    x: Tensor, z: Tensor, log_det: Tensor, alpha: float, sigma: float, prior_std: float, groups: int, enough: bool
) -> dict[str, Estimate]:
    """Every statistic of the moments, named "<quantity> <time>"; without those of a covariance if it is singular."""

    def statistic(rows: Tensor) -> dict[str, float]:
        rows = rows.to(z.device)
        chosen = z[rows]
        mean, centred = chosen.mean(0), chosen - chosen.mean(0)
        # n - 1 for the variance; the bias of the higher cumulants is far below their error
        variance = centred.square().sum(0) / (len(rows) - 1)
        third = centred.pow(3).mean(0)
        fourth = centred.pow(4).mean(0) - 3 * centred.square().mean(0).square()
        values = torch.linalg.eigvalsh(covariance(chosen)) if enough else None
        numbers = {}
        for time, a, s in ((0, 1.0, 0.0), (1, alpha, sigma)):
            spread = a**2 * variance + s**2
            numbers[f"mean_norm {time}"] = a * float(mean.square().mean().sqrt())
            numbers[f"variance {time}"] = float(spread.mean())
            numbers[f"skewness {time}"] = float((a**3 * third / spread.pow(1.5)).abs().mean())
            numbers[f"excess_kurtosis {time}"] = float((a**4 * fourth / spread.square()).abs().mean())
            if values is not None:
                logs = (a**2 * values + s**2).log()
                numbers[f"eigenvalue_spread {time}"] = float((logs - logs.mean()).square().mean().sqrt())
        if values is not None:
            end = divergence_from_isotropic(alpha * mean, alpha**2 * values + sigma**2, prior_std)
            entropy, change = gaussian_entropy(chosen), float(log_det[rows].mean())
            numbers["kl_prior 1"] = end
            numbers["above the data's entropy"] = entropy - change
            numbers["kl_gaussian_change 0"] = entropy - gaussian_entropy(x[rows]) - change
        return numbers

    return jackknife(statistic, len(z), groups)


def _start(context: Context, found: dict[str, Estimate], n: int, enough: bool, x: Tensor) -> dict[str, Any]:
    """The negentropy of z_0, where the entropy of the data can be had."""
    if not enough:
        return _row(0, "kl_gaussian", n, f"{n} images do not determine a covariance of {x[0].numel()} dimensions")
    try:
        entropy, error = data_entropy(context.data)
    except ValueError as reason:
        return _row(0, "kl_gaussian", n, str(reason))
    estimate = found["above the data's entropy"]
    return _row(0, "kl_gaussian", n, value=estimate.corrected - entropy, se=math.hypot(estimate.se, error))


def data_entropy(data: Dataset) -> tuple[float, float]:
    """(differential entropy of the data, standard error), nats: from the density over train and test, or by neighbours.

    Raises ValueError with the reason where neither can be had.
    """
    points = torch.cat([data.train, data.test])
    if data.log_prob is None:
        if data.levels is not None or math.prod(data.shape) > NEIGHBOUR_DIMS:
            raise ValueError("the entropy of the data is not known")
        return neighbour_entropy(points.flatten(1).double())
    values = -data.log_prob(points).double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("some points lie outside the support of the density")
    return mean_and_error(values)


def _end(context: Context, z: Tensor, alpha: float, sigma: float) -> dict[str, Any]:
    source = IndexedGenerator(context.run.seed, "latents noise", torch.arange(len(z), device=z.device))
    noise = source.normal(z.shape, z.device, torch.float64)
    value, se = mean_and_error(smoothed_negentropy(alpha * z, sigma, noise))
    return _row(1, "kl_gaussian", len(z), value=value, se=se)


def _row(
    time: int, quantity: str, n: int, reason: str | None = None, value: float | None = None, se: float | None = None
) -> dict[str, Any]:
    if reason is None and not (math.isfinite(value) and math.isfinite(se)):
        reason, value, se = f"not finite: value {value}, se {se}", None, None
    status = "ok" if reason is None else f"not defined: {reason.removeprefix('not defined: ')}"
    return {"time": time, "quantity": quantity, "value": value, "se": se, "n": n, "status": status}


def _undefined(reason: str, n: int) -> list[dict[str, Any]]:
    return [_row(time, name, n, reason) for time, names in QUANTITIES.items() for name in names]
