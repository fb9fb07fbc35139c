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

from models.adaptive import Control, Field, choose, going, opening

# Gauss-Legendre nodes and weights on [0, 1], exact for the interpolants of up to MAX_ORDER + 1 = 6 slopes
MAX_ORDER = 5
_GAUSS = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))


class AdamsState(NamedTuple):
    """See :class:`models.adaptive.State`, with the last K slopes, newest first; ``known`` of them exist."""

    u: Tensor
    log_det: Tensor
    position: Tensor
    remaining: Tensor
    fraction: Tensor
    nfe: Tensor
    slopes: Tensor  # (B, K, ...) and their divergences (B, K), met at the position + places (B, K)
    divergences: Tensor
    places: Tensor
    known: Tensor  # (B,)


@dataclass(frozen=True)
class Adams:
    """Predict by the interpolant of the last K = ``order`` slopes, evaluate, correct by that of all K + 1 (PEC).

    Of the order K + 1, and its error that of the prediction. The first steps use as many slopes as there are. A
    sample's steps grow at most ``growth`` times. ValueError for an order that the quadrature is not exact for.
    """

    order: int = 4
    first: float = 0.01
    growth: float = 3.0
    evaluations: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.order <= MAX_ORDER:
            raise ValueError(f"order = {self.order}: accepted are 1 to {MAX_ORDER}")

    def begin(self, field: Field, u: Tensor, start: Tensor, span: Tensor) -> AdamsState:
        """See :class:`models.adaptive.Method`."""
        slope, divergence = field(start, u)
        common = opening(u, start, self.first)
        return AdamsState(
            **common,
            slopes=slope[:, None].expand(-1, self.order, *u.shape[1:]),
            divergences=divergence[:, None].expand(-1, self.order),
            places=start.new_zeros(len(u), self.order),
            known=common["nfe"].clone(),
        )

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
        following = AdamsState(
            u=choose(accept, u, state.u),
            log_det=choose(accept, log_det, state.log_det),
            position=choose(accept, state.position + h, state.position),
            remaining=choose(accept, state.remaining - share, state.remaining),
            fraction=share
            * (0.9 * error.clamp_min(1e-12) ** (-1 / (state.known + 1).to(error))).clamp(0.3, self.growth),
            nfe=state.nfe + active,
            slopes=choose(accept, slopes[:, :-1], state.slopes),
            divergences=choose(accept, divergences[:, :-1], state.divergences),
            places=choose(accept, ahead[:, :-1] - length[:, None], state.places),
            known=choose(accept, (state.known + 1).clamp(max=self.order), state.known),
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
