"""Embedded Runge-Kutta pairs as a method of :mod:`models.adaptive`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.adaptive import Control, Field, choose, going, opening
from models.sde import expand


class RungeKuttaState(NamedTuple):
    """See :class:`models.adaptive.State`, with the slope at the position."""

    u: Tensor
    log_det: Tensor
    position: Tensor
    remaining: Tensor
    fraction: Tensor
    nfe: Tensor
    slope: Tensor  # (B, ...) and its divergence (B,)
    divergence: Tensor


@dataclass(frozen=True)
class RungeKutta:
    """A pair of orders 5 and 4 whose last stage sits at the fifth-order solution: its slope opens the next step.

    ``error``: the difference of the fifth- and fourth-order weights. ``first``: the first step, a share of the span.
    """

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]
    first: float = 0.02

    @property
    def evaluations(self) -> int:
        """Evaluations of a step, its first stage being the last one's last."""
        return len(self.nodes) - 1

    def begin(self, field: Field, u: Tensor, start: Tensor, span: Tensor) -> RungeKuttaState:
        """See :class:`models.adaptive.Method`."""
        slope, divergence = field(start, u)
        return RungeKuttaState(**opening(u, start, self.first), slope=slope, divergence=divergence)

    def advance(self, field: Field, state: RungeKuttaState, control: Control) -> tuple[RungeKuttaState, Tensor]:
        """See :class:`models.adaptive.Method`."""
        u, log_det, position, remaining, fraction, *_ = state
        active = going(state)
        share = control.share(fraction, remaining, active)
        h = share * control.span
        ks, ls = [state.slope], [state.divergence]
        for node, weights in zip(self.nodes[1:], self.stages[1:], strict=True):
            stage = u + expand(h, u) * combine(weights, ks)
            k, divergence = field(position + node * h, stage)
            ks.append(k)
            ls.append(divergence)
        l_new = log_det + h * combine(self.stages[-1], ls)
        wrong_u, wrong_l = expand(h, u) * combine(self.error, ks), h * combine(self.error, ls)
        error = control.error(state, stage, l_new, wrong_u, wrong_l)
        accept = (error <= 1) & active
        following = RungeKuttaState(
            u=choose(accept, stage, u),
            log_det=choose(accept, l_new, log_det),
            position=choose(accept, position + h, position),
            remaining=choose(accept, remaining - share, remaining),
            fraction=share * (0.9 * error.clamp_min(1e-10) ** -0.2).clamp(0.2, 5.0),
            nfe=state.nfe + self.evaluations * active,
            slope=choose(accept, ks[-1], ks[0]),
            divergence=choose(accept, ls[-1], ls[0]),
        )
        return following, error


# Dormand and Prince 1980, RK5(4)7M
DORMAND_PRINCE = RungeKutta(
    nodes=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    stages=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)


def combine(weights: tuple[float, ...], values: list[Tensor]) -> Tensor:
    """The weighted sum of stages, those of weight zero left out."""
    total = None
    for weight, value in zip(weights, values, strict=False):
        if weight:
            total = weight * value if total is None else torch.add(total, value, alpha=weight)
    return total
