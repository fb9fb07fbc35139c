"""Flows at and off their Lipschitz bound, and points to try them on, for the tests of flows."""

import math

import pytest
import torch
from torch import Tensor

from models.flows import ResidualFlow
from models.flows.log_det import columns

DOUBLE = torch.float64
VECTOR = {"shape": [2], "blocks": 3, "hidden": 16}
IMAGE = {"shape": [1, 4, 4], "blocks": (2, 1), "hidden": 8}
SQUEEZED = {"shape": [2, 4, 4], "blocks": (1, 1), "hidden": 8, "squeeze_first": True}
SHAPES = pytest.mark.parametrize("config", [VECTOR, IMAGE, SQUEEZED], ids=["vector", "image", "squeezed"])


def points(config: dict, count: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(count, *config["shape"], generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) - 1


def make(config: dict, seed: int = 0, scale: float = 10.0, **options) -> ResidualFlow:
    """A float64 flow in evaluation mode, its weights scaled so that all layers sit at the cap."""
    torch.manual_seed(seed)
    flow = ResidualFlow(**(config | options)).double().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter *= scale
    return flow


def strong(config: dict, share: float = 1.0, seed: int = 0, **options) -> ResidualFlow:
    """A flow whose blocks have Jacobians of spectral radius up to 0.98^3 * share: signs of a row agree, biases are 0.

    Blocks alternate between +J and -J, so that both ends of the spectrum are met.
    """
    flow = make(config, seed, **options)
    with torch.no_grad():
        for index, block in enumerate(block for level in flow.levels for block in level):
            for layer in block.layers:
                layer.weight.abs_()
                layer.bias.mul_(0.1 / layer.bias.abs().max())
            block.layers[2].weight *= (-1.0) ** (index + 1)
            if share < 1:
                first = block.layers[0].weight
                first *= 0.98 * share / first.flatten(1).sum(1).reshape(-1, *(1,) * (first.ndim - 1))
    return flow


def radius(flow: ResidualFlow, x: Tensor) -> float:
    """The largest eigenvalue modulus among the Jacobians of the first block."""
    chain = next(flow.chains())[0]
    _, jacobian = chain.linearise(flow.enter(x))
    return torch.linalg.eigvals(columns(jacobian, flow.enter(x))).abs().max().item()


def autograd_log_det(flow: ResidualFlow, x: Tensor) -> Tensor:
    """log|det dz/dx| by differentiating the whole map, independent of the flow's own products."""
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.latent(x).sum(0), x, create_graph=True)
    dims = math.prod(flow.shape)
    return torch.linalg.slogdet(jacobian.movedim(len(flow.shape), 0).reshape(-1, dims, dims)).logabsdet
