"""Conventions between grey levels and the model's real numbers, in both directions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.conventions.case import Case, Row, row_of, standard_error
from bench.conventions.distance import compare
from bench.data import quantise
from models.base import NotDefined


def _levels(case: Case) -> int:
    if case.levels is None:
        raise NotDefined("the data are points without grey levels")
    return case.levels


def un_dequantised(case: Case) -> Iterator[Row]:
    """The test images as 2 k / (levels - 1) - 1, their own grey levels k, with the offset of the dequantised ones."""
    levels = _levels(case)
    images = case.context.data.test[: len(case.x)].to(case.x)
    x = 2 * images / (levels - 1) - 1
    yield case.likelihood_row("NELBO", case.right_nelbo, case.nelbo(x=x))
    yield case.likelihood_row("NLL", case.right_nll, case.nll(x))


def truncate(x: Tensor, levels: int) -> Tensor:
    """uint8 integer part of (levels - 1) (x + 1) / 2 after clipping; 255 x in [0, 1] for 256 levels."""
    return ((levels - 1) * (x + 1) / 2).clamp(0, levels - 1).to(torch.uint8)


def truncation_shift(images: Tensor, levels: int) -> Tensor:
    """Mean of truncate(dequantise(k, u)) - k over u ~ U[0, 1), of the shape of ``images``: -k / (levels - 1).

    (levels - 1) (k + u) / levels = k + u - (k + u) / levels lies below k where u < k / (levels - 1), and never below
    k - 1: the top level is always lost, the bottom one never.
    """
    return -images.double() / (levels - 1)


def truncation(case: Case) -> Iterator[Row]:
    """Pixels of dequantised data, of samples, and the samples' distance, by truncation against quantise."""
    levels = _levels(case)
    for quantity, x in (("mean level of data", case.x), ("mean level of samples", case.right_samples)):
        if not bool(torch.isfinite(x).all()):
            raise NotDefined("a sample is not finite")
        right, official = quantise(x, levels), truncate(x, levels)
        means = [image.double().flatten(1).mean(1).cpu().numpy() for image in (right, official)]
        row = row_of(
            quantity, "grey levels", means[0].mean(), means[1].mean(), len(x), standard_error(means[1] - means[0])
        )
        if x is case.x:
            shift = truncation_shift(right, levels).flatten(1).mean(1).cpu().numpy()
            row |= {"closed_form": shift.mean(), "closed_form_se": standard_error(means[1] - means[0] - shift)}
        yield row
    x = case.right_samples
    yield compare(case, quantise(x, levels), truncate(x, levels))
