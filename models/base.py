"""What the harness asks of a model, and what one optimiser step is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from models.integrators import ProbeKind, Reference, Solver
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
    # time at which its linear diffusion is cut off near the data; None for a model without one
    eps: float | None = None
    # the model's own discrete chain, an entry a step; None for a model that is continuous in time
    chain: Sized | None = None
    # whether nelbo_parts already bounds that chain, so that chain_parts has nothing to add
    bound_is_chain: ClassVar[bool] = False
    # training steps from one simulation of paths to the next; None for a model that keeps no paths
    refresh: int | None = None
    # whether training was tried with compiled networks, which have first derivatives alone, and may ask for them
    compilable: ClassVar[bool] = False

    @property
    def dims(self) -> int:
        """Number of dimensions of one sample."""
        size = 1
        for side in self.shape:
            size *= side
        return size

    @property
    def chain_steps(self) -> int | None:
        """Steps of the model's own discrete chain; None for a model that is continuous in time."""
        return None if self.chain is None else len(self.chain)

    @abstractmethod
    def phases(self) -> list[Phase]:
        """The optimiser steps of one training step, in order."""

    def milestones(self, steps: int) -> list[int]:
        """Steps, of so many in all, at which the learning curve is measured besides its own points."""
        return []

    def renews_paths(self, step: int) -> bool:
        """Whether kept paths are due to be simulated anew at a training step, which then costs more than the next."""
        return False

    def drop_paths(self) -> None:
        """Forget the kept paths, so that the next training step simulates new ones."""

    @abstractmethod
    def nelbo_parts(self, x: Tensor, times: int = 1, generator: Generator = None) -> dict[str, Tensor]:
        """Named parts, nats (B,), that sum to an unbiased estimate of the negative evidence lower bound."""

    @abstractmethod
    def nll_parts(
        self,
        x: Tensor,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        probes: int | Literal["exact"] = 1,
        corrected: bool = True,
        generator: Generator = None,
        probe_kind: ProbeKind = "rademacher",
        solver: Solver = "dopri5",
        reference: Reference | None = None,
        fixed_shape: bool | None = None,
    ) -> dict[str, Tensor]:
        """Named parts, nats (B,), of the probability-flow ODE's negative log-likelihood, and "nfe" (B,).

        ``rtol``, ``atol``: of the ``solver``, in the frame of its ``reference`` and with a batch of ``fixed_shape`` or
        not, as models.integrators.likelihood_path has them. ``probes``: Hutchinson probes of ``probe_kind`` a
        trajectory, or "exact". ``corrected``: count the residual at eps. A model without an option raises NotDefined
        where it is asked for another value than the default.
        """

    @abstractmethod
    def sample(self, n: int, steps: int, sampler: str, generator: Generator = None, **options) -> Tensor:
        """n samples (n, *shape) by the named sampler; the count of network evaluations is left in ``self.nfe``.

        ``options``: the sampler's own. NotDefined for a sampler or an option that is not made for this model.
        """

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
