"""DiffFlow: forward drift and backward score both learned on one discrete chain (Zhang and Chen, NeurIPS 2021).

x_{i+1} = x_i + f(x_i) D_i + g sqrt(D_i) n forwards, x_i = x_{i+1} - [f - g^2 s](x_{i+1}) D_i + g sqrt(D_i) n backwards.
Training minimises the chain's own bound; its gradient is taken by replaying the trajectory (:mod:`models.replay`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from models.base import Loss, Phase
from models.noise import StepRandom
from models.nonlinear import NonlinearDiffusion, TimedNetwork
from models.options import Count, Positive
from models.replay import Path, replayed_energy
from models.score.layers import Dropout


def warped_times(start: float, end: float, steps: int, power: float) -> Tensor:
    """(start^p + (end^p - start^p) k / N)^(1/p), k = 0..N, float64: p < 1 makes the steps grow towards the noise."""
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return (start**power + (end**power - start**power) * share) ** (1 / power)


def _check_order(start: float, end: float) -> None:
    if not 0 < start < end:
        raise ValueError(f"start = {start}: must be greater than 0 and less than end = {end}")


class DiffFlow(NonlinearDiffusion):
    """Drift f(x, t) and score s(x, t) over ``steps`` steps on [start, end] with constant g.

    ``drift`` and ``score`` are callables (x, t (B,)) -> field; training refines the grid: from ``first_steps`` it
    doubles at equal parts of ``refined`` training steps until it has ``steps``.

    Raises ValueError for times out of order, and for networks with dropout: the path is drawn once and replayed once,
    and the two must see the same functions.
    """

    name = "diffflow"
    family = "fully nonlinear, discrete"

    def __init__(
        self,
        drift: nn.Module,
        score: nn.Module,
        shape: Sequence[int],
        steps: int = 30,
        first_steps: int | None = None,
        refined: int = 0,
        start: float = 1e-3,
        end: float = 0.05,
        power: float = 0.9,
        g: float = 0.2,
        scale: float = 1.0,
    ):
        _check_order(start, end)
        for kind, network in (("drift", drift), ("score", score)):
            rates = [part.p for part in network.modules() if isinstance(part, Dropout | nn.Dropout) and part.p]
            if rates:
                raise ValueError(
                    f"{kind}.dropout = {rates[0]}: accepted is 0, as the replayed path sees the same network"
                )
        super().__init__(shape, warped_times(start, end, steps, power), scale=scale)
        self.drift, self.score = drift, score
        self.g, self.power, self.refined = g, power, refined
        self.first_steps = steps if first_steps is None else min(first_steps, steps)

    @classmethod
    def from_options(
        cls,
        shape: Sequence[int],
        drift: dict[str, Any],
        score: dict[str, Any],
        steps: Count = 30,
        first_steps: Count = 8,
        refined: Annotated[int, Field(ge=0)] = 0,
        start: Positive = 1e-3,
        end: Positive = 0.05,
        power: Positive = 0.9,
        g: Positive = 0.2,
        scale: Positive = 1.0,
    ) -> DiffFlow:
        """Build from component options; ``drift`` and ``score`` are score networks of the registry."""
        from models.registry import component

        _check_order(start, end)
        span = end - start
        # a field that carries the data across in time `span` is of the order 1 / span
        networks = [
            TimedNetwork(component(kind, options, shape=list(shape)), start, end, factor)
            for kind, options, factor in (("drift", drift, 1 / span), ("score", score, 1 / (g**2 * span)))
        ]
        return cls(*networks, shape, steps, first_steps, refined, start, end, power, g, scale)

    def forward_drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.drift(x, t)

    def reverse_drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.g**2 * self.score(x, t) - self.drift(x, t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.g)

    def phases(self) -> list[Phase]:
        """One phase: both networks minimise the bound together."""
        groups = {name: list(getattr(self, name).parameters()) for name in ("drift", "score")}
        return [Phase("joint", groups, self.bound_loss)]

    def steps_at(self, step: int) -> int:
        """Length of the chain at a training step: doubled at equal parts of ``refined`` until it is the model's."""
        steps = len(self.times) - 1
        doublings = max(0, math.ceil(math.log2(steps / self.first_steps)))
        if not doublings or not self.refined:
            return steps
        return min(steps, self.first_steps * 2 ** min(doublings, step * (doublings + 1) // self.refined))

    def bound_loss(self, x: Tensor, random: StepRandom) -> Loss:
        """The chain's bound / D, nats/dim, all constants kept (eq. 8 of the paper with -1/2 sum |forward noise|^2)."""
        times = self.grid(self.steps_at(random.step))
        source = random.source("path")
        path = Path(self.drift, self.score, times, self.diffusion, self.prior_std**2, source)
        parameters = [p for module in (self.drift, self.score) for p in module.parameters() if p.requires_grad]
        energy, spent = replayed_energy(path, x / self.scale, parameters)
        dims = x[0].numel()
        constant = 0.5 * math.log(2 * math.pi * self.prior_std**2) + math.log(self.scale)
        loss = (energy - spent).mean() / dims + constant
        return loss, {"bound": loss.detach()}
