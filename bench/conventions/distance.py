"""The distance of two versions of the same samples to the data, with the standard error of the difference.

The versions are paired, so that the error of the difference follows from each sample's influence on the distance: its
derivative with respect to the sample's weight.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bench.conventions.case import Array, Case, Row, row_of, standard_error
from bench.data import quantise
from bench.distances import energy_distance
from models.base import NotDefined

QUANTITY = "sample distance"


def compare_samples(case: Case, right: Tensor, official: Tensor) -> Row:
    """:func:`compare` of samples x (n, *shape), images as pixels."""
    for x in (right, official):
        if not bool(torch.isfinite(x).all()):
            raise NotDefined("a sample is not finite")
    if case.levels is None:
        return compare(case, right, official)
    return compare(case, quantise(right, case.levels), quantise(official, case.levels))


def compare(case: Case, right: Tensor, official: Tensor) -> Row:
    """Row of the energy distance of points (n, d), or of the Frechet distance of images uint8 (n, C, H, W)."""
    data = case.context.data
    if case.levels is None:
        name = "energy distance"
        values = [energy_distance(x.cpu(), data.test) for x in (right, official)]
        influence = [energy_influence(x.cpu(), data.test) for x in (right, official)]
    else:
        name, features = "Frechet distance", extractor(case)
        target = features(data.train)
        found = [frechet(features(x.cpu()), target) for x in (right, official)]
        values, influence = zip(*found)
    return row_of(QUANTITY, name, *values, len(right), standard_error(influence[1] - influence[0]))


def energy_influence(x: Tensor, y: Tensor) -> Array:
    """Influence (n,) of each point of x (n, d) on the energy distance to y: 2 (2 E|x_i - Y| - E|x_i - X'|), centred."""
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    between = torch.cat([torch.cdist(part, y, **exact).double().mean(1) for part in x.split(1024)])
    within = torch.cat([torch.cdist(part, x, **exact).double().sum(1) for part in x.split(1024)]) / (len(x) - 1)
    influence = 2 * (between - within)
    return (influence - influence.mean()).numpy()


def extractor(case: Case) -> Callable[[Tensor], Array]:
    """Function from uint8 images to features, float64 (n, K): the suite's classifier."""
    run = case.context.run
    if run.evaluate.features != "classifier":
        raise NotDefined("paired distances are taken with a classifier's features only")
    from bench.features import FEATURE_LAYER, load_extractor

    features = load_extractor(run.features_file)
    network = features(features.extractor_name, [FEATURE_LAYER])

    @torch.no_grad()
    def extract(images: Tensor) -> Array:
        return torch.cat([network(part)[0] for part in images.split(1024)]).double().numpy()

    return extract


def frechet(a: Array, b: Array) -> tuple[float, Array]:
    """Frechet distance of Gaussians fitted to features a (n, K) and b (m, K), and the influence (n,) of each row of a.

    d = |mu_a - mu_b|^2 + tr(A + B - 2 (B^1/2 A B^1/2)^1/2); its derivatives are 2 (mu_a - mu_b) with respect to mu_a
    and I - T with respect to A, where T = B^1/2 (B^1/2 A B^1/2)^-1/2 B^1/2 is the optimal map from A to B.
    """
    if min(len(a), len(b)) <= a.shape[1]:
        raise NotDefined(f"{min(len(a), len(b))} images for {a.shape[1]} feature dimensions")
    gap = a.mean(0) - b.mean(0)
    first, second = (np.cov(features, rowvar=False) for features in (a, b))
    root = _power(second, 0.5)
    inner = root @ first @ root
    value = gap @ gap + np.trace(first) + np.trace(second) - 2 * np.trace(_power(inner, 0.5))
    slope = np.eye(len(gap)) - root @ _power(inner, -0.5) @ root
    centred = a - a.mean(0)
    influence = 2 * centred @ gap + np.einsum("ni,ij,nj->n", centred, slope, centred)
    return float(value), influence - influence.mean()


def _power(matrix: Array, exponent: float) -> Array:
    """Power of a symmetric matrix without negative eigenvalues; those that rounding made nought are left out."""
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    kept = values > 1e-12 * values[-1]
    return (vectors[:, kept] * values[kept] ** exponent) @ vectors[:, kept].T
