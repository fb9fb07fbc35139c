"""Conventions about the flow in a likelihood: what is taken for its log-determinant, and which weights it has."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.conventions.case import Case, Row, dot
from models.base import NotDefined
from models.flows import Identity, ResidualFlow
from models.flows.lipschitz import Jacobian
from models.flows.log_det import Roulette, columns, log_det_from_columns
from models.flows.residual import EXACT_EVAL
from models.indm import INDM
from models.noise import IndexedGenerator, normal

# the official training estimate: two fixed powers, then a roulette of Poisson(2) length, a Gaussian probe
FIXED_TERMS = 2
ROULETTE = Roulette("poisson", rate=2.0)
ESTIMATES = 32  # of which the mean is taken: the standard error is over images, not over one roulette


def residual_flow(case: Case) -> ResidualFlow:
    """The model's flow; raises NotDefined where it has no residual blocks."""
    if isinstance(case.model.flow, Identity):
        raise NotDefined("the flow is the identity")
    if not isinstance(case.model.flow, ResidualFlow):
        raise NotDefined("the flow has no residual blocks")
    return case.model.flow


def block_jacobians(flow: ResidualFlow, x: Tensor) -> Iterator[tuple[Jacobian, Tensor]]:
    """(J of the residual branch, its input (B, ...)) of each block, at x (B, *shape)."""
    a = flow._enter(x)
    for level, chains in enumerate(flow._chains()):
        a = F.pixel_unshuffle(a, 2) if level else a
        for chain in chains:
            change, jacobian = chain.linearise(a)
            yield jacobian, a
            a = a + change


def neumann(jacobian: Jacobian, like: Tensor, source: IndexedGenerator) -> Tensor:
    """One estimate of tr J (I + J)^-1 = sum_k (-1)^k tr J^(k+1), (B,), as INDM's training takes for log|det(I + J)|.

    Each sample has its own roulette; the official code draws one for the batch.
    """
    probe = normal(like.shape, source, like.device, like.dtype)
    depth = ROULETTE.draw(len(like), len(like), source).to(like.device)
    power, total = jacobian @ probe, torch.zeros(len(like), dtype=torch.float64, device=like.device)
    for k in range(FIXED_TERMS + int(depth.max()) + 1):
        extra = k - FIXED_TERMS
        weight = (depth >= extra) / ROULETTE.survival(extra)
        total = total + (-1) ** k * weight * dot(probe, power)
        power = jacobian @ power
    return total


def neumann_from_columns(matrices: Tensor) -> Tensor:
    """tr J (I + J)^-1 = D - tr (I + J)^-1 of matrices (..., D, D), exactly."""
    dims = matrices.shape[-1]
    identity = torch.eye(dims, dtype=matrices.dtype, device=matrices.device)
    return dims - torch.linalg.inv(identity + matrices).diagonal(dim1=-2, dim2=-1).sum(-1)


@torch.no_grad()
def training_surrogate(case: Case) -> Iterator[Row]:
    """The surrogate for the log-determinant in both likelihoods; closed form from the exact Jacobian of each block."""
    flow, scale = residual_flow(case), case.model.scale
    exact = math.prod(flow.shape) <= EXACT_EVAL

    def one(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        source = case.source("surrogate", rows)
        estimate = log_det = surrogate = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for jacobian, a in block_jacobians(flow, x / scale):
            for _ in range(ESTIMATES):
                estimate = estimate + neumann(jacobian, a, source) / ESTIMATES
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
