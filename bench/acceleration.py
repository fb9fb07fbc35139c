"""How a run's arithmetic is done on its device: precision of float32, memory layout, compilation. Off unless asked for.

None of these changes what is computed but for rounding; a run that sets them has a configuration hash of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bench.errors import InputError

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@contextmanager
def float32(tf32: bool) -> Iterator[None]:
    """A block in which GPUs multiply float32 matrices with 10 bits of mantissa (TF32) or all 23; CPUs have no choice.

    Training may use the first. Likelihoods, samples and the inverse of a flow always use the second.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def to_layout(x: Tensor, memory_format: str) -> Tensor:
    """Images x (B, C, H, W) in that layout in memory; anything else as it is."""
    return x.contiguous(memory_format=LAYOUTS[memory_format]) if x.ndim == 4 else x


def restore_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimiser's moments, loaded from a checkpoint, the strides of their parameters, as fused kernels ask."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def check_compiler(model: str, device: torch.device) -> None:
    """Refuse train.compile where it cannot work: InputError."""
    from models.registry import MODELS

    said = "train.compile = true"
    compilable = [name for name, kind in MODELS.items() if kind.compilable]
    if model not in compilable:
        raise InputError(f"{said}: not with model.name = {model}; accepted: with {', '.join(compilable)}, or false")
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        raise InputError(f"{said}: no C++ compiler found; accepted: one named by CXX, or false") from error
    if device.type == "cuda" and not has_triton():
        raise InputError(f"{said}: Triton does not work with this GPU; accepted: false")


def compile_networks(model: nn.Module, backend: str = "inductor") -> list[nn.Module]:
    """Compile the model's networks in place, each as one graph; returns them. Weights and their names stay.

    A network is a module that says which input it has for time. An operation that would break its graph is an error.
    """
    networks = [module for module in model.modules() if hasattr(module, "time_input")]
    for network in networks:
        network.compile(fullgraph=True, dynamic=False, backend=backend)
    return networks
