"""What the three studies share: how much they measure, what a row is, what a study is, and their random numbers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.estimators.problems import SEED
from models.noise import IndexedGenerator

COMMON = ("work", "efficiency", "efficiency_se", "status")


@dataclass(frozen=True)
class Budget:
    """How much is measured. ``times``: divisors of the largest; counts are per image and setting."""

    images: int = 12
    times: tuple[int, ...] = (1, 4, 16, 64)
    repeats: int = 48
    repeats_trained: int = 6
    probes: tuple[int, ...] = (1, 2, 4, 8, 16)
    probes_trained: tuple[int, ...] = (1, 4)
    probe_images_trained: int = 3
    ode_images_trained: int = 2
    nodes: int = 8
    depths: tuple[int, ...] = (0, 1, 2, 5, 10, 20)
    series_repeats: int = 160
    series_repeats_trained: int = 16


@dataclass
class Measured:
    """A row of a table (``values``), the variance of each image's value (I,) and what a value costs.

    ``candidate``: unbiased and of finite variance, so that its ``options`` may be chosen.
    """

    values: dict[str, Any]
    variance: Tensor | None = None
    cost: float = 0.0
    trained: bool = False
    candidate: bool = True
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """One study: its table, its options' defaults in the code, and what rows are compared on.

    ``same``: the columns, a budget and no option, that a row and its default must share; ``reference``: their values
    where the options are chosen.
    """

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    defaults: dict[str, Any]
    same: tuple[str, ...]
    reference: dict[str, Any]
    measure: Callable[[Any, Budget, Any], list[Measured]]
    units: Callable[[Budget], int]


def default_options(function: Callable, *names: str) -> dict[str, Any]:
    """The defaults of a function's parameters: what the code does where nothing is said."""
    parameters = inspect.signature(function).parameters
    return {name: parameters[name].default for name in names}


def copies(x: Tensor, count: int) -> Tensor:
    """Each sample ``count`` times in a row."""
    return x.repeat_interleave(count, 0)


def source(purpose: str, count: int) -> IndexedGenerator:
    """The random numbers of ``count`` samples for one purpose."""
    return IndexedGenerator(SEED, f"estimators {purpose}", torch.arange(count))


def moments(variance: Tensor, cost: float) -> dict[str, float]:
    """{"sd", "work"} of the mean over images of ``variance`` (I,): its root, and its product with the cost."""
    mean = float(variance.mean())
    return {"sd": math.sqrt(mean), "work": mean * cost}
