"""The optimiser step as a plain PyTorch loop: what the harness's own step is held against, and trained networks."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.acceleration import LAYOUTS, to_layout
from bench.averages import Ema
from bench.data import dequantise, load
from bench.performance.sizes import build, run_of, size_named
from bench.settings import TrainConfig
from models.base import Model
from models.noise import StepRandom, derive_seed


@lru_cache(maxsize=4)
def pictures(side: int) -> Tensor:
    """Smooth images to train on that need no download: handwritten digits, enlarged and tinted; uint8 (n, 3, H, W)."""
    digits = load("digits").train.float()
    large = F.interpolate(digits, (side, side), mode="bilinear") / digits.max()
    tints = torch.rand((len(large), 3, 1, 1), generator=torch.Generator().manual_seed(0))
    return (255 * large * tints).round().to(torch.uint8)


def batch(size: str, count: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """x (count, 3, H, W) in [-1, 1], dequantised; a function of (size, count, seed)."""
    images = pictures(size_named(size).side)
    source = torch.Generator().manual_seed(derive_seed(seed, "performance", size))
    rows = torch.randint(len(images), (count,), generator=source)
    x = images[rows]
    return dequantise(x, torch.rand(x.shape, generator=source), 256).to(device)


class PlainStep:
    """One optimiser step, in the fewest lines that do all a published step does.

    zero_grad, each phase's loss and backward, clipping, AdamW, and the moving average. ``options`` go to AdamW. The
    configuration's memory layout and precision are followed; it compiles nothing.
    """

    def __init__(self, model: Model, x: Tensor, config: TrainConfig, **options: Any):
        self.model, self.config = model.train().to(memory_format=LAYOUTS[config.memory_format]), config
        self.x = to_layout(x, config.memory_format)
        self.phases = model.phases()
        self.groups = {name: params for phase in self.phases for name, params in phase.parameters.items()}
        self.optimizers = {
            name: torch.optim.AdamW(
                params,
                lr=config.learning_rates[name],
                betas=config.betas,
                weight_decay=config.weight_decay,
                **({"fused": True} | options),
            )
            for name, params in self.groups.items()
        }
        self.ema = Ema(model, config.ema)
        self.count = 0

    def __call__(self) -> Tensor:
        rows = len(self.x)
        random = StepRandom(0, self.count, rows, (0, rows), self.x.device)
        for phase in self.phases:
            if not phase.due(self.count):
                continue
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            with self._precision():
                loss, _ = phase.loss_fn(self.x, random)
            loss.backward()
            for name in phase.parameters:
                torch.nn.utils.clip_grad_norm_(self.groups[name], self.config.clip or math.inf)
                self.optimizers[name].step()
        self.ema.update()
        self.count += 1
        return loss.detach()

    def _precision(self):
        """Autocast to bfloat16 where the configuration asks for it."""
        bf16 = self.config.mixed_precision == "bf16"
        return torch.autocast(self.x.device.type, torch.bfloat16) if bf16 else nullcontext()


def plain_step(size: str, kind: str, device: torch.device | str = "cpu", **options: Any) -> PlainStep:
    """The step of a kind of network at a size, on a batch of that size; on a CPU channels_last, its faster layout."""
    model, config = build(size, kind).to(device), run_of(kind).train
    if torch.device(device).type == "cpu":
        config = config.model_copy(update={"memory_format": "channels_last"})
    return PlainStep(model, batch(size, size_named(size).batch, device=device), config, **options)


def trained(size: str, kind: str, steps: int) -> Model:
    """The network after so many steps on new batches, raw weights, in evaluation mode without gradients."""
    step = plain_step(size, kind)
    for k in range(steps):
        step.x = batch(size, size_named(size).batch, seed=k)
        step()
    return step.model.eval().requires_grad_(False)
