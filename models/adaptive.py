"""Adaptive ODE solving with a step size for every sample of a batch, whatever the method of its steps.

Two ways to run one and the same arithmetic. On a CPU a sample that is done leaves the batch, so that nothing is
computed for it. On an accelerator the batch keeps its shape, samples that are done are frozen by masks, and the host
looks only every few steps whether all are: nothing waits for it in between, and a step is a function of tensors of
fixed shapes, which torch.compile and CUDA graphs can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.sde import expand

# field(position (B,), u (B, ...)) -> (du/dposition (B, ...), divergence (B,))
Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# the accuracy of "remaining": below it a sample has arrived
_ARRIVED = 1e-7


class IntegrationError(RuntimeError):
    """The adaptive solver could not reach the end within its evaluations, or met a non-finite value."""


class State(Protocol):
    """Where each sample of a batch of B stands: what every method's named tuple of tensors (B, ...) has at least."""

    u: Tensor  # (B, ...)
    log_det: Tensor  # (B,) the integral of the divergence so far
    position: Tensor  # (B,)
    remaining: Tensor  # (B,) the share of the span that is left
    fraction: Tensor  # (B,) the next step as a share of the span
    nfe: Tensor  # (B,)


class Control(NamedTuple):
    """What a step's size is measured by: tolerances, the longest step, the span (B,)."""

    rtol: float
    atol: float
    max_step: float
    span: Tensor

    def share(self, fraction: Tensor, remaining: Tensor, going: Tensor) -> Tensor:
        """(B,) the next step as a share of the span; nothing for a sample that has arrived."""
        share = torch.minimum(torch.minimum(fraction, self.max_step / self.span.abs()), remaining)
        return torch.where(going, share, torch.zeros_like(share))

    def error(self, state: State, u: Tensor, l_new: Tensor, du: Tensor, dl: Tensor) -> Tensor:
        """(B,) the estimated errors du, dl of a step to u, l_new in units of what is allowed.

        Root mean square over a sample's entries, or the divergence's at ``atol`` nats a dimension, whichever is more.
        """
        dims = u[0].numel()
        error_u = du / (self.atol + self.rtol * torch.maximum(state.u.abs(), u.abs()))
        error_l = dl / (self.atol * dims + self.rtol * torch.maximum(state.log_det.abs(), l_new.abs()))
        return torch.maximum(error_u.flatten(1).square().mean(1).sqrt(), error_l.abs())


class Method(Protocol):
    """How one step is made. ``evaluations``: those of a step."""

    evaluations: int

    def begin(self, field: Field, u: Tensor, start: Tensor, span: Tensor) -> State:
        """The state before the first step; one evaluation."""

    def advance(self, field: Field, state: State, control: Control) -> tuple[State, Tensor]:
        """One step of every sample that has not arrived: (state, error (B,)), a step with error over 1 being rejected.

        No value is read by the host. Samples that have arrived are evaluated, and keep their state.
        """


def going(state: State) -> Tensor:
    """(B,) of samples that have not arrived."""
    return state.remaining > _ARRIVED


def opening(u: Tensor, start: Tensor, first: float) -> dict[str, Tensor]:
    """The fields of every :class:`State`, at u (B, ...) and position ``start`` (B,) after the one evaluation there.

    ``first``: the first step as a share of the span.
    """
    return {
        "u": u,
        "log_det": u.new_zeros(len(u)),
        "position": start.clone(),
        "remaining": torch.ones_like(start),
        "fraction": torch.full_like(start, first),
        "nfe": torch.ones(len(u), dtype=torch.long, device=u.device),
    }


def choose(accept: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` (B, ...) of the samples whose step is accepted, ``accept`` (B,), and ``old`` (B, ...) of the others."""
    return torch.where(expand(accept, old), new, old)


def integrate(
    method: Method,
    field_for: Callable[[Tensor], Field],
    u: Tensor,
    start: Tensor,
    end: Tensor,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_nfe: int = 10_000,
    max_step: float = math.inf,
    fixed_shape: bool | None = None,
    look_every: int = 4,
) -> tuple[Tensor, Tensor, Tensor]:
    """Integrate every sample from ``start`` (B,) to ``end`` (B,) with its own adaptive step.

    ``field_for(rows)`` gives the field of the samples ``rows`` (their probes travel with them). Returns
    (u at the end (B, ...), integral of the divergence (B,), network evaluations (B,)). The divergence is under error
    control too, at ``atol`` nats a dimension. ``max_step``: no step is longer; an error estimate sees nothing of what
    lies between the evaluations of a step.

    ``fixed_shape``: whether samples that are done stay in the batch, frozen, and the host looks every ``look_every``
    steps only; by default so except on a CPU. Both ways give a sample the same steps, and so the same ``nfe``.
    Raises IntegrationError.
    """
    control = Control(rtol, atol, max_step, end - start)
    if (u.device.type != "cpu") if fixed_shape is None else fixed_shape:
        return _frozen(method, field_for, u, start, control, max_nfe, look_every)
    return _leaving(method, field_for, u, start, control, max_nfe)


def _leaving(method, field_for, u, start, control, max_nfe):
    total = len(u)
    out_u, out_l, nfe = torch.empty_like(u), u.new_zeros(total), torch.zeros(total, dtype=torch.long, device=u.device)
    rows = torch.arange(total, device=u.device)
    field, used = field_for(rows), 1
    state = method.begin(field, u, start, control.span)
    while len(rows):
        _check_budget(used + method.evaluations <= max_nfe, len(rows), total, used)
        state, error = method.advance(field, state, control)
        used += method.evaluations
        if not bool(torch.isfinite(error).all()):
            raise _not_finite(rows[~torch.isfinite(error)].tolist(), used)
        done = ~going(state)
        if bool(done.any()):
            out_u[rows[done]], out_l[rows[done]], nfe[rows[done]] = state.u[done], state.log_det[done], state.nfe[done]
            keep = ~done
            rows, control = rows[keep], control._replace(span=control.span[keep])
            state = type(state)(*(part[keep] for part in state))
            field = field_for(rows)
    return out_u, out_l, nfe


def _frozen(method, field_for, u, start, control, max_nfe, look_every):
    total = len(u)
    field, used = field_for(torch.arange(total, device=u.device)), 1
    state = method.begin(field, u, start, control.span)
    bad = torch.zeros(total, dtype=torch.bool, device=u.device)
    left = total
    while left:
        _check_budget(used + method.evaluations <= max_nfe, left, total, used)
        for _ in range(min(look_every, (max_nfe - used) // method.evaluations)):
            before = going(state)
            state, error = method.advance(field, state, control)
            used += method.evaluations
            bad = bad | (before & ~torch.isfinite(error))
            # what is lost stops, for the others to be looked at
            state = state._replace(remaining=torch.where(bad, torch.zeros_like(start), state.remaining))
        left, lost = torch.stack([going(state).sum(), bad.sum()]).tolist()
        if lost:
            raise _not_finite(bad.nonzero().flatten().tolist(), used)
    return state.u, state.log_det, state.nfe


def _check_budget(enough: bool, left: int, total: int, used: int) -> None:
    if not enough:
        raise IntegrationError(f"{left} of {total} trajectories unfinished after {used} evaluations")


def _not_finite(bad: list[int], used: int) -> IntegrationError:
    return IntegrationError(f"non-finite value in the ODE for samples {bad[:8]} after {used} evaluations")
