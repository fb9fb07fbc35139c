"""Residual multilayer perceptron for two-dimensional data."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import Field
from torch import Tensor, nn


class ScoreMLP(ModelMixin, ConfigMixin):
    """Noise predictor `net(z, condition)`: z (B, *shape) of order one, condition lambda = log(sigma/alpha) (B,) -> as z.

    Residual blocks `h + W2 silu(W1 silu(h) + U e)`, where e embeds lambda by sines and cosines of octave frequencies.
    The last layer starts at zero.

    shape: data shape, for example [2]; width, depth: units and number of residual blocks;
    time_frequencies: octaves of lambda, of period 32 and shorter; input_frequencies: octaves of z, of period 4 and
    shorter, beside z itself (0: none).
    """

    time_input = "log_ratio"
    output = "noise"

    @register_to_config
    def __init__(
        self,
        shape: tuple[int, ...],
        width: Annotated[int, Field(ge=1)] = 128,
        depth: Annotated[int, Field(ge=1)] = 3,
        time_frequencies: Annotated[int, Field(ge=1, le=12)] = 6,
        input_frequencies: Annotated[int, Field(ge=0, le=12)] = 0,
    ):
        super().__init__()
        if not shape or min(shape) < 1:
            raise ValueError(f"shape: {list(shape)}; accepted: a list of positive integers, for example [2]")
        dims = math.prod(shape)
        octaves = 2.0 ** torch.arange(time_frequencies) * (2 * math.pi / 32)
        self.register_buffer("octaves", octaves, persistent=False)
        waves = 2.0 ** torch.arange(input_frequencies) * (2 * math.pi / 4)
        self.register_buffer("waves", waves, persistent=False)
        self.embed = nn.Linear(2 * time_frequencies, width)
        self.times = nn.Linear(width, depth * width)
        self.inputs = nn.Linear(dims * (1 + 2 * input_frequencies), width)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, dims)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        x = z.flatten(1)
        angle = condition[:, None] * self.octaves
        times = self.times(F.silu(self.embed(torch.cat((angle.sin(), angle.cos()), 1)))).chunk(len(self.first), 1)
        if self.waves.numel():
            angle = (x[:, :, None] * self.waves).flatten(1)
            x = torch.cat((x, angle.sin(), angle.cos()), 1)
        h = self.inputs(x)
        for first, second, time in zip(self.first, self.second, times, strict=True):
            h = h + second(F.silu(first(F.silu(h)) + time))
        return self.head(F.silu(h)).view_as(z)
