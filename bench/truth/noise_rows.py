"""Moments of the random numbers. The control variates of ``estimates`` take them for granted, so they are checked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.truth.rows import Case, Row
from models.noise import IndexedGenerator

NOISE = "random numbers"


def noise_rows(count: int = 50_000) -> list[Row]:
    """Means of functions whose expectation is known, over samples, coordinates and draws, within 3 standard errors."""
    source = IndexedGenerator(0, "moments", torch.arange(count))
    n = torch.stack([source.normal((count, 5), dtype=torch.float64) for _ in range(6)])
    u = torch.stack([source.uniform((count, 5), dtype=torch.float64) for _ in range(2)])
    signs = source.rademacher((count, 4), dtype=torch.float64)
    known: dict[str, tuple[Tensor, float]] = {
        "normal, mean": (n, 0.0),
        "normal, variance": (n.square(), 1.0),
        "normal, fourth moment": (n**4, 3.0),
        "normal, two coordinates": (n[..., 0] * n[..., 3], 0.0),
        "normal, two draws": (n[0] * n[1], 0.0),
        "normal, two samples": (n[:, :-1] * n[:, 1:], 0.0),
        "uniform, mean": (u, 0.5),
        "uniform, second moment": (u.square(), 1 / 3),
        "signs, mean": (signs, 0.0),
        "signs, two coordinates": (signs[:, 0] * signs[:, 1], 0.0),
    }
    rows = []
    for name, (values, truth) in known.items():
        se = float(values.std()) / math.sqrt(values.numel())
        rows.append(Case(NOISE, "moments").row(name, values.mean(), truth, se, floor=0.0, unit="moment"))
    return rows
