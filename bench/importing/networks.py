"""A foreign network inside the harness: data in [-1, 1], t in [0, 1], the noise or sigma times the score as output."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.ddpm import ddpm_chain
from models.score.layers import FourierEmbedding

Condition = Literal["time999", "sigma", "level", "reversed_level"]


class Convention(NamedTuple):
    """What `models.score.adapter.NetworkScore` supplies to a network, and what it takes the output for."""

    time_input: str
    output: str


CONVENTIONS: dict[str, Convention] = {
    "time999": Convention("time999", "noise"),
    "sigma": Convention("sigma", "score_times_sigma"),
    "level": Convention("time999", "noise"),
    "reversed_level": Convention("time999", "score_times_sigma"),
}
"""How a network is told the noise.

time999: 999 t, the continuous VP and sub-VP networks of score_sde. sigma: the noise's standard deviation, in units of
the network's own data; its continuous VE networks. level: the index 0..N-1 of the DDPM chain's level at which alpha_bar
is that of time t, a real number between two of them, as in :mod:`models.ddpm`. reversed_level: (N - 1) (1 - t), the
index of a geometric sequence of sigmas that begins with the largest; the discrete VE networks of score_sde.
"""


class ForeignNetwork(nn.Module):
    """``net(z, condition)`` in the harness's terms: z (B, *shape) of data in [-1, 1], condition (B,) -> (B, *shape).

    ``net(z, told)`` is the network as trained; ``condition``: how it is told the noise (``CONVENTIONS``).
    ``unit_data``: it was trained on data y = (x + 1) / 2 in [0, 1]. A noise level is halved with them, and sigma times
    the score is the same number in both units, so that outputs stay as they are.
    ``times``: times of the levels, increasing (N,), for "level"; ``levels``: their number, for "reversed_level".
    """

    def __init__(
        self,
        net: nn.Module,
        condition: Condition,
        unit_data: bool = False,
        times: Tensor | None = None,
        levels: int = 1000,
    ):
        super().__init__()
        self.net, self.condition, self.unit_data, self.levels = net, condition, unit_data, levels
        self.time_input, self.output = CONVENTIONS[condition]
        self.register_buffer("times", times, persistent=False)

    def told(self, condition: Tensor) -> Tensor:
        """What the network itself is told, (B,), from what the harness supplies, (B,)."""
        if self.condition == "sigma":
            return condition / 2 if self.unit_data else condition
        if self.condition == "reversed_level":
            return (self.levels - 1) * (1 - condition / 999)
        if self.condition == "level":
            return level_at(condition.double() / 999, self.times).to(condition.dtype)
        return condition

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        return self.net((z + 1) / 2 if self.unit_data else z, self.told(condition))


class OfficialFourier(FourierEmbedding):
    """The Fourier embedding with the official order of products, (log sigma W) 2 pi.

    Angles reach 1000 rad, where float32 leaves 6e-5: another order moves the output by more than 1e-5.
    """

    def forward(self, condition: Tensor) -> Tensor:
        angle = condition.log()[:, None] * self.weight * (2 * math.pi)
        return torch.cat((angle.sin(), angle.cos()), dim=1)


def level_at(t: Tensor, times: Tensor) -> Tensor:
    """The real index (B,) of times t (B,) among increasing ``times`` (N,), linear between two, kept within 0..N-1."""
    above = torch.searchsorted(times, t.contiguous()).clamp(1, len(times) - 1)
    low, high = times[above - 1], times[above]
    return (above - 1 + (t - low) / (high - low)).clamp(0, len(times) - 1)


def chain_times(steps: int, beta_min: float, beta_max: float) -> Tensor:
    """Times, float64 (steps,), at which the VP diffusion has the alpha_bar of the DDPM chain's levels."""
    return ddpm_chain(steps, beta_min, beta_max).times


class SampleOnly(nn.Module):
    """A diffusers network as a function ``(z, timestep) -> Tensor``, without the library's record around the output."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, z: Tensor, timestep: Tensor) -> Tensor:
        return self.unet(z, timestep, return_dict=False)[0]
