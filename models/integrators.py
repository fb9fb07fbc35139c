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

from models.noise import Generator, normal, rademacher
from models.sde import LinearSDE, expand

Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# In lambda the probability-flow field is flat at both ends; a longer step could pass over all that happens between.
MAX_STEP = 6.0
ProbeKind = Literal["rademacher", "gaussian", "orthogonal"]

# Dormand and Prince 1980, RK5(4)7M: nodes, stages, and the difference of the fifth- and fourth-order weights
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


class IntegrationError(RuntimeError):
    """The adaptive solver could not reach the end within its evaluations, or met a non-finite value."""


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


def dormand_prince(
    field_for: Callable[[Tensor], Field],
    u: Tensor,
    start: Tensor,
    end: Tensor,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_nfe: int = 10_000,
    max_step: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor]:
    """Integrate every sample from ``start`` (B,) to ``end`` (B,) with its own adaptive step.

    ``field_for(rows)`` gives the field of the samples ``rows`` (their probes travel with them). Returns
    (u at the end (B, ...), integral of the divergence (B,), network evaluations (B,)). A sample that is done leaves
    the batch. The divergence is under error control too, at ``atol`` nats a dimension. ``max_step``: no step is longer;
    an error estimate sees nothing of what lies between the stages of a step.
    """
    total, dims = len(u), u[0].numel()
    out_u, out_l, nfe = torch.empty_like(u), u.new_zeros(total), torch.zeros(total, dtype=torch.long, device=u.device)
    rows = torch.arange(total, device=u.device)
    position, span = start.clone(), end - start
    remaining = torch.ones_like(start)
    fraction = torch.full_like(start, 0.02)  # step as a share of the whole span
    log_det = u.new_zeros(total)
    field = field_for(rows)
    slope = field(position, u)
    used = 1
    while len(rows):
        if used + 6 > max_nfe:
            raise IntegrationError(f"{len(rows)} of {total} trajectories unfinished after {used} evaluations")
        step_fraction = torch.minimum(torch.minimum(fraction, max_step / span.abs()), remaining)
        h = step_fraction * span
        ks, ls = [slope[0]], [slope[1]]
        for node, weights in zip(_NODES[1:], _STAGES[1:], strict=True):
            stage = u + expand(h, u) * _combine(weights, ks)
            k, divergence = field(position + node * h, stage)
            ks.append(k)
            ls.append(divergence)
        used += 6
        # the last stage sits at the fifth-order solution, so its slope opens the next step
        l_new = log_det + h * _combine(_STAGES[-1], ls)
        error_u = (expand(h, u) * _combine(_ERROR, ks)) / (atol + rtol * torch.maximum(u.abs(), stage.abs()))
        error_l = h * _combine(_ERROR, ls) / (atol * dims + rtol * torch.maximum(log_det.abs(), l_new.abs()))
        error = torch.maximum(error_u.flatten(1).square().mean(1).sqrt(), error_l.abs())
        if not bool(torch.isfinite(error).all()):
            bad = rows[~torch.isfinite(error)].tolist()
            raise IntegrationError(f"non-finite value in the ODE for samples {bad[:8]} after {used} evaluations")
        accept = error <= 1
        wide = expand(accept, u)
        u = torch.where(wide, stage, u)
        log_det = torch.where(accept, l_new, log_det)
        position = torch.where(accept, position + h, position)
        remaining = torch.where(accept, remaining - step_fraction, remaining)
        slope = torch.where(wide, ks[-1], ks[0]), torch.where(accept, ls[-1], ls[0])
        fraction = step_fraction * (0.9 * error.clamp_min(1e-10) ** -0.2).clamp(0.2, 5.0)
        done = remaining <= 1e-7
        if bool(done.any()):
            out_u[rows[done]], out_l[rows[done]], nfe[rows[done]] = u[done], log_det[done], used
            keep = ~done
            rows, u, log_det, position = rows[keep], u[keep], log_det[keep], position[keep]
            span, remaining, fraction = span[keep], remaining[keep], fraction[keep]
            slope = slope[0][keep], slope[1][keep]
            field = field_for(rows)
    return out_u, out_l, nfe


def _combine(weights, values: list[Tensor]) -> Tensor:
    total = None
    for weight, value in zip(weights, values, strict=False):
        if weight:
            total = weight * value if total is None else torch.add(total, value, alpha=weight)
    return total
