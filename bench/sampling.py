"""n samples by index from a model and a sampler's name, network evaluations counted.

The prior draw and the noise of sample i are functions of (seed, i): a batch of 3 and one of 5 equal a batch of 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.batches import SECONDS, Work
from bench.data import Dataset, dequantise
from models.base import Model
from models.indm import mean_latent
from models.noise import IndexedGenerator


@dataclass(frozen=True)
class Samples:
    """Samples x (n, ...) on the CPU in the order of their indices, whether each is ``finite`` (n,), and their cost.

    ``nfe``: network evaluations a sample; ``seconds``: of sampling alone, summed over the processes that shared it.
    """

    x: Tensor
    finite: Tensor
    nfe: float
    seconds: float


def draw_samples(
    model: Model,
    n: int,
    sampler: str,
    steps: int,
    seed: int,
    batch_size: int = 256,
    first: int = 0,
    work: Work | None = None,
    name: str = "sample",
    quantity: str | None = None,
    finish: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> Samples:
    """The samples first..first+n-1. ``finish`` turns a batch of finite samples on the CPU into what is kept of it.

    ``name`` tells the kept pieces of ``work`` apart, ``quantity`` is their entry of its progress line. Several
    processes share the batches, and all get all samples.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def batch(rows: range) -> dict[str, np.ndarray]:
        source = IndexedGenerator(seed, "sample", torch.arange(rows.start, rows.stop, device=device))
        x = model.sample(len(rows), steps=steps, sampler=sampler, generator=source, **options).cpu()
        finite = torch.isfinite(x).flatten(1).all(1)
        if finish is not None:
            x = finish(x.nan_to_num(0.0, 0.0, 0.0))
        return {"x": x.detach().numpy(), "finite": finite.numpy(), "nfe": np.array(float(model.nfe))}

    pieces = (work or Work()).batches(name, n, batch_size, batch, first, quantity)
    nfe, seconds = 0.0, 0.0
    for piece in pieces:
        nfe += float(piece["nfe"]) * len(piece["x"])
        seconds += float(piece[SECONDS])
    x, finite = (torch.cat([torch.from_numpy(piece[key]) for piece in pieces]) for key in ("x", "finite"))
    return Samples(x, finite, nfe / n, seconds)


def draw(
    model: Model, n: int, sampler: str, steps: int, seed: int, batch_size: int = 256, first: int = 0, **options: Any
) -> tuple[Tensor, float, float]:
    """(x (n, *shape) on the CPU, NFE a sample, seconds) for the samples first..first+n-1."""
    drawn = draw_samples(model, n, sampler, steps, seed, batch_size, first, **options)
    return drawn.x, drawn.nfe, drawn.seconds


def training_mean(model: Model, data: Dataset, seed: int, batch_size: int = 256) -> Tensor:
    """Mean latent at t = 1 over the training images, each dequantised once (*shape): the samplers' ``data_mean``."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def batches() -> Iterator[tuple[Tensor, IndexedGenerator]]:
        for rows in torch.arange(len(data.train)).split(batch_size):
            source, x = IndexedGenerator(seed, "data mean", rows), data.train[rows]
            if data.levels is not None:
                x = dequantise(x, source.uniform(x.shape), data.levels)
            yield x.to(device), source

    return mean_latent(model, batches())
