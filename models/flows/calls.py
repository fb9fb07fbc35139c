"""Calls of any flow: its `forward(x)`, `inverse(z)` and, where it has one, `latent(x)` take a generator if random."""

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from models.noise import Generator


def encode(flow: nn.Module, x: Tensor, generator: Generator = None) -> tuple[Tensor, Tensor]:
    """x (B, ...) -> (z (B, ...), log|det dz/dx| (B,) in nats)."""
    return flow(x, **_source(flow.forward, generator))


def latent(flow: nn.Module, x: Tensor, generator: Generator = None) -> Tensor:
    """x (B, ...) -> z alone."""
    if not hasattr(flow, "latent"):
        return encode(flow, x, generator)[0]
    return flow.latent(x, **_source(flow.latent, generator))


def decode(flow: nn.Module, z: Tensor, generator: Generator = None) -> Tensor:
    """z (B, ...) -> x. Raises FlowInverseError where the inverse does not converge."""
    return flow.inverse(z, **_source(flow.inverse, generator))


def fixed(flow: nn.Module, x: Tensor, generator: Generator = None) -> nn.Module:
    """The flow itself, or with one global latent drawn for x (B, ...): its inverse then leads back to x."""
    return flow.given(flow.posterior(x, generator)[0]) if hasattr(flow, "given") else flow


def _source(function: Callable, generator: Generator) -> dict[str, Generator]:
    return {"generator": generator} if "generator" in inspect.signature(function).parameters else {}
