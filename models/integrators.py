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
from models.sde import LinearSDE, expand

# In lambda the probability-flow field is flat at both ends; a longer step could pass over all that happens between.
MAX_STEP = 6.0
ADAMS_MAX_STEP = 1.0
Solver = Literal["dopri5", "adams"]
ProbeKind = Literal["rademacher", "gaussian", "orthogonal"]


def state_scale(sde: LinearSDE, t: Tensor) -> tuple[Tensor, Tensor]:
    """(s, b) with s^2 = alpha^2 + sigma^2 and b = sigma / s, shapes of t."""
    alpha, sigma = sde.marginal(t)
    scale = torch.hypot(alpha, sigma)
    return scale, sigma / scale


def flow_field(noise: Callable[[Tensor, Tensor], Tensor], sde: LinearSDE, probes: Tensor | str | None = None) -> Field:
    """field(lambda (B,), u (B, ...)) -> (du, divergence (B,)) of the probability-flow ODE in (lambda, u).

    ``probes``: None (divergence not computed, zeros), "exact" (one product a dimension), or a tensor (K, B, ...) of
    Hutchinson probes, over which the estimate is averaged. Drift and divergence share one forward pass.
    """

    def field(log_ratio: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        t = sde.time(log_ratio)
        scale, b = state_scale(sde, t)
        scale, b_wide = expand(scale, u), expand(b, u)
        if probes is None:
            return b_wide * (noise(scale * u, t) - b_wide * u), u.new_zeros(len(u))
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            output = noise(scale * leaf, t)
            trace = exact_trace(output, leaf) if isinstance(probes, str) else probed_trace(output, leaf, probes)
        return b_wide * (output.detach() - b_wide * u), b * (trace - b * u[0].numel())

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

    def field(self, noise: Callable[[Tensor, Tensor], Tensor], probes: Tensor | str | None = None) -> Field:
        """field(tau (B,), v (B, ...)) -> (dv, divergence (B,)); ``probes`` as in :func:`flow_field`."""

        def field(tau: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            theta, pace = (self.FAR * tau).sinh() / self.FAR, (self.FAR * tau).cosh()
            ratio, width, pull = self.std * theta.sinh(), self.std * theta.cosh(), theta.tanh()
            t = self.sde.time(ratio.log())
            alpha, width = expand(self.sde.marginal(t)[0], v), expand(width, v)
            wide, fast = expand(pull, v), expand(pace, v)
            if probes is None:
                return fast * (noise(alpha * (self.mean + width * v), t) - wide * v), v.new_zeros(len(v))
            with torch.enable_grad():
                leaf = v.detach().requires_grad_()
                output = noise(alpha * (self.mean + width * leaf), t)
                trace = exact_trace(output, leaf) if isinstance(probes, str) else probed_trace(output, leaf, probes)
            return fast * (output.detach() - wide * v), pace * (trace - pull * v[0].numel())

        return field


def probed_trace(output: Tensor, leaf: Tensor, probes: Tensor) -> Tensor:
    total = 0.0
    for k, probe in enumerate(probes):
        (product,) = torch.autograd.grad(output, leaf, probe, retain_graph=k + 1 < len(probes))
        total = total + (product * probe).flatten(1).sum(1)
    return total / len(probes)


def exact_trace(output: Tensor, leaf: Tensor) -> Tensor:
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


def likelihood_path(
    noise: Callable[[Tensor, Tensor], Tensor],
    sde: LinearSDE,
    z: Tensor,
    probes: Tensor | str,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    solver: Solver = "dopri5",
    reference: tuple[Tensor | float, float] = (0.0, 0.5),
    fixed_shape: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The probability-flow ODE from z (B, ...) at eps: (z_1, log|det dz_1/dz| (B,) nats, network evaluations (B,)).

    ``solver``: "dopri5", the pair of Dormand and Prince in lambda, or "adams", the multistep method of models.adams in
    the :class:`GaussianFrame` of the ``reference`` (mean, std), by default one for data in [-1, 1]. ValueError
    otherwise.
    """
    whole = isinstance(probes, str)
    if solver == "adams":
        mean, std = reference
        frame = GaussianFrame(sde, mean.to(z) if isinstance(mean, Tensor) else mean, std)

        def adams_field(rows: Tensor) -> Field:
            return frame.field(noise, probes if whole else probes[:, rows])

        limits = {"max_step": ADAMS_MAX_STEP, "fixed_shape": fixed_shape}
        v, divergence, nfe = integrate(Adams(), adams_field, frame.enter(z, 0), *frame.ends(z), rtol, atol, **limits)
        return frame.leave(v, 1), divergence + frame.stretch(z[0].numel()), nfe
    if solver != "dopri5":
        raise ValueError(f"solver = {solver!r}: accepted are dopri5, adams")
    low, high = sde.log_ratio_range(torch.zeros(1, dtype=z.dtype, device=z.device))
    ends = torch.tensor([sde.eps, 1.0], dtype=torch.float64)
    scales = state_scale(sde, ends)[0]
    u, divergence, nfe = dormand_prince(
        lambda rows: flow_field(noise, sde, probes if whole else probes[:, rows]),
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
