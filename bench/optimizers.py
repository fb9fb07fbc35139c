"""The optimisers of a training run: one AdamW a group of parameters, and their learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from bench.settings import TrainConfig


def build_optimizers(config: TrainConfig, groups: Mapping[str, list[nn.Parameter]]) -> dict[str, torch.optim.AdamW]:
    """A fused AdamW for each named group of parameters, at the group's learning rate."""
    return {
        name: torch.optim.AdamW(
            params,
            lr=config.learning_rates[name],
            betas=tuple(config.betas),
            weight_decay=config.weight_decay,
            fused=True,
        )
        for name, params in groups.items()
    }


def learning_rate(config: TrainConfig, base: float, step: int) -> float:
    """Linear warm-up over ``warmup`` steps, then constant or a cosine to zero; a function of images seen alone."""
    rate = base * min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return rate
