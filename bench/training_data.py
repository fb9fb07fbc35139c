"""The batches of a training run, in an order that its seed gives."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.acceleration import to_layout
from bench.data import Dataset, dequantise
from bench.settings import TrainConfig
from models.noise import StepRandom, derive_seed


class Batches:
    """Batch k of a data set as a function of (seed, k): no loader state to lose."""

    def __init__(self, data: Dataset, config: TrainConfig, seed: int, device: torch.device):
        self.data, self.config, self.seed, self.device = data, config, seed, device
        self.images = data.train.to(device)
        self._epoch, self._order = -1, None

    def _rows(self, position: int) -> Tensor:
        size, batch = len(self.images), self.config.batch_size
        rows = []
        while batch:
            epoch, offset = divmod(position, size)
            if epoch != self._epoch:
                source = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
                # drawn on the CPU, so that every device has the same order, and sent once an epoch
                self._epoch, self._order = epoch, to_device(torch.randperm(size, generator=source), self.device)
            take = min(batch, size - offset)
            rows.append(self._order[offset : offset + take])
            position, batch = position + take, batch - take
        return torch.cat(rows)

    def __call__(self, step: int, random: StepRandom) -> Tensor:
        """x (count, *shape) of this process's rows of the global batch of ``step``."""
        first, count = random.rows
        if self.data.draw is not None:
            # drawn on the CPU, so that every device trains on the same points
            x = self.data.draw(self.config.batch_size, random.generator("data", "cpu"))
            return to_device(x[first : first + count], self.device)
        rows = self._rows(step * self.config.batch_size)[first : first + count]
        images = self.images[rows]
        if self.config.horizontal_flip:
            flip = random.uniform("flip") < 0.5
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        x = dequantise(images, random.uniform("dequantisation", images.shape[1:]), self.data.levels)
        return to_layout(x, self.config.memory_format)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, without the host waiting for the copy."""
    if device.type == "cpu":
        return values
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
