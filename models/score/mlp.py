"""Residual multilayer perceptron for data of a few dimensions."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import Field
from torch import Tensor, nn

from models.options import Count, require


class Waves(nn.Module):
    """(..., ) -> (..., 2 octaves): sine and cosine at angular frequencies `lowest`, 2 `lowest`, 4 `lowest`, ..."""

    def __init__(self, octaves: int, lowest: float):
        super().__init__()
        frequency = lowest * 2.0 ** torch.arange(octaves)
        self.register_buffer("frequency", frequency.repeat(2), persistent=False)
        self.register_buffer("phase", torch.tensor([0.0, math.pi / 2]).repeat_interleave(octaves), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.phase, x[..., None], self.frequency).sin()


class ScoreMLP(ModelMixin, ConfigMixin):
    """Noise predictor `net(z, condition)`: z (B, *shape) of order 1, condition lambda = log(sigma/alpha) (B,) -> as z.

    Residual blocks h + W2 gelu(W1 gelu(norm(h)) + U e), where e are waves of lambda of period 32 (longer than twice
    its range over all SDEs here) and shorter. The last layer starts at zero.

    A network on z alone learns sharp edges slowly (spectral bias, Tancik et al. 2020, arXiv 2006.10739), hence the
    waves of every coordinate. Their frequencies, 1, 2, 4, ..., are not aligned with the edges of any data set here.

    shape: data shape, for example [2]; width, depth: units and number of residual blocks; time_frequencies: octaves of
    lambda; input_frequencies: octaves of z, beside z itself (0: none). Raises ValueError on an empty shape.
    """

    time_input = "log_ratio"
    output = "noise"

    @register_to_config
    def __init__(
        self,
        shape: tuple[int, ...],
        width: Count = 128,
        depth: Count = 3,
        time_frequencies: Annotated[int, Field(ge=1, le=12)] = 4,
        input_frequencies: Annotated[int, Field(ge=0, le=12)] = 3,
    ):
        super().__init__()
        require(len(shape) > 0 and min(shape) > 0, "shape", list(shape), "is a list of positive integers, as [2]")
        dims = math.prod(shape)
        self.time_waves = Waves(time_frequencies, 2 * math.pi / 32)
        self.input_waves = Waves(input_frequencies, 1.0) if input_frequencies else None
        self.times = nn.Linear(2 * time_frequencies, depth * width)
        self.inputs = nn.Linear(dims * (1 + 2 * input_frequencies), width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, dims)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        x = z.flatten(1)
        if self.input_waves is not None:
            x = torch.cat((x, self.input_waves(x).flatten(1)), dim=1)
        h = self.inputs(x)
        # One product gives the time's part in every block.
        times = self.times(self.time_waves(condition)).chunk(len(self.first), dim=1)
        for norm, first, second, time in zip(self.norms, self.first, self.second, times, strict=True):
            h = h + second(F.gelu(first(F.gelu(norm(h))) + time))
        return self.head(F.gelu(self.norm(h))).view_as(z)
