"""Checkpoints of the official NCSN++, DDPM++ and DDPM (Song et al. 2021, arXiv 2011.13456; github.com/yang-song/
score_sde_pytorch), and of INDM's score networks (github.com/byeonghu-na/INDM), which are the same classes.

A checkpoint is {"optimizer", "model", "ema", "step"}: "model" the state of the network by name, "ema" the averaged
parameters as a list in the network's own order. Modules of the network are numbered in order of construction,
``all_modules.0``, ``all_modules.1``, ...: :class:`models.score.NCSNpp` registers its parts in that order,
:class:`models.score.ddpm_unet.DDPMUNet` in the one of the diffusers library.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.errors import InputError
from bench.importing.torch_files import read_torch_file
from models.score import NCSNpp
from models.score.ddpm_unet import DDPMUNet
from models.score.layers import AttentionBlock, ResidualBlock

LEVELS = 1000  # num_scales of every CIFAR-10 configuration
SIGMAS = "sigmas"  # a buffer: the discrete noise levels, largest first
FREQUENCIES = "all_modules.0.W"  # the Fourier embedding's, a parameter without gradient: in "model", not in "ema"
COUNTER = ".num_batches_tracked"  # of batch normalisation: an integer, not read
RESIDUAL_BLOCK = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "embed": "Dense_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
    "shortcut": "Conv_2",
}

# of the network `ddpm`: the parts of a residual block and of an attention by the names of the diffusers library
UNET_BLOCK = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "time_emb_proj": "Dense_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
}
UNET_ATTENTION = {"to_q": "NIN_0", "to_k": "NIN_1", "to_v": "NIN_2", "to_out.0": "NIN_3"}


class Official(NamedTuple):
    """A published configuration: the model as `models.build` takes it, and how the network is told the noise."""

    model: dict[str, Any]
    condition: str
    space: str = "data"


def _official(sde: str, network: str, blocks: int = 4, discrete: bool = False, space: str = "data") -> Official:
    exploding, flow = sde == "ve", {"name": "identity"}
    sizes = {"nf": 128, "ch_mult": [1, 2, 2, 2], "attn_resolutions": [16], "dropout": 0.1, "centered": not exploding}
    score = {
        "name": "ncsnpp",
        **sizes,
        "num_res_blocks": blocks,
        # Fourier features where the configuration leaves the embedding at its default: continuous VE
        "embedding": "fourier" if exploding and not discrete else "positional",
        "fourier_scale": 16.0,
        "fir": network == "ncsnpp",
        "progressive_input": "residual" if network == "ncsnpp" else "none",
    }
    if network == "ddpm":
        score = {"name": "ddpm_unet", **sizes, "num_res_blocks": 2}
    if exploding:
        # published for data in [0, 1], sigma from 0.01 to 50: in units of [-1, 1] both double
        process = {"name": "ve", "sigma_min": 0.02, "sigma_max": 100.0}
        condition = "reversed_level" if discrete else "sigma"
        return Official({"name": "indm", "sde": process, "score": score, "flow": flow}, condition, space)
    if discrete:
        chain = {"steps": LEVELS, "beta_min": 0.1, "beta_max": 20.0, "reverse_variance": "fixed_large", "clip": False}
        return Official({"name": "ddpm", **chain, "score": score}, "level", space)
    process = {"name": sde, "beta_min": 0.1, "beta_max": 20.0}
    return Official({"name": "indm", "sde": process, "score": score, "flow": flow}, "time999", space)


CONFIGS: dict[str, Official] = {
    "vp/cifar10_ddpmpp": _official("vp", "ddpmpp", discrete=True),
    "vp/cifar10_ddpmpp_continuous": _official("vp", "ddpmpp"),
    "vp/cifar10_ddpmpp_deep_continuous": _official("vp", "ddpmpp", 8),
    "vp/cifar10_ncsnpp": _official("vp", "ncsnpp", discrete=True),
    "vp/cifar10_ncsnpp_continuous": _official("vp", "ncsnpp"),
    "vp/cifar10_ncsnpp_deep_continuous": _official("vp", "ncsnpp", 8),
    "vp/ddpm/cifar10": _official("vp", "ddpm", discrete=True),
    "vp/ddpm/cifar10_continuous": _official("vp", "ddpm"),
    "subvp/cifar10_ddpm_continuous": _official("subvp", "ddpm"),
    "subvp/cifar10_ddpmpp_continuous": _official("subvp", "ddpmpp"),
    "subvp/cifar10_ddpmpp_deep_continuous": _official("subvp", "ddpmpp", 8),
    "subvp/cifar10_ncsnpp_continuous": _official("subvp", "ncsnpp"),
    "subvp/cifar10_ncsnpp_deep_continuous": _official("subvp", "ncsnpp", 8),
    "ve/cifar10_ddpm": _official("ve", "ddpm", discrete=True),
    "ve/cifar10_ncsnpp": _official("ve", "ncsnpp", discrete=True),
    "ve/cifar10_ncsnpp_continuous": _official("ve", "ncsnpp"),
    "ve/cifar10_ncsnpp_deep_continuous": _official("ve", "ncsnpp", 8),
}
"""Names are those of the official files under ``configs/``, without the ending."""

UNBUILT = (
    "vp/ddpm/cifar10_unconditional",
    "ve/ncsn/cifar10",
    "ve/ncsn/cifar10_124",
    "ve/ncsn/cifar10_1245",
    "ve/ncsn/cifar10_5",
    "ve/ncsnv2/cifar10",
)
"""Official files whose networks the official code itself fails on building, with errors of names and of types."""

INDM_CONFIGS: dict[str, Official] = {
    "vp/CIFAR10/indm_nll": _official("vp", "ddpmpp", space="latents"),
    "vp/CIFAR10/indm_fid": _official("vp", "ddpmpp", space="latents"),
    "ve/CIFAR10/indm": _official("ve", "ncsnpp", space="latents"),
}
"""Score networks of INDM: they live in the latents of a flow that the official code keeps in a file of its own."""

INDM_FLOW = {"name": "residual_global", "blocks": [16, 16], "hidden": 512, "terms_eval": 20}
"""That flow, the same for all of them; the log-determinant's exact terms are those of the suite `cifar10`."""

KINDS: dict[str, dict[str, Official]] = {"score_sde": CONFIGS, "indm": INDM_CONFIGS}


def official(kind: str, config: str) -> Official:
    """A configuration by name, to change as wanted; InputError for an unknown kind or name."""
    if kind not in KINDS:
        raise InputError(f"--kind {kind}: unknown; accepted: {', '.join(KINDS)}")
    if kind == "score_sde" and config in UNBUILT:
        reason = "the official PyTorch code fails on building its network, so that it has no checkpoint"
        raise InputError(f"--config {config}: {reason}; accepted: {', '.join(KINDS[kind])}")
    if config not in KINDS[kind]:
        raise InputError(f"--config {config}: unknown to {kind}; accepted: {', '.join(KINDS[kind])}")
    return copy.deepcopy(KINDS[kind][config])


def with_flow(chosen: Official) -> Official:
    """An INDM configuration, its score and the flow in front of it: a model of data."""
    return Official(chosen.model | {"flow": copy.deepcopy(INDM_FLOW)}, chosen.condition)


class Entry(NamedTuple):
    """One parameter of ours and those of the official network that it holds, stacked along its first dimension."""

    own: str
    official: tuple[str, ...]
    transposed: bool = False


def layout(net: nn.Module) -> list[Entry]:
    """Every parameter of ``net``, an NCSNpp or a DDPMUNet, with the official names, in the order of their modules."""
    return unet_layout(net) if isinstance(net, DDPMUNet) else ncsnpp_layout(net)


def unet_layout(net: DDPMUNet) -> list[Entry]:
    """Every parameter of ``net`` with the official names, in the order of the official modules."""
    entries: list[Entry] = []
    number = 0

    def pair(own: str, inner: str = "", kinds: tuple[str, str] = ("weight", "bias")) -> None:
        for kind, official in zip(("weight", "bias"), kinds, strict=True):
            # official matrices act from the right
            entries.append(Entry(f"unet.{own}.{kind}", (f"all_modules.{number}{inner}.{official}",), official == "W"))

    def module(own: str, inner: str = "") -> None:
        nonlocal number
        pair(own, inner)
        number += 1

    def block(own: str, part: nn.Module) -> None:
        nonlocal number
        for mine, theirs in UNET_BLOCK.items():
            pair(f"{own}.{mine}", f".{theirs}")
        if part.conv_shortcut is not None:
            pair(f"{own}.conv_shortcut", ".NIN_0", ("W", "b"))
        number += 1

    def steps(own: str, level: nn.Module) -> None:
        nonlocal number
        attentions = getattr(level, "attentions", [])
        for i, part in enumerate(level.resnets):
            block(f"{own}.resnets.{i}", part)
            if i < len(attentions) and not isinstance(attentions[i], nn.Identity):
                pair(f"{own}.attentions.{i}.group_norm", ".GroupNorm_0")
                for mine, theirs in UNET_ATTENTION.items():
                    pair(f"{own}.attentions.{i}.{mine}", f".{theirs}", ("W", "b"))
                number += 1

    module("time_embedding.linear_1")
    module("time_embedding.linear_2")
    module("conv_in")
    for i, level in enumerate(net.unet.down_blocks):
        steps(f"down_blocks.{i}", level)
        if level.downsamplers is not None:
            module(f"down_blocks.{i}.downsamplers.0.conv", ".Conv_0")
    steps("mid_block", net.unet.mid_block)
    for i, level in enumerate(net.unet.up_blocks):
        steps(f"up_blocks.{i}", level)
        if level.upsamplers is not None:
            module(f"up_blocks.{i}.upsamplers.0.conv", ".Conv_0")
    module("conv_norm_out")
    module("conv_out")
    return entries


def ncsnpp_layout(net: NCSNpp) -> list[Entry]:
    """Every parameter of ``net`` in the order of the official modules, with the official names."""
    entries: list[Entry] = []
    number = 0

    def pair(own: str, inner: str = "") -> None:
        entries.extend(Entry(f"{own}.{kind}", (f"all_modules.{number}{inner}.{kind}",)) for kind in ("weight", "bias"))

    def module(own: str, inner: str = "") -> None:
        nonlocal number
        pair(own, inner)
        number += 1

    def block(own: str, part: ResidualBlock | None) -> None:
        nonlocal number
        if part is None:
            return
        for mine, theirs in RESIDUAL_BLOCK.items():
            if getattr(part, mine) is not None:
                pair(f"{own}.{mine}", f".{theirs}")
        number += 1

    def attention(own: str, part: AttentionBlock | None) -> None:
        nonlocal number
        if part is None:
            return
        pair(f"{own}.norm", ".GroupNorm_0")
        for kind, letter in (("weight", "W"), ("bias", "b")):
            # official matrices act from the right
            names = [f"all_modules.{number}.NIN_{i}.{letter}" for i in range(4)]
            entries.append(Entry(f"{own}.qkv.{kind}", tuple(names[:3]), kind == "weight"))
            entries.append(Entry(f"{own}.out.{kind}", (names[3],), kind == "weight"))
        number += 1

    def steps(own: str, parts: Any) -> None:
        for i, step in enumerate(parts):
            block(f"{own}.{i}.block", step.block)
            attention(f"{own}.{i}.attention", step.attention)

    if net.config.embedding == "fourier":
        entries.append(Entry("encode.weight", (FREQUENCIES,)))
        number += 1
    module("condition.0")
    module("condition.2")
    module("stem")
    for i, level in enumerate(net.down):
        steps(f"down.{i}.steps", level.steps)
        block(f"down.{i}.shrink", level.shrink)
        if level.merge is not None:
            module(f"down.{i}.merge.conv", ".Conv2d_0" if net.config.fir else ".Conv_0")
    steps("middle", net.middle[:1])
    block("middle.1", net.middle[1])
    for i, level in enumerate(net.up):
        steps(f"up.{i}.steps", level.steps)
        block(f"up.{i}.grow", level.grow)
    module("norm")
    module("head")
    return entries


class Checkpoint(NamedTuple):
    """Tensors of a checkpoint by official name, and what it says of its training."""

    tensors: dict[str, Tensor]
    training: dict[str, Any]


def read_checkpoint(path: Path, weights: str = "ema") -> Checkpoint:
    """The official checkpoint at ``path``, its averaged parameters ("ema") or those of its last step ("raw").

    InputError, in one line, for a file that is no such checkpoint.
    """
    content = read_torch_file(path)
    model = {name.removeprefix("module."): value for name, value in _mapping(path, content, "model").items()}
    for name, value in model.items():
        if not name.endswith(COUNTER):
            _check_tensor(f"{path}: model.{name}", value)
    step = content.get("step")
    training: dict[str, Any] = {"step": step if type(step) is int else None, "weights": weights}
    if weights == "raw":
        return Checkpoint(model, training)
    ema = _mapping(path, content, "ema")
    for key in ("decay", "num_updates"):
        training[f"ema_{key}"] = ema.get(key) if type(ema.get(key)) in (int, float) else None
    return Checkpoint(model | _averaged(path, model, ema.get("shadow_params")), training)


def _averaged(path: Path, model: Mapping[str, Tensor], shadows: Any) -> dict[str, Tensor]:
    """The averages under the names of the parameters they follow: all with a gradient, in the network's order."""
    names = [name for name in model if name not in (SIGMAS, FREQUENCIES)]
    if not isinstance(shadows, list) or len(shadows) != len(names):
        held = f"{len(shadows)} tensors" if isinstance(shadows, list) else f"a {type(shadows).__name__}"
        raise InputError(
            f"{path}: ema.shadow_params = {held}: accepted: a list of {len(names)}, one for each trained parameter"
        )
    for name, shadow in zip(names, shadows, strict=True):
        _check_tensor(f"{path}: ema.shadow_params for {name}", shadow)
        if shadow.shape != model[name].shape:
            raise InputError(
                f"{path}: ema.shadow_params for {name} has shape {list(shadow.shape)}: accepted: "
                f"{list(model[name].shape)}, that of the parameter"
            )
    return dict(zip(names, shadows, strict=True))


def _mapping(path: Path, content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    wanted = "accepted: a checkpoint with the keys optimizer, model, ema and step"
    if key not in content:
        held = ", ".join(map(str, list(content)[:6])) or "none"
        raise InputError(f"{path}: {key}: missing (it has {held}); {wanted}")
    value = content[key]
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{path}: {key} = a {type(value).__name__}: must be a mapping of names to values; {wanted}")
    return value


def _check_tensor(where: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{where} = a {type(value).__name__}: accepted: a tensor")
    if not value.is_floating_point():
        raise InputError(f"{where} = a tensor of {value.dtype}: accepted: floating-point numbers")


def convert(path: Path, tensors: Mapping[str, Tensor], net: nn.Module, config: str) -> dict[str, Tensor]:
    """The state of ``net``, float32, from tensors by official name; ``net`` may lie on the device "meta".

    InputError, in one line, for the first tensor that is missing, unexpected, of another shape or not finite.
    """
    own, state, used = net.state_dict(), {}, {SIGMAS}
    for entry in layout(net):
        wanted = list(own[entry.own].shape)
        wanted[0] //= len(entry.official)
        wanted = wanted[1::-1] if entry.transposed else wanted  # a convolution of 1 x 1 pixels is a matrix there
        parts = []
        for name in entry.official:
            if name not in tensors:
                raise InputError(f"{path}: {name}: missing; accepted: the network of {config}, which has it")
            part = tensors[name]
            if list(part.shape) != wanted:
                raise InputError(f"{path}: {name} has shape {list(part.shape)}: accepted: {wanted}, that of {config}")
            if not bool(torch.isfinite(part).all()):
                raise InputError(f"{path}: {name} holds a value that is not finite; accepted: finite numbers")
            parts.append(part.T if entry.transposed else part)
        used |= set(entry.official)
        state[entry.own] = torch.cat(parts).float().reshape(own[entry.own].shape).contiguous()
    unexpected = sorted(set(tensors) - used)
    if unexpected:
        raise InputError(f"{path}: {unexpected[0]}: unexpected; accepted: the network of {config}, which has no such")
    return state


def check_sigmas(path: Path, tensors: Mapping[str, Tensor], model: Mapping[str, Any], levels: int | None) -> None:
    """Refuse a VE checkpoint whose own noise levels are not the configuration's; the file holds them as a buffer.

    ``model``: the configuration, its sigmas in units of data in [-1, 1]; ``levels``: their number, None if any will do.
    """
    if (model.get("sde") or {}).get("name") != "ve" or SIGMAS not in tensors:
        return
    sigmas = tensors[SIGMAS].double().flatten()
    low, high = model["sde"]["sigma_min"] / 2, model["sde"]["sigma_max"] / 2
    held = f"{sigmas.numel()} from {float(sigmas.min()):g} to {float(sigmas.max()):g}" if sigmas.numel() else "none"
    wanted = f"{'' if levels is None else f'{levels} '}from {low:g} to {high:g}, those of the configuration"
    fits = sigmas.numel() > 1 and abs(sigmas[-1] / low - 1) < 1e-3 and abs(sigmas[0] / high - 1) < 1e-3
    if not fits or levels not in (None, sigmas.numel()):
        raise InputError(f"{path}: {SIGMAS} = {held}: accepted: {wanted}")
