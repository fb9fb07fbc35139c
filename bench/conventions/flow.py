"""Conventions about the flow in a likelihood: what is taken for its log-determinant, and which weights it has."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.conventions.case import Case, Row
from models.base import NotDefined
from models.flows import Identity, ResidualFlow
from models.flows.lipschitz import Jacobian
from models.flows.log_det import columns, log_det_from_columns
from models.flows.residual import EXACT_EVAL
from models.indm import INDM
from models.noise import IndexedGenerator, rademacher

PROBES = 64  # whose mean is taken
TRUNCATION = 1e-4  # nats of one block that the terms left out may hold, by a bound that holds for certain


def residual_flow(case: Case) -> ResidualFlow:
    """The model's flow; raises NotDefined where it has no residual blocks."""
    if isinstance(case.model.flow, Identity):
        raise NotDefined("the flow is the identity")
    if not isinstance(case.model.flow, ResidualFlow):
        raise NotDefined("the flow has no residual blocks")
    return case.model.flow


def block_jacobians(flow: ResidualFlow, x: Tensor) -> Iterator[tuple[Jacobian, Tensor]]:
    """(J of the residual branch, its input (B, ...)) of each block, at x (B, *shape)."""
    a = flow.enter(x)
    for level, chains in enumerate(flow.chains()):
        a = F.pixel_unshuffle(a, 2) if level else a
        for chain in chains:
            change, jacobian = chain.linearise(a)
            yield jacobian, a
            a = a + change


def neumann(jacobian: Jacobian, like: Tensor, source: IndexedGenerator, norm: float, probes: int = PROBES) -> Tensor:
    """tr J (I + J)^-1 = sum_k (-1)^k tr J^(k+1), nats (B,), which INDM's training takes for log|det(I + J)|.

    The official estimate has a Gaussian probe and a roulette of Poisson(2) length after two powers. Its mean is this
    sum and its variance infinite (:class:`models.flows.log_det.Roulette`), so that no number of its draws has a
    standard error. Here the mean itself: ``probes`` random signs v, and so many powers that no more than TRUNCATION
    nats are left out. For |v' J^n v| <= |v|_1 |J^n v|_inf, and every further J shrinks the last factor by ``norm``, a
    bound < 1 on J's infinity norm. A sample's value does not depend on its batch.
    """
    vectors = torch.stack([rademacher(like.shape, source, like.device, like.dtype) for _ in range(probes)])
    power, total = vectors, torch.zeros(len(like), dtype=torch.float64, device=like.device)
    left, sign = torch.arange(len(like), device=like.device), 1
    most = TRUNCATION * (1 - norm) / norm / like[0].numel()
    while len(left):
        power = jacobian @ power
        total[left] += sign * (vectors.double() * power.double()).flatten(2).sum(2).mean(0)
        sign, going = -sign, power.abs().flatten(2).amax(2).mean(0) > most
        if not bool(going.all()):
            left, vectors, power, jacobian = left[going], vectors[:, going], power[:, going], jacobian.at(going)
    return total


def neumann_from_columns(matrices: Tensor) -> Tensor:
    """tr J (I + J)^-1 = D - tr (I + J)^-1 of matrices (..., D, D), exactly."""
    dims = matrices.shape[-1]
    identity = torch.eye(dims, dtype=matrices.dtype, device=matrices.device)
    return dims - torch.linalg.inv(identity + matrices).diagonal(dim1=-2, dim2=-1).sum(-1)


@torch.no_grad()
def training_surrogate(case: Case) -> Iterator[Row]:
    """The surrogate's mean for log|det| in both likelihoods; closed form from each block's exact Jacobian."""
    flow, scale = residual_flow(case), case.model.scale
    exact = math.prod(flow.shape) <= EXACT_EVAL

    def one(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        source = case.source("surrogate", rows)
        estimate = log_det = surrogate = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for jacobian, a in block_jacobians(flow, x / scale):
            estimate = estimate + neumann(jacobian, a, source, flow.lipschitz)
            if exact:
                matrices = columns(jacobian, a).double()
                log_det = log_det + log_det_from_columns(matrices)
                surrogate = surrogate + neumann_from_columns(matrices)
        if not exact:
            log_det = flow(x / scale, case.source("flow", rows))[1]
        return estimate, log_det, surrogate

    estimate, log_det, surrogate = case.per_image(one)
    for quantity, right in (("NELBO", case.right_nelbo), ("NLL", case.right_nll)):
        closed_form = log_det - surrogate if exact else None
        yield case.likelihood_row(quantity, right, right + log_det - estimate, closed_form)


def raw_weights(case: Case) -> Iterator[Row]:
    """The averaged score behind the flow of the last step."""
    model = case.model
    if not any(True for _ in model.flow.parameters()):
        raise NotDefined("the flow has no weights")
    raw = case.context.raw_model()
    if raw is None:
        raise NotDefined("raw weights were not kept")
    mixed = INDM(model.sde, model.score, raw.flow.eval(), model.setting, model.shape, model.scale)
    yield case.likelihood_row("NELBO", case.right_nelbo, case.nelbo(mixed))
