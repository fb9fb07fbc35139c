"""A model's bounds over a test set: bits/dim in named parts, standard errors, per-image values kept.

Every draw for test image i is a function of (seed, purpose, i): neither batch size nor process count changes a value.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.data import Dataset, bits_per_dim, dequantise
from models.base import Model
from models.noise import IndexedGenerator

OFFSET = "dequantisation"


def test_points(data: Dataset, count: int | None, seed: int) -> Tensor:
    """The first ``count`` test samples as model variables x: images dequantised by their index, points as they are."""
    images = data.test if count is None else data.test[:count]
    if data.levels is None:
        return images
    source = IndexedGenerator(seed, "dequantise test", torch.arange(len(images)))
    return dequantise(images, source.uniform(images.shape), data.levels)


class Units:
    """From nats an image to the suite's unit: bits/dim for discrete data, nats for continuous data."""

    def __init__(self, data: Dataset):
        self.dims, self.levels = math.prod(data.shape), data.levels
        self.name = "nats" if data.levels is None else "bits/dim"
        self.offset = 0.0 if data.levels is None else bits_per_dim(0.0, self.dims, data.levels)

    def part(self, nats):
        """A difference or a part: scaled, without the offset."""
        return nats if self.levels is None else nats / (self.dims * math.log(2))

    def total(self, nats):
        """A whole likelihood: scaled, with the dequantisation offset."""
        return self.part(nats) + self.offset


def _batched(function, x: Tensor, batch_size: int, device, seed: int, purpose: str) -> dict[str, np.ndarray]:
    pieces: dict[str, list[np.ndarray]] = {}
    for first in range(0, len(x), batch_size):
        rows = torch.arange(first, min(first + batch_size, len(x)))
        parts = function(x[rows].to(device), IndexedGenerator(seed, purpose, rows))
        for name, value in parts.items():
            pieces.setdefault(name, []).append(value.double().cpu().numpy())
    return {name: np.concatenate(values) for name, values in pieces.items()}


def nelbo_per_image(
    model: Model, x: Tensor, repeats: int, times: int, batch_size: int, seed: int, device="cpu"
) -> list[dict[str, np.ndarray]]:
    """For each independent repeat the bound's parts, nats (n,)."""
    return [
        _batched(
            lambda rows, source: model.nelbo_parts(rows, times=times, generator=source),
            x,
            batch_size,
            device,
            seed,
            f"nelbo {repeat}",
        )
        for repeat in range(repeats)
    ]


def nll_per_image(
    model: Model, x: Tensor, batch_size: int, seed: int, device="cpu", **options: Any
) -> dict[str, np.ndarray]:
    """The ODE likelihood's parts, nats (n,), and nfe (n,)."""
    return _batched(
        lambda rows, source: model.nll_parts(rows, generator=source, **options), x, batch_size, device, seed, "nll"
    )


def total_nats(parts: dict[str, np.ndarray], residual: bool = True) -> np.ndarray:
    """Sum of the parts; without the residual at eps where ``residual`` is False."""
    skip = {"nfe"} if residual else {"nfe", "reconstruction"}
    return sum(value for name, value in parts.items() if name not in skip)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def summary(parts: dict[str, np.ndarray], units: Units, residual: bool = True) -> dict[str, Any]:
    """{"total", "se_images", "parts"} in the suite's unit; the parts sum to the total."""
    nats = total_nats(parts, residual)
    names = [name for name in parts if name != "nfe" and (residual or name != "reconstruction")]
    named = {name: float(units.part(parts[name].mean())) for name in names}
    if units.levels is not None:
        named[OFFSET] = units.offset
    return {
        "total": float(units.total(nats.mean())),
        "se_images": float(units.part(_standard_error(nats))),
        "parts": named,
    }


def measure(
    model: Model, data: Dataset, settings, seed: int, device="cpu"
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record of ``likelihood.json`` (without its header) and the arrays of ``per_image.npz``.

    ``settings``: an EvaluateConfig. The NELBO and the NLL are evaluated on the same dequantised test images, so that
    their difference is paired by image.
    """
    units = Units(data)
    x = test_points(data, settings.images, seed)
    repeats = nelbo_per_image(model, x, settings.nelbo_repeats, settings.nelbo_times, settings.batch_size, seed, device)
    mean = {name: np.mean([r[name] for r in repeats], axis=0) for name in repeats[0]}
    options = {"rtol": settings.rtol, "atol": settings.atol, "probes": settings.probes}
    right = nll_per_image(model, x, settings.batch_size, seed, device, corrected=True, **options)
    clean = nll_per_image(model, x, settings.batch_size, seed, device, corrected=False, **options)

    few = min(32, len(x))
    options |= {"rtol": settings.rtol / 2, "atol": settings.atol / 2}
    halved = nll_per_image(model, x[:few], settings.batch_size, seed, device, corrected=True, **options)
    change = float(units.part((total_nats(halved) - total_nats(right)[:few]).mean()))

    bound: dict[str, Any] = {"repeats": settings.nelbo_repeats, "times": settings.nelbo_times}
    gap: dict[str, Any] = {}
    ode = {
        "solver": "dormand-prince 5(4) in log(sigma/alpha), step control per image",
        "rtol": settings.rtol,
        "atol": settings.atol,
        "probes": settings.probes,
        "nfe_mean": float(right["nfe"].mean()),
        "nfe_max": int(right["nfe"].max()),
        "tolerance_check": {"n": few, "change": change},
    }
    for name, residual, other in (("corrected", True, right), ("uncorrected", False, clean)):
        means = [units.total(total_nats(r, residual).mean()) for r in repeats]
        bound[name] = summary(mean, units, residual) | {"se_repeats": _standard_error(np.array(means))}
        ode[name] = summary(other, units, residual)
        difference = total_nats(mean, residual) - total_nats(other, residual)
        gap[name] = {
            "total": float(units.part(difference.mean())),
            "se": float(units.part(_standard_error(difference))),
        }
    truth = None
    if data.log_prob is not None:
        exact = -data.log_prob(x).double().numpy()
        truth = {"nll": float(exact.mean()), "se_images": _standard_error(exact)}
    record = {
        "units": units.name,
        "dims": units.dims,
        "levels": units.levels,
        "data": data.describe(),
        "n": len(x),
        "nelbo": bound,
        "nll": ode,
        "gap": gap,
        "truth": truth,
    }
    arrays = {
        "nelbo": total_nats(mean),
        "nelbo_uncorrected": total_nats(mean, False),
        "nll": total_nats(right),
        "nll_uncorrected": total_nats(clean, False),
        "nfe": right["nfe"].astype(np.int64),
        "index": np.arange(len(x)),
    }
    return record, arrays
