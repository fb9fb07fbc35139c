"""Flows with a global latent at tiny sizes, and points to try them on."""

import pytest
import torch
from torch import Tensor

from models.flows import GlobalLatentFlow

DOUBLE = torch.float64
SMALL = {"latent_dims": 4, "encoder_widths": (4, 6), "encoder_out": 3, "prior_hidden": 8}
PLAIN = {"shape": [1, 4, 4], "blocks": (2, 1), "hidden": 6, **SMALL}
SQUEEZED = {"shape": [2, 4, 4], "blocks": (1, 2), "hidden": 6, "squeeze_first": True, **SMALL}
POINT = {"shape": [1, 2, 2], "blocks": 2, "hidden": 4, **SMALL, "latent_dims": 2, "encoder_widths": (4,)}
SHAPES = pytest.mark.parametrize("config", [PLAIN, SQUEEZED], ids=["plain", "squeezed"])


def points(config: dict, count: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    draw = torch.rand(count, *config["shape"], generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return (2 * draw - 1).to(dtype)


def make(config: dict, seed: int = 0, share: float = 0.5, **options) -> GlobalLatentFlow:
    """A float64 flow in evaluation mode: no part near its fresh state, statistics of data."""
    torch.manual_seed(seed)
    flow = GlobalLatentFlow(**(config | options)).double()
    with torch.no_grad():
        for index, block in enumerate(block for level in flow.residual.levels for block in level):
            for layer in block.layers:  # signs that agree make Jacobians as large as `share` allows
                layer.weight.abs_().add_(1.0)
                layer.bias *= 0.1
            block.layers[2].weight *= (-1.0) ** index
            first = block.layers[0].weight
            first *= 0.98 * share / first.abs().sum((1, 2, 3), keepdim=True)
        for parameter in flow.residual.conditions.parameters():
            parameter *= 0.3
        for part in (flow.encoder, flow.head, flow.prior):
            for parameter in part.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    flow.train()
    for k in range(3):
        flow.moments(points(config, 16, 100 + k))
    return flow.eval().requires_grad_(False)


def latents(flow: GlobalLatentFlow, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, flow.prior.dims, generator=generator, dtype=DOUBLE)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
