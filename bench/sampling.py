"""n samples by index from a model and a sampler's name, network evaluations counted.

The prior draw and the noise of sample i are functions of (seed, i): a batch of 3 and one of 5 equal a batch of 8.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from models.base import Model
from models.noise import IndexedGenerator


def draw(
    model: Model, n: int, sampler: str, steps: int, seed: int, batch_size: int = 256, first: int = 0, **options: Any
) -> tuple[Tensor, float, float]:
    """(x (n, *shape) on the CPU, NFE a sample, seconds) for the samples first..first+n-1."""
    started = time.perf_counter()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    pieces, nfe = [], 0.0
    for start in range(first, first + n, batch_size):
        index = torch.arange(start, min(start + batch_size, first + n), device=device)
        source = IndexedGenerator(seed, "sample", index)
        pieces.append(model.sample(len(index), steps=steps, sampler=sampler, generator=source, **options).cpu())
        nfe += model.nfe * len(index)
    return torch.cat(pieces), nfe / n, time.perf_counter() - started
