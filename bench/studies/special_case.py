"""Claim special-case: INDM with the identity flow is the linear diffusion, bit for bit."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from bench.studies import Context
from bench.studies.linear_diffusion import LinearDiffusion
from models.flows import Identity
from models.indm import INDM
from models.noise import IndexedGenerator, StepRandom

QUANTITIES = (
    "likelihood_loss",
    "likelihood_loss_gradient",
    "variance_weighted_loss",
    "variance_weighted_loss_gradient",
    "nelbo",
    "nll",
    "samples_ddim",
    "samples_euler_maruyama",
)
STEPS, TIMES, TOLERANCE = 4, 4, 1e-3


def compare(context: Context, count: int) -> dict[str, tuple[float, int]]:
    """For each quantity the largest absolute difference, and how many numbers were compared, on ``count`` images.

    The same random numbers go through both; NaN where a number is not finite. Raises ValueError where the flow is not
    the identity.
    """
    model = context.model
    if not isinstance(model, INDM) or not isinstance(model.flow, Identity):
        raise ValueError("the flow is not the identity")
    whole = copy.deepcopy(model).eval().requires_grad_(True)
    # laws of time in training are compared at their defaults
    whole.proposal, whole.soft_truncation = None, None
    linear = LinearDiffusion(whole.sde, whole.score, whole.scale, whole.time_sampling == "stratified")
    x, seed = context.points(count), context.run.seed
    shape, index = tuple(x.shape), torch.arange(len(x), device=x.device)
    probes = context.run.evaluate.probes
    weights = [p for p in whole.score.parameters() if p.requires_grad]

    def source(purpose: str) -> IndexedGenerator:
        return IndexedGenerator(seed, f"identities special case {purpose}", index)

    def step() -> StepRandom:
        return StepRandom(seed, 0, len(x), device=x.device)

    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    losses = {
        "likelihood_loss": (whole.bound_loss, linear.likelihood_loss),
        "variance_weighted_loss": (whole.variance_weighted_loss, linear.variance_weighted_loss),
    }
    for name, (theirs, ours) in losses.items():
        pairs[name] = theirs(x, step())[0].detach(), ours(x, step()).detach()
        if weights:
            pairs[f"{name}_gradient"] = (
                _gradient(theirs(x, step())[0], weights),
                _gradient(ours(x, step()), weights),
            )
    options = {"rtol": TOLERANCE, "atol": TOLERANCE, "probes": probes}
    parts = whole.nelbo_parts(x, TIMES, source("nelbo"), proposal="importance")
    pairs["nelbo"] = sum(parts.values()), linear.nelbo(x, TIMES, source("nelbo"))
    pairs["nll"] = whole.nll(x, generator=source("nll"), **options), linear.nll(x, generator=source("nll"), **options)
    for sampler in ("ddim", "euler_maruyama"):
        pairs[f"samples_{sampler}"] = (
            whole.sample(len(x), STEPS, sampler, source(sampler)),
            linear.sample(shape, STEPS, sampler, source(sampler), next(whole.parameters(), torch.zeros(()))),
        )
    return {name: (_largest(a, b), a.numel()) for name, (a, b) in pairs.items()}


def _gradient(loss: Tensor, weights: list[nn.Parameter]) -> Tensor:
    parts = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([p.flatten() for p in parts if p is not None])


def _largest(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; NaN where either side is not finite, since two failures are no agreement."""
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.nan
    return float((a - b).abs().max())
