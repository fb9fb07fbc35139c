"""Standard errors without random numbers: the delete-a-group jackknife (Efron and Stein 1981; Kott 2001)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A statistic of the whole sample, the same with its bias of order 1/n removed, and its standard error."""

    value: float
    corrected: float
    se: float


def kept_rows(n: int, groups: int) -> list[Tensor]:
    """For each of ``groups`` interleaved groups of n rows the indices of all other rows."""
    if not 2 <= groups <= n:
        raise ValueError(f"groups = {groups}: must be from 2 to {n}, the number of rows")
    place = torch.arange(n)
    return [place[place % groups != g] for g in range(groups)]


def combine(whole: float, without: Tensor) -> Estimate:
    """The jackknife from a statistic of the whole and of the sample ``without`` each group (G,)."""
    groups, without = len(without), without.double()
    centre = float(without.mean())
    se = math.sqrt((groups - 1) / groups * float((without - centre).square().sum()))
    # whole - (G - 1) (centre - whole): exactly the whole where leaving a group out changes nothing
    return Estimate(float(whole), float(whole) - (groups - 1) * (centre - float(whole)), se)


def jackknife(statistic: Callable[[Tensor], Mapping[str, float]], n: int, groups: int) -> dict[str, Estimate]:
    """``statistic(rows)`` -> named numbers of the rows with these indices; here each with bias and error.

    For a smooth statistic the error is consistent whatever the rows' law; with G groups its own relative error is
    about 1 / sqrt(2 G). Raises ValueError where ``groups`` does not lie between 2 and n.
    """
    parts = [statistic(rows) for rows in kept_rows(n, groups)]
    whole = statistic(torch.arange(n))
    return {
        name: combine(value, torch.tensor([part[name] for part in parts], dtype=torch.float64))
        for name, value in whole.items()
    }


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of independent ``values`` (n,), n > 1, and its standard error."""
    values = values.double()
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))
