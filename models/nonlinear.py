"""Diffusions whose forward process is learned in data space: what DiffFlow and Schrodinger bridges share.

dx = F(x, t) dt + g(t) dw from data at t_0 to the prior at t_N; in reverse time dx = R(x, t) ds + g(t) dw. In this
notation every such model has score s = (F + R) / g^2 and probability-flow velocity (F - R) / 2, so that one chain
bound, one ODE likelihood and one sampler serve all of them.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.base import Model, NotDefined
from models.chain import Kernel, backward_path, chain_bound
from models.integrators import (
    Field,
    ProbeKind,
    Probes,
    Reference,
    Solver,
    dormand_prince,
    probes_of,
    resolve_probes,
    value_and_trace,
)
from models.noise import Generator, normal
from models.samplers import SAMPLERS
from models.sde import normal_log_prob


class TimedNetwork(nn.Module):
    """drift(x, t) = factor * net(x, condition of t): a score network used as a drift on [t_0, t_N].

    ``net`` is any entry of the registry of score networks. Its condition covers the range that it was made for.
    """

    def __init__(self, net: nn.Module, start: float, end: float, factor: float):
        super().__init__()
        self.net, self.start, self.end, self.factor = net, start, end, factor

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """t (B,) in [t_0, t_N] -> a field of x's shape."""
        position = (t - self.start) / (self.end - self.start)
        kind = self.net.time_input
        if kind == "time999":
            condition = 999.0 * position
        else:
            condition = 12.0 * position - 6.0
            condition = condition.exp() if kind == "sigma" else condition
        return self.factor * self.net(x, condition)


class NonlinearDiffusion(Model):
    """A chain on ``times`` (N + 1,) with learned drifts in both directions; prior N(0, prior_std^2 I).

    ``scale`` divides the data first; its log-determinant is counted.
    """

    curve_sampler = "euler_maruyama"
    bound_is_chain = True

    def __init__(self, shape: Sequence[int], times: Tensor, prior_std: float = 1.0, scale: float = 1.0):
        super().__init__()
        self.shape, self.prior_std, self.scale = tuple(shape), prior_std, scale
        self.register_buffer("times", times.double(), persistent=False)
        self.nfe: float | None = None

    @property
    def chain_steps(self) -> int:
        return len(self.times) - 1

    @abstractmethod
    def forward_drift(self, x: Tensor, t: Tensor) -> Tensor:
        """F(x, t) of x's shape; t (B,)."""

    @abstractmethod
    def reverse_drift(self, x: Tensor, t: Tensor) -> Tensor:
        """R(x, t), the drift in reverse time, of x's shape; t (B,)."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t), a scalar tensor for a scalar t."""

    def grid(self, steps: int) -> Tensor:
        """The times of a chain of another number of steps over the same interval, (steps + 1,) float64.

        Interpolates the model's own grid, so that its uneven spacing is kept.
        """
        old = torch.linspace(0, 1, len(self.times), dtype=torch.float64)
        new = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        left = torch.searchsorted(old, new, right=True).clamp(1, len(old) - 1) - 1
        share = (new - old[left]) / (old[left + 1] - old[left])
        times = self.times.cpu()
        return times[left] + share * (times[left + 1] - times[left])

    def kernels(self, times: Tensor):
        """(forward, backward) kernels of the Euler-Maruyama chain on ``times``."""

        def forward(x: Tensor, i: int) -> Kernel:
            t, width = self._at(times[i], x), float(times[i + 1] - times[i])
            variance = (self.diffusion(times[i]) ** 2 * width).to(x)
            return Kernel(x + width * self.forward_drift(x, t), variance)

        def backward(x: Tensor, i: int) -> Kernel:
            t, width = self._at(times[i + 1], x), float(times[i + 1] - times[i])
            variance = (self.diffusion(times[i + 1]) ** 2 * width).to(x)
            return Kernel(x + width * self.reverse_drift(x, t), variance)

        return forward, backward

    @staticmethod
    def _at(time: Tensor, x: Tensor) -> Tensor:
        return time.to(x).expand(len(x))

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log pi(x) in nats (B,)."""
        return normal_log_prob(x, self.prior_std)

    def _volume(self, x: Tensor) -> Tensor:
        return torch.full((len(x),), x[0].numel() * math.log(self.scale), dtype=x.dtype, device=x.device)

    @torch.no_grad()
    def chain_parts(self, x: Tensor, generator: Generator = None) -> dict[str, Tensor]:
        """Parts of the chain's own bound (models.chain) over one path, nats (B,); they depend on the step count."""
        forward, backward = self.kernels(self.times.cpu())
        parts = chain_bound(x / self.scale, len(self.times) - 1, forward, backward, self.prior_log_prob, generator)
        return parts | {"reconstruction": torch.zeros_like(parts["prior"]), "flow": self._volume(x)}

    def nelbo_parts(self, x: Tensor, times: int = 1, generator: Generator = None) -> dict[str, Tensor]:
        """The same bound, nats (B,), over one path, or more if ``times`` exceeds the steps of one.

        A model that learns its forward process on a chain has no other: the chain starts at the data itself.
        """
        paths = [self.chain_parts(x, generator) for _ in range(max(1, times // (len(self.times) - 1)))]
        return {name: torch.stack([path[name] for path in paths]).mean(0) for name in paths[0]}

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The probability-flow ODE's velocity (F - R) / 2."""
        return 0.5 * (self.forward_drift(x, t) - self.reverse_drift(x, t))

    def _field(self, probes: Probes | None) -> Field:
        return lambda t, x: value_and_trace(lambda x: self.velocity(x, t), x, probes)

    @torch.no_grad()
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
        """Parts of the probability-flow ODE's negative log-likelihood, nats (B,), and nfe (B,).

        The chain starts at the data itself, so that there is no truncation and ``corrected`` changes nothing.
        NotDefined for the ``solver`` "adams", whose variable is a linear diffusion's, and for the ``reference`` of it.
        """
        if solver != "dopri5":
            raise NotDefined(f"not defined: the solver {solver} is made for linear diffusions, and this one is learned")
        if reference is not None:
            raise NotDefined("not defined: a reference is for linear diffusions, and this one is learned")
        vectors = resolve_probes(probes, x, generator, probe_kind)
        z, divergence, nfe = dormand_prince(
            lambda rows: self._field(probes_of(vectors, rows)),
            x / self.scale,
            *self._ends(x),
            rtol,
            atol,
            fixed_shape=fixed_shape,
        )
        zeros = torch.zeros_like(divergence)
        return {
            "prior": -self.prior_log_prob(z),
            "ode": -divergence,
            "reconstruction": zeros,
            "flow": self._volume(x),
            "nfe": nfe,
        }

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.full((len(x),), float(self.times[i]), dtype=x.dtype, device=x.device) for i in (0, -1))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        steps: int = 0,
        sampler: str = "euler_maruyama",
        generator: Generator = None,
        rtol: float = 1e-4,
        atol: float = 1e-4,
        **options: Any,
    ) -> Tensor:
        """n samples (n, *shape): "euler_maruyama" is the backward chain with ``steps`` steps (0: the model's own).

        "ode" solves the probability flow adaptively, to ``rtol`` and ``atol``. NotDefined for the other samplers of
        models.samplers, which are made for linear diffusions, and for ``options`` of these two that are not at their
        defaults.
        """
        if sampler not in ("ode", "euler_maruyama"):
            raise NotDefined(f"not defined: {sampler} integrates linear diffusions, and this one is learned")
        known = inspect.signature(SAMPLERS[sampler]).parameters
        for key, value in options.items():
            if key not in known or value not in (None, known[key].default):
                raise NotDefined(f"not defined: {key} = {value!r} is for linear diffusions, and this one is learned")
        like = next(self.parameters(), torch.zeros(()))
        x = self.prior_std * normal((n, *self.shape), generator, like.device, like.dtype)
        if sampler == "ode":
            start, end = self._ends(x)
            field = self._field(None)
            x, _, nfe = dormand_prince(lambda rows: field, x, end, start, rtol, atol)
            self.nfe = float(nfe.double().mean())
        else:
            steps = steps or len(self.times) - 1
            _, backward = self.kernels(self.grid(steps))
            x, self.nfe = backward_path(x, steps, backward, generator)[0], float(steps)
        return x * self.scale

    @torch.no_grad()
    def trajectory(self, x: Tensor, times: Sequence[float], generator: Generator = None) -> Tensor:
        """The forward chain at the given fractions of its duration, (len(times), B, *shape)."""
        steps = len(self.times) - 1
        forward, _ = self.kernels(self.times.cpu())
        path = [x / self.scale]
        for i in range(steps):
            path.append(forward(path[-1], i).sample(generator))
        elapsed = (self.times - self.times[0]) / (self.times[-1] - self.times[0])
        rows = [int((elapsed - time).abs().argmin()) for time in times]
        return torch.stack([path[row] for row in rows]) * self.scale
