"""The moving average of the weights in training."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

Groups = Mapping[str, Sequence[nn.Parameter]]


class Ema:
    """Exponential moving average of a model's parameters, decay min(d, (1 + n) / (10 + n)); buffers are copied.

    ``groups`` are named parameters of the model. ``rates`` gives some of them a d of their own; those of ``raw`` are
    not averaged but copied, as are all parameters that no group trains, which do not change.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        groups: Groups | None = None,
        rates: Mapping[str, float] | None = None,
        raw: Collection[str] = (),
    ):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = 0
        named = {id(p): name for name, parameters in (groups or {}).items() for p in parameters}
        # of one decay each, in the order of the model
        self._averaged: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
        self._copied = list(zip(self.model.buffers(), model.buffers(), strict=True))
        for own, live in zip(self.model.parameters(), model.parameters(), strict=True):
            group = named.get(id(live))
            if group in raw:
                self._copied.append((own, live))
                continue
            owns, lives = self._averaged.setdefault((rates or {}).get(group, decay), ([], []))
            owns.append(own)
            lives.append(live)

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights in; decays are numbers of the host, so nothing waits for the device."""
        self.updates += 1
        for decay, (owns, lives) in self._averaged.items():
            now = min(decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(owns, lives, 1 - now)
        for own, live in self._copied:
            own.copy_(live)
