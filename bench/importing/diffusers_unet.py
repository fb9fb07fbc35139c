"""Folders of the diffusers library: a UNet2DModel and the linear beta schedule it was trained on (DDPM).

Either laid out as a pipeline (unet/, scheduler/) or flat, as google/ddpm-cifar10-32 is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.errors import InputError
from bench.files import read_json
from bench.importing.torch_files import read_torch_file
from bench.untrusted import bounded_modules, check_parameters

CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
VARIANCES = {"fixed_large": "fixed_large", "fixed_small": "fixed_small", "fixed_small_log": "fixed_small"}


class Folder(NamedTuple):
    """What a folder holds: the network, the options of models.ddpm.DDPM, the shape of an image, the weights' file."""

    net: nn.Module
    chain: dict[str, Any]
    shape: tuple[int, int, int]
    weights: Path
    configuration: dict[str, Any]


def unet_folder(path: Path) -> Path | None:
    """Where under ``path`` the configuration of a network lies, if there is one."""
    return next((folder for folder in (path / "unet", path) if (folder / CONFIG).is_file()), None)


def load_folder(path: Path) -> Folder:
    """The network and its chain; nothing is fetched from anywhere. InputError for what cannot be used, in one line."""
    folder = unet_folder(path)
    if folder is None:
        raise InputError(f"{path}: no unet/{CONFIG} or {CONFIG} here; accepted: a folder that diffusers saved")
    config = _json(folder / CONFIG)
    shape = _checked_config(folder / CONFIG, config)
    scheduler = next((p for p in (path / "scheduler" / SCHEDULER, path / SCHEDULER) if p.is_file()), None)
    if scheduler is None:
        raise InputError(f"{path}: no scheduler/{SCHEDULER} or {SCHEDULER} here; accepted: a folder that has one")
    chain = chain_options(scheduler, _json(scheduler))
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise InputError(f"{folder}: no weights here; accepted: {' or '.join(WEIGHTS)}")
    return Folder(_load_unet(folder, weights), chain, shape, weights, {"unet": config, "scheduler": chain})


def _json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); accepted: a JSON object") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; accepted: a JSON object")
    return content


def _checked_config(path: Path, config: dict[str, Any]) -> tuple[int, int, int]:
    """The shape of an image; InputError unless the network is unconditional and knows time as a real number."""
    size = config.get("sample_size")
    sides = [size, size] if isinstance(size, int) else size
    inputs, outputs = config.get("in_channels", 3), config.get("out_channels", 3)
    kind, embedding = config.get("_class_name"), config.get("time_embedding_type", "positional")
    for key, value, fine, wanted in (
        ("_class_name", kind, kind == "UNet2DModel", "UNet2DModel"),
        ("sample_size", size, _is_size(sides), "the side of an image, or [height, width]"),
        ("time_embedding_type", embedding, embedding == "positional", "positional"),
        ("out_channels", outputs, outputs == inputs, f"{inputs}, as many as in_channels"),
        ("class_embed_type", config.get("class_embed_type"), config.get("class_embed_type") is None, "null"),
        ("num_class_embeds", config.get("num_class_embeds"), config.get("num_class_embeds") is None, "null"),
    ):
        if not fine:
            raise InputError(f"{path}: {key} = {value!r}: accepted: {wanted}")
    return (inputs, *sides)


def _is_size(sides: Any) -> bool:
    return isinstance(sides, list) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)


def chain_options(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Options of models.ddpm.DDPM for a scheduler's configuration, the library's defaults where it is silent.

    The chain has N = num_train_timesteps levels from beta_start to beta_end, which are beta_min / N and beta_max / N.
    InputError where the network was trained on another schedule or predicts something else than the noise.
    """
    for key, default, fine in (
        ("beta_schedule", "linear", ("linear",)),
        ("prediction_type", "epsilon", ("epsilon",)),
        ("trained_betas", None, (None,)),
        ("rescale_betas_zero_snr", False, (False,)),
        ("thresholding", False, (False,)),
        ("variance_type", "fixed_small", tuple(VARIANCES)),
        ("clip_sample", True, (True, False)),
        ("clip_sample_range", 1.0, (1.0,)),
    ):
        value = config.get(key, default)
        if value not in fine:
            raise InputError(f"{path}: {key} = {value!r}: accepted: {', '.join(map(str, fine))}")
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or steps < 2:
        raise InputError(f"{path}: num_train_timesteps = {steps!r}: accepted: an integer of at least 2")
    betas = [config.get("beta_start", 1e-4), config.get("beta_end", 0.02)]
    if not all(isinstance(beta, float) and 0 < beta < 1 for beta in betas) or betas[0] >= betas[1]:
        raise InputError(f"{path}: beta_start, beta_end = {betas}: accepted: two increasing numbers between 0 and 1")
    return {
        "steps": steps,
        "beta_min": steps * betas[0],
        "beta_max": steps * betas[1],
        "reverse_variance": VARIANCES[config.get("variance_type", "fixed_small")],
        "clip": config.get("clip_sample", True),
    }


def _load_unet(folder: Path, weights: Path) -> nn.Module:
    from diffusers import UNet2DModel

    shards = sorted(folder.glob("*.index.json"))
    if shards:  # it names further files, wherever they are
        raise InputError(f"{shards[0]}: weights in several files; accepted: one file, {' or '.join(WEIGHTS)}")
    safe = weights.suffix == ".safetensors"
    if not safe:
        read_torch_file(weights)  # refuses a pickle that asks for anything, before the library opens it
    try:
        with torch.device("meta"), bounded_modules():
            check_parameters(UNet2DModel.from_config(UNet2DModel.load_config(folder)), weights.stat().st_size)
        net, said = UNet2DModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=safe, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # whatever a configuration or a file is wrong about, the library raises its own kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{weights}: cannot be loaded ({reason}); accepted: weights of {CONFIG}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, said[problem]))
        if keys:
            kind = problem.removesuffix("_keys")
            raise InputError(f"{weights}: {keys[0]}: {kind}; accepted: the weights of the network of {CONFIG}")
    return net.float()
