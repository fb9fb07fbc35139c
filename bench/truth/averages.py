"""The averaged weights, which every evaluation uses, against the average written out as a sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.averages import Ema
from bench.truth.rows import Case, Row

AVERAGES = "averaged weights"


def weighted_average(history: Sequence[Tensor], decay: float) -> Tensor:
    """The exponential average of weights over a run: ``history`` holds the initial ones and those after each step.

    Update n keeps d_n = min(decay, (1 + n) / (10 + n)) of the old average (the warm-up of score_sde), so step k
    enters with (1 - d_k) prod_{n > k} d_n, and the initial weights with prod_n d_n. float64.
    """
    total, kept = torch.zeros_like(history[0], dtype=torch.float64), 1.0
    for n in range(len(history) - 1, 0, -1):
        d = min(decay, (1 + n) / (10 + n))
        total += kept * (1 - d) * history[n].double()
        kept *= d
    return total + kept * history[0].double()


def average_rows(steps: int = 60) -> list[Row]:
    """The training's Ema on weights that move in a known way; buffers are copied, the live weights left alone."""
    rows = []
    for decay in (0.5, 0.95):
        module = nn.BatchNorm1d(3)
        ema, history = Ema(module, decay), [module.weight.detach().clone()]
        for step in range(1, steps + 1):
            with torch.no_grad():
                module.weight.copy_(torch.tensor([0.1, 1.0, -2.0]) * step**0.5)
                module.running_mean.fill_(step)
            history.append(module.weight.detach().clone())
            ema.update()
        case = Case(AVERAGES, "known path", setting=f"decay {decay:g}")
        deviation = (ema.model.weight.double() - weighted_average(history, decay)).abs().max()
        rows.append(case.row("exponential average", deviation, floor=1e-5, unit="weight"))
        rows.append(case.row("buffers", ema.model.running_mean[0], steps, floor=0.0, unit="buffer"))
        untouched = (module.weight.detach() - history[-1]).abs().max()
        rows.append(case.row("live weights", untouched, floor=0.0, unit="weight"))
    return rows
