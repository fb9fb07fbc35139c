"""The sizes at which speed is measured: S16, S32 (the specification's table) and the published networks.

Each is the `cifar10` suite's variant with other widths, so that a case runs what that suite runs, its options included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from bench.config import RunConfig, load_suite
from bench.errors import InputError

SUITE = "cifar10"
# kinds of network -> (variant of the suite, the variant whose flow it has, name)
KINDS = {
    "ddpmpp": ("ddpmpp-vp", None, "DDPM++ (VP)"),
    "indm-nll": ("indm-vp-nll", None, "INDM (VP, NLL), flow with a global latent"),
    "indm-nll-local": ("indm-vp-nll-local", None, "INDM (VP, NLL), flow without"),
    "indm-fid": ("indm-vp-fid", None, "INDM (VP, FID), flow with a global latent"),
    "indm-fid-local": ("indm-vp-fid", "indm-vp-nll-local", "INDM (VP, FID), flow without"),
    "ncsnpp": ("ncsnpp-ve", None, "NCSN++ (VE)"),
    "indm-ve": ("indm-ve", None, "INDM (VE), flow with a global latent"),
    "indm-ve-local": ("indm-ve", "indm-vp-nll-local", "INDM (VE), flow without"),
}


@dataclass(frozen=True)
class Size:
    """Images of ``side`` x ``side`` x 3 in batches of ``batch``; what replaces the published score and flow options."""

    side: int
    batch: int
    score: Mapping[str, Any] = field(default_factory=dict)
    flow: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return 3, self.side, self.side


_SMALL = {"nf": 32, "num_res_blocks": 2}
_FLOW = {"blocks": (2, 2), "hidden": 64}
SIZES = {
    "S16": Size(16, 16, {**_SMALL, "ch_mult": (1, 2), "attn_resolutions": (8,)}, _FLOW),
    "S32": Size(32, 16, {**_SMALL, "ch_mult": (1, 2, 2), "attn_resolutions": (16,)}, _FLOW),
    "published": Size(32, 128),
    # a rehearsal of the measurements themselves, for tests: nothing is reported at this size
    "toy": Size(
        8,
        2,
        {"nf": 8, "num_res_blocks": 1, "ch_mult": (1, 2), "attn_resolutions": (4,)},
        {"blocks": (1, 1), "hidden": 8},
    ),
}


def size_named(name: str) -> Size:
    """The size of that name. InputError for another."""
    if name not in SIZES:
        raise InputError(f"size = {name!r}: accepted: {', '.join(SIZES)}")
    return SIZES[name]


@lru_cache(maxsize=1)
def _suite():
    return load_suite(SUITE)


def run_of(kind: str) -> RunConfig:
    """The published run that a kind of network is cut from. InputError for an unknown kind."""
    if kind not in KINDS:
        raise InputError(f"kind = {kind!r}: accepted: {', '.join(KINDS)}")
    return _suite().runs(KINDS[kind][0], 0)[0]


def model_options(size: str, kind: str) -> dict[str, Any]:
    """What ``models.build`` takes for a kind of network at a size. InputError for an unknown one."""
    chosen, model = size_named(size), dict(run_of(kind).model)
    flow_from = KINDS[kind][1]
    if flow_from is not None:
        model["flow"] = _suite().runs(flow_from, 0)[0].model["flow"]
    model["score"] = {**model["score"], **chosen.score}
    if model["flow"]["name"] != "identity":
        model["flow"] = {**model["flow"], **chosen.flow}
    return {**model, "shape": list(chosen.shape)}


def build(size: str, kind: str):
    """An untrained model on the CPU, its weights the same at each call."""
    import torch

    import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.build(model_options(size, kind))
