"""What the harness asks of a model, and what one optimiser step is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from models.noise import Generator, StepRandom

Loss = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Phase:
    """One optimiser step of a variant: the loop says how, the phase says what.

    ``parameters``: named groups, each with its own learning rate and gradient clipping ("score", "flow").
    ``loss_fn``: (x of shape (B, ...), StepRandom) -> (scalar to minimise, named terms (scalars, nats/dim) to record).
    ``every``: the phase runs at steps divisible by it; ``when``: and only where this function of the step is true.
    """

    name: str
    parameters: dict[str, list[nn.Parameter]]
    loss_fn: Callable[[Tensor, StepRandom], Loss]
    every: int = 1
    when: Callable[[int], bool] | None = None

    def due(self, step: int) -> bool:
        """Whether the phase runs at this training step."""
        return step % self.every == 0 and (self.when is None or self.when(step))


class Model(nn.Module, ABC):
    """A generative model of x in R^shape. Likelihoods are nats of the continuous density of x, one value an image.

    A model that lacks a quantity raises :class:`NotDefined` with the reason, which the tables print.
    """

    shape: tuple[int, ...]
    # under which a suite asks for the model; None for a class that others build on
    name: ClassVar[str | None] = None
    # place in the taxonomy of forward processes: linear, semi-linear or fully nonlinear; discrete or continuous in time
    family: str = ""
    # the sampler of the learning curve's sample quality
    curve_sampler: ClassVar[str] = "ddim"

    @property
    def dims(self) -> int:
        """Number of dimensions of one sample."""
        size = 1
        for side in self.shape:
            size *= side
        return size

    @abstractmethod
    def phases(self) -> list[Phase]:
        """The optimiser steps of one training step, in order."""

    def milestones(self, steps: int) -> list[int]:
        """Steps, of so many in all, at which the learning curve is measured besides its own points."""
        return []

    @abstractmethod
    def nelbo_parts(self, x: Tensor, times: int = 1, generator: Generator = None) -> dict[str, Tensor]:
        """Named parts, nats (B,), that sum to an unbiased estimate of the negative evidence lower bound."""

    @abstractmethod
    def nll_parts(self, x: Tensor, rtol: float = 1e-5, atol: float = 1e-5, **options) -> dict[str, Tensor]:
        """Named parts, nats (B,), of the probability-flow ODE's negative log-likelihood, and "nfe" (B,)."""

    @abstractmethod
    def sample(self, n: int, steps: int, sampler: str, generator: Generator = None, **options) -> Tensor:
        """n samples (n, *shape) by the named sampler; the count of network evaluations is left in ``self.nfe``."""

    @abstractmethod
    def trajectory(self, x: Tensor, times: Sequence[float], generator: Generator = None) -> Tensor:
        """The forward process seen in data space: (len(times), B, *shape)."""

    def chain_parts(self, x: Tensor, generator: Generator = None) -> dict[str, Tensor]:
        """Named parts, nats (B,), of the bound of the model's own discrete chain (models.chain) on the density of x."""
        raise NotDefined("not defined: continuous in time, its bound is the NELBO")

    def discrete_parts(self, levels: Tensor, count: int, generator: Generator = None) -> dict[str, Tensor]:
        """Named parts, nats (B,), of a bound on -log P of discrete images k (B, ...) in 0..count-1, not dequantised."""
        raise NotDefined("not defined: the model's decoder is a density, not a law of grey levels")

    def nelbo(self, x: Tensor, times: int = 1, generator: Generator = None) -> Tensor:
        """The negative evidence lower bound, nats (B,), residual at eps included."""
        return sum(self.nelbo_parts(x, times=times, generator=generator).values())

    def nll(self, x: Tensor, rtol: float = 1e-5, atol: float = 1e-5, **options) -> Tensor:
        """The probability-flow ODE's negative log-likelihood, nats (B,), residual at eps included."""
        parts = self.nll_parts(x, rtol=rtol, atol=atol, **options)
        return sum(value for name, value in parts.items() if name != "nfe")


class NotDefined(ValueError):
    """A quantity this model does not have; the message is the reason shown in the tables."""
