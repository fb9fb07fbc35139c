"""Probability-flow ODE solving with per-sample error control, the divergence in the same pass.

In the time variable lambda = log(sigma / alpha) and the unit-variance state u = z / s, s^2 = alpha^2 + sigma^2, the
ODE dz = [f z - g^2 score / 2] dt of *every* linear SDE reads

    du / dlambda = b (noise(s u, t) - b u),    b = sigma / s,

a bounded, smooth field: a solver needs far fewer evaluations than in t, where it is stiff at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from models.adams import Adams
from models.adaptive import Field, integrate
from models.adaptive import IntegrationError as IntegrationError
from models.noise import Generator, normal, rademacher
from models.runge_kutta import DORMAND_PRINCE
from models.sde import LinearSDE, Noise, expand

# In lambda the probability-flow field is flat at both ends; a longer step could pass over all that happens between.
MAX_STEP = 6.0
ADAMS_MAX_STEP = 1.0
Solver = Literal["dopri5", "adams"]
ProbeKind = Literal["rademacher", "gaussian", "orthogonal"]
# How a divergence is computed: averaged over Hutchinson probes (K, B, ...), or "exact" by one product a dimension.
# None, where it is accepted: not at all, zeros in its place.
Probes = Tensor | Literal["exact"]
# (mean, std) of the law in whose frame the multistep solver moves: GaussianFrame
Reference = tuple[Tensor | float, float]


def state_scale(sde: LinearSDE, t: Tensor) -> tuple[Tensor, Tensor]:
    """(s, b) with s^2 = alpha^2 + sigma^2 and b = sigma / s, shapes of t."""
    alpha, sigma = sde.marginal(t)
    scale = torch.hypot(alpha, sigma)
    return scale, sigma / scale


def flow_field(noise: Noise, sde: LinearSDE, probes: Probes | None = None) -> Field:
    """field(lambda (B,), u (B, ...)) -> (du, divergence (B,)) of the probability-flow ODE in (lambda, u).

    ``probes``: how the divergence is computed (:data:`Probes`); it shares the drift's forward pass.
    """

    def field(log_ratio: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        t = sde.time(log_ratio)
        scale, b = state_scale(sde, t)
        scale, b_wide = expand(scale, u), expand(b, u)
        predicted, trace = value_and_trace(lambda u: noise(scale * u, t), u, probes)
        return b_wide * (predicted - b_wide * u), trace if probes is None else b * (trace - b * u[0].numel())

    return field


class GaussianFrame:
    """The probability-flow ODE as seen from data N(mean, std^2 I), in which such data stand still.

    With y = z / alpha and r = sigma / alpha, every linear SDE's ODE is dy = noise dr. With r = std sinh(theta) and
    v = (y - mean) / sqrt(std^2 + r^2) it reads dv / dtheta = noise - tanh(theta) v, which is zero for the score of that
    law, whose v is constant: what is solved is the difference from it. Below std, theta runs like r and not like log r:
    little happens there to data of that width. Far above it little happens to any data: another mean's trace falls like
    1 / cosh(theta). So theta = sinh(k tau) / k, k = ``FAR``, and tau is what a solver steps in. ``mean``: a number or a
    tensor of a sample's shape.
    """

    FAR = 0.55

    def __init__(self, sde: LinearSDE, mean: Tensor | float = 0.0, std: float = 0.5):
        self.sde, self.mean, self.std = sde, mean, std
        times = torch.tensor([sde.eps, 1.0], dtype=torch.float64)
        self._ratios = sde.log_ratio(times).exp()
        self._alphas = sde.marginal(times)[0]
        self._widths = torch.hypot(self._ratios, torch.tensor(std, dtype=torch.float64))

    def ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """tau (B,) at times eps and 1."""
        theta = torch.asinh(self._ratios / self.std)
        low, high = (torch.asinh(self.FAR * theta) / self.FAR).to(like)
        return low.expand(len(like)), high.expand(len(like))

    def enter(self, z: Tensor, end: int) -> Tensor:
        """v from z (B, ...) at time eps (``end`` 0) or 1."""
        return (z / self._alphas[end].to(z) - self.mean) / self._widths[end].to(z)

    def leave(self, v: Tensor, end: int) -> Tensor:
        """z (B, ...) from v at time eps (``end`` 0) or 1."""
        return self._alphas[end].to(v) * (self.mean + self._widths[end].to(v) * v)

    def stretch(self, dims: int) -> float:
        """log|det| that the change of z to v leaves out of the integral from eps to 1, nats."""
        scale = (self._alphas * self._widths).log()
        return dims * float(scale[1] - scale[0])

    def field(self, noise: Noise, probes: Probes | None = None) -> Field:
        """field(tau (B,), v (B, ...)) -> (dv, divergence (B,)); ``probes``: :data:`Probes`."""

        def field(tau: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            theta, pace = (self.FAR * tau).sinh() / self.FAR, (self.FAR * tau).cosh()
            ratio, width, pull = self.std * theta.sinh(), self.std * theta.cosh(), theta.tanh()
            t = self.sde.time(ratio.log())
            alpha, width = expand(self.sde.marginal(t)[0], v), expand(width, v)
            wide, fast = expand(pull, v), expand(pace, v)
            predicted, trace = value_and_trace(lambda v: noise(alpha * (self.mean + width * v), t), v, probes)
            drift = fast * (predicted - wide * v)
            return drift, trace if probes is None else pace * (trace - pull * v[0].numel())

        return field


def value_and_trace(function: Callable[[Tensor], Tensor], x: Tensor, probes: Probes | None) -> tuple[Tensor, Tensor]:
    """(function(x) (B, ...), the trace of its Jacobian at x (B, ...), of each sample (B,)), from one forward pass.

    ``function`` treats the samples of a batch apart and keeps their shape. With probes or "exact" neither result
    carries a graph; with None the trace is zero. ValueError for another string.
    """
    if probes is None:
        return function(x), x.new_zeros(len(x))
    if not isinstance(probes, Tensor) and probes != "exact":
        raise ValueError(f"probes = {probes!r}: accepted are exact, None and a tensor (K, B, ...)")
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = function(leaf)
        trace = probed_trace(output, leaf, probes) if isinstance(probes, Tensor) else exact_trace(output, leaf)
    return output.detach(), trace


def probed_trace(output: Tensor, leaf: Tensor, probes: Tensor) -> Tensor:
    """Mean over ``probes`` v (K, B, ...) of v' J v, J = d output / d leaf of each sample, (B,): Hutchinson 1990.

    One vector-Jacobian product a probe; the graph from ``leaf`` (B, ...) to ``output`` (B, ...) is used up.
    """
    total = 0.0
    for k, probe in enumerate(probes):
        (product,) = torch.autograd.grad(output, leaf, probe, retain_graph=k + 1 < len(probes))
        total = total + (product * probe).flatten(1).sum(1)
    return total / len(probes)


def exact_trace(output: Tensor, leaf: Tensor) -> Tensor:
    """The trace of d output / d leaf of each sample, (B,), by one vector-Jacobian product a dimension.

    The graph from ``leaf`` (B, ...) to ``output`` (B, ...) is used up.
    """
    flat = output.flatten(1)
    dims = flat.shape[1]
    columns = []
    for d in range(dims):
        (product,) = torch.autograd.grad(flat[:, d].sum(), leaf, retain_graph=d + 1 < dims)
        columns.append(product.flatten(1)[:, d])
    return torch.stack(columns, 1).sum(1)


def hutchinson_probes(
    count: int, shape, generator: Generator, device=None, dtype=None, kind: ProbeKind = "rademacher"
) -> Tensor:
    """(count, *shape) probes v with E[v v'] = I, fixed for a whole trajectory; ``shape`` is (B, ...).

    "rademacher": random signs (Hutchinson 1990), no variance from a diagonal Jacobian. "gaussian": standard normals.
    "orthogonal": blocks of at most D mutually orthogonal directions of norm sqrt(D), uniform on the sphere, each
    sample with its own: the average over D of them is the trace itself, whatever the Jacobian. ValueError otherwise.
    """
    if kind == "rademacher":
        return torch.stack([rademacher(shape, generator, device, dtype) for _ in range(count)])
    if kind == "gaussian":
        return torch.stack([normal(shape, generator, device, dtype) for _ in range(count)])
    if kind != "orthogonal":
        raise ValueError(f"kind = {kind!r}: accepted are rademacher, gaussian, orthogonal")
    batch, dims = shape[0], math.prod(shape[1:])
    # QR leaves a column's sign to convention, which a quadratic form does not see
    blocks = [
        torch.linalg.qr(normal((batch, dims, min(dims, count - first)), generator, device, dtype)).Q
        for first in range(0, count, dims)
    ]
    return math.sqrt(dims) * torch.cat(blocks, 2).permute(2, 0, 1).reshape(count, *shape)


def resolve_probes(
    probes: int | Literal["exact"], like: Tensor, generator: Generator, kind: ProbeKind = "rademacher"
) -> Probes:
    """So many :func:`hutchinson_probes` (K, B, ...) of the shape, dtype and device of ``like`` (B, ...); or "exact".

    ValueError for another string and for less than one probe.
    """
    if probes == "exact":
        return probes
    if not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes = {probes!r}: accepted are exact and 1 or more")
    return hutchinson_probes(probes, like.shape, generator, like.device, like.dtype, kind)


def probes_of(probes: Probes, rows: Tensor) -> Probes:
    """Those of the samples ``rows`` of a batch."""
    return probes[:, rows] if isinstance(probes, Tensor) else probes


def likelihood_path(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    probes: Probes,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    solver: Solver = "dopri5",
    reference: Reference | None = None,
    fixed_shape: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The probability-flow ODE from z (B, ...) at eps: (z_1, log|det dz_1/dz| (B,) nats, network evaluations (B,)).

    ``solver``: "dopri5", the pair of Dormand and Prince in lambda, or "adams", the multistep method of models.adams in
    the :class:`GaussianFrame` of the ``reference`` (mean, std), by default (0, 0.5), for data in [-1, 1]. ValueError
    otherwise.
    """
    if solver == "adams":
        mean, std = (0.0, 0.5) if reference is None else reference
        frame = GaussianFrame(sde, mean.to(z) if isinstance(mean, Tensor) else mean, std)

        def adams_field(rows: Tensor) -> Field:
            return frame.field(noise, probes_of(probes, rows))

        limits = {"max_step": ADAMS_MAX_STEP, "fixed_shape": fixed_shape}
        v, divergence, nfe = integrate(Adams(), adams_field, frame.enter(z, 0), *frame.ends(z), rtol, atol, **limits)
        return frame.leave(v, 1), divergence + frame.stretch(z[0].numel()), nfe
    if solver != "dopri5":
        raise ValueError(f"solver = {solver!r}: accepted are dopri5, adams")
    low, high = sde.log_ratio_range(torch.zeros(1, dtype=z.dtype, device=z.device))
    ends = torch.tensor([sde.eps, 1.0], dtype=torch.float64)
    scales = state_scale(sde, ends)[0]
    u, divergence, nfe = dormand_prince(
        lambda rows: flow_field(noise, sde, probes_of(probes, rows)),
        z / scales[0].to(z),
        low.expand(len(z)),
        high.expand(len(z)),
        rtol,
        atol,
        max_step=MAX_STEP,
        fixed_shape=fixed_shape,
    )
    # the state was divided by s(t): its log-determinant is dims (log s(1) - log s(eps))
    stretch = z[0].numel() * float(scales[1].log() - scales[0].log())
    return u * scales[1].to(z), divergence + stretch, nfe


def dormand_prince(
    field_for: Callable[[Tensor], Field],
    u: Tensor,
    start: Tensor,
    end: Tensor,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_nfe: int = 10_000,
    max_step: float = math.inf,
    fixed_shape: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Integrate every sample from ``start`` (B,) to ``end`` (B,) by the pair of Dormand and Prince, with its own steps.

    Returns (u at the end (B, ...), integral of the divergence (B,), network evaluations (B,)): see
    :func:`models.adaptive.integrate`, also for the other arguments. Raises IntegrationError.
    """
    limits = {"max_nfe": max_nfe, "max_step": max_step, "fixed_shape": fixed_shape}
    return integrate(DORMAND_PRINCE, field_for, u, start, end, rtol, atol, **limits)
