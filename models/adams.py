"""A variable-step multistep method of Adams as a method of :mod:`models.adaptive`: one evaluation a step.

A network that is told the time as 999 t through sines answers with ripples in time: 160 to a unit of t at the finest.
A Runge-Kutta pair spends six evaluations on steps short enough to follow them. They hardly matter to the integral, and
a multistep method, whose every evaluation gets nearly the same weight, averages them out at two evaluations a ripple.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.adaptive import Control, Field, going
from models.sde import expand

# Gauss-Legendre nodes and weights on [0, 1], exact for the interpolants of up to six slopes
_GAUSS = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))


class AdamsState(NamedTuple):
    """Where each sample of a batch of B stands, with the last K slopes, newest first; ``known`` of them exist."""

    u: Tensor  # (B, ...)
    log_det: Tensor  # (B,)
    position: Tensor  # (B,)
    remaining: Tensor  # (B,)
    fraction: Tensor  # (B,) the next step as a share of the span
    slopes: Tensor  # (B, K, ...) and their divergences (B, K), met at the position + places (B, K)
    divergences: Tensor
    places: Tensor
    known: Tensor  # (B,)
    nfe: Tensor  # (B,)


@dataclass(frozen=True)
class Adams:
    """Predict by the interpolant of the last K = ``order`` slopes, evaluate, correct by that of all K + 1 (PEC).

    Of the order K + 1, and its error that of the prediction. The first steps use as many slopes as there are. A
    sample's steps grow at most ``growth`` times.
    """

    order: int = 4
    first: float = 0.01
    growth: float = 3.0
    evaluations: int = 1

    def begin(self, field: Field, u: Tensor, start: Tensor, span: Tensor) -> AdamsState:
        """See :class:`models.adaptive.Method`."""
        ones, count = torch.ones_like(start), torch.ones(len(u), dtype=torch.long, device=u.device)
        slope, divergence = field(start, u)
        first = torch.full_like(start, self.first)
        past = slope[:, None].expand(-1, self.order, *u.shape[1:]), divergence[:, None].expand(-1, self.order)
        places = start.new_zeros(len(u), self.order)
        return AdamsState(u, u.new_zeros(len(u)), start.clone(), ones, first, *past, places, count, count.clone())

    def advance(self, field: Field, state: AdamsState, control: Control) -> tuple[AdamsState, Tensor]:
        """See :class:`models.adaptive.Method`."""
        active = going(state)
        share = control.share(state.fraction, state.remaining, active)
        h = share * control.span
        # the weights of a step of no length are not defined, and not used
        length = torch.where(active, h, torch.ones_like(h))
        ahead = torch.cat([length[:, None], state.places], 1)
        u, log_det = _step(state, state.slopes, state.divergences, weights(state.places, length, state.known))
        slope, divergence = field(state.position + h, u)
        slopes = torch.cat([slope[:, None], state.slopes], 1)
        divergences = torch.cat([divergence[:, None], state.divergences], 1)
        predicted_u, predicted_l = u, log_det
        u, log_det = _step(state, slopes, divergences, weights(ahead, length, state.known + 1))
        error = control.error(state, u, log_det, u - predicted_u, log_det - predicted_l)
        accept = (error <= 1) & active

        def chosen(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(expand(accept, old), new, old)

        following = AdamsState(
            chosen(u, state.u),
            chosen(log_det, state.log_det),
            chosen(state.position + h, state.position),
            chosen(state.remaining - share, state.remaining),
            share * (0.9 * error.clamp_min(1e-12) ** (-1 / (state.known + 1).to(error))).clamp(0.3, self.growth),
            chosen(slopes[:, :-1], state.slopes),
            chosen(divergences[:, :-1], state.divergences),
            chosen(ahead[:, :-1] - length[:, None], state.places),
            torch.where(accept, (state.known + 1).clamp(max=self.order), state.known),
            state.nfe + active,
        )
        return following, error


def weights(places: Tensor, length: Tensor, known: Tensor) -> Tensor:
    """(B, K) integrals over [0, length] of the Lagrange polynomials of the first ``known`` (B,) of ``places`` (B, K).

    Those places all differ. Zero for the others.
    """
    among = torch.arange(places.shape[1], device=places.device) < known[:, None]
    columns = []
    for k in range(places.shape[1]):
        others, met = (torch.cat([part[:, :k], part[:, k + 1 :]], 1) for part in (places, among))
        one = torch.ones_like(others)
        polynomial = sum(
            share * torch.where(met, node * length[:, None] - others, one).prod(1) for node, share in _GAUSS
        )
        norm = torch.where(met, places[:, k : k + 1] - others, one).prod(1)
        columns.append(torch.where(among[:, k], length * polynomial / norm, torch.zeros_like(length)))
    return torch.stack(columns, 1)


def _step(state: AdamsState, slopes: Tensor, divergences: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    moved = (shares[:, None] @ slopes.flatten(2)).view_as(state.u)
    return state.u + moved, state.log_det + (shares * divergences).sum(1)
