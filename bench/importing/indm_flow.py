"""Checkpoints of INDM's flow (github.com/byeonghu-na/INDM, flow_checkpoint*.pth) as models.flows.GlobalLatentFlow.

The official evaluation pairs the averaged score with the flow's own weights, which are those read here; the averages
that the file also holds are not used there either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.errors import InputError
from models.flows import GlobalLatentFlow, calls
from models.noise import Generator

# not needed: parameters of a roulette that are never trained and its statistics, constants, counters, an inverse
IGNORED = frozenset(
    ("geom_p", "lamb", "last_n_samples", "last_firmom", "last_secmom", "scale", "num_batches_tracked", "weight_inv")
)
WEIGHT_NORM = {"direction": "weight_v", "gain": "weight_g", "bias": "bias"}
ENCODER_BLOCK = {
    "conv1": "conv1",
    "norm1": "bn1",
    "conv2": "conv2",
    "norm2": "bn2",
    "shortcut": "downsample.0",
    "norm3": "downsample.1",
}
PRIOR_STEP = (
    "actnorm",
    "linear",
    "unit.coupling1_up",
    "unit.coupling1_dn",
    "unit.actnorm",
    "unit.coupling2_up",
    "unit.coupling2_dn",
)


def official_name(own: str) -> str:
    """The official name of an entry of `GlobalLatentFlow.state_dict()`."""
    part, *rest = own.split(".")
    if part == "residual":
        which, level, block, *inner, kind = rest
        # every block begins with an activation but the first
        first = 0 if (level, block) == ("0", "0") else 1
        layer = f"{first + 2}.h_net.net" if which == "conditions" else f"{first + 2 * int(inner[-1])}"
        return f"generator.flow.transforms.{level}.chain.{block}.nnet.{layer}.{kind}"
    if part == "encoder" and rest[0] == "blocks":
        stage, block = divmod(int(rest[1]), 2)
        return f"discriminator.encoder.net.resnet{stage}.main.{block}.{ENCODER_BLOCK[rest[2]]}.{rest[3]}"
    if part == "encoder":
        return f"discriminator.encoder.net.top.{rest[1]}"
    if part == "head":
        return f"discriminator.fc.linear.{WEIGHT_NORM[rest[0]]}"
    step, place = divmod(int(rest[1]), len(PRIOR_STEP))
    start = f"discriminator.prior.flow.steps.{step}.{PRIOR_STEP[place]}"
    if len(rest) == 3:
        return f"{start}.{rest[2]}"
    layer, kind = int(rest[3]), rest[4]
    return f"{start}.net.fc{layer + 1}.{kind if layer < 2 else f'linear.{WEIGHT_NORM[kind]}'}"


def convert(path: Path, tensors: Mapping[str, Tensor], flow: GlobalLatentFlow, config: str) -> dict[str, Tensor]:
    """The state of ``flow``, float32, from tensors by official name; ``flow`` may lie on the device "meta".

    InputError, in one line, for the first tensor that is missing, unexpected, of another shape or not finite.
    """
    state, used = {}, set()
    for own, wanted in flow.state_dict().items():
        name = official_name(own)
        if name not in tensors:
            raise InputError(f"{path}: {name}: missing; accepted: the flow of {config}, which has it")
        # gains of weight normalisation are columns there
        value = tensors[name].flatten() if own.endswith(".gain") else tensors[name]
        if value.shape != wanted.shape:
            shapes = f"{list(tensors[name].shape)}: accepted: {list(wanted.shape)}"
            raise InputError(f"{path}: {name} has shape {shapes}, that of the flow of {config}")
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{path}: {name} holds a value that is not finite; accepted: finite numbers")
        used.add(name)
        state[own] = value.float().contiguous()
    unexpected = sorted(name for name in set(tensors) - used if name.rpartition(".")[2] not in IGNORED)
    if unexpected:
        raise InputError(f"{path}: {unexpected[0]}: unexpected; accepted: the flow of {config}, which has no such")
    return state


class UnitDataFlow(nn.Module):
    """A flow of data y = (x + 1) / 2 in [0, 1] as one of x in [-1, 1]: z = 2 flow(y) - 1.

    The two changes of unit cancel in the log-determinant.
    """

    def __init__(self, flow: nn.Module):
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, generator: Generator = None) -> tuple[Tensor, Tensor]:
        """x (B, *shape) -> z (B, *shape), and the flow's log-determinant, nats (B,)."""
        z, log_det = calls.encode(self.flow, (x + 1) / 2, generator)
        return 2 * z - 1, log_det

    def latent(self, x: Tensor, generator: Generator = None) -> Tensor:
        """z alone."""
        return 2 * calls.latent(self.flow, (x + 1) / 2, generator) - 1

    def inverse(self, z: Tensor, generator: Generator = None) -> Tensor:
        """x from z (B, *shape), as the flow's own inverse."""
        return 2 * calls.decode(self.flow, (z + 1) / 2, generator) - 1

    def posterior(self, x: Tensor, generator: Generator = None) -> tuple[Tensor, Tensor]:
        """The global latent h (B, D) of x, and its divergence, nats (B,)."""
        return self.flow.posterior((x + 1) / 2, generator)

    def given(self, h: Tensor) -> UnitDataFlow:
        """The invertible flow x <-> z for this h (B, D)."""
        return UnitDataFlow(self.flow.given(h))
