"""Conventions of sampling: how the flow is inverted, and how a sample is denoised at eps."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.conventions.case import Case, Row, bootstrap_error, row_of, standard_error
from bench.conventions.distance import compare_samples
from bench.conventions.flow import residual_flow
from models.base import NotDefined
from models.flows import ResidualFlow
from models.flows.lipschitz import TWO_PI
from models.sde import VESDE

TOLERANCE = 1e-5  # absolute and relative, on the squared change
MAX_ITERATIONS = 1000


@torch.no_grad()
def loose_inverse(flow: ResidualFlow, z: Tensor) -> Tensor:
    """h^{-1}(z) by the plain fixed point x <- y - g(x) of each block, from x = y - g(y).

    It stops when (x - x_before)^2 < 1e-5 + 1e-5 |y| for all elements of the batch, in data units.
    """
    a = flow.enter(z)
    for _ in flow.blocks[1:]:
        a = F.pixel_unshuffle(a, 2)
    for level, chains in reversed(list(enumerate(flow.chains()))):
        for chain in reversed(chains):
            goal = a
            limit = TWO_PI**2 * TOLERANCE * (1 + goal.abs() / TWO_PI)  # a = 2 pi x
            before, a = goal, goal - chain.value(goal)
            for _ in range(MAX_ITERATIONS):
                if bool(((a - before).square() < limit).all()):
                    break
                before, a = a, goal - chain.value(a)
        a = F.pixel_shuffle(a, 2) if level else a
    a = F.pixel_shuffle(a, 2) if flow.squeeze_first else a
    return a / TWO_PI


def inverse_tolerance(case: Case) -> Iterator[Row]:
    """Errors of samples against an inverse in float64, and what they do to the samples' distance."""
    flow, model = residual_flow(case), case.model
    z, right = case.latents.clean, case.right_samples
    exact = copy.deepcopy(flow).double().inverse(z.double()) * model.scale
    official = torch.cat([loose_inverse(flow, z[rows.to(z.device)]) for rows in case.batches(len(z))]) * model.scale
    unit, name = (1.0, "data units") if case.levels is None else (case.levels / 2, "grey levels")
    errors = [unit * (x.double() - exact).abs().flatten(1).cpu().numpy() for x in (right, official)]
    means = [error.mean(1) for error in errors]
    se = standard_error(means[1] - means[0])
    yield row_of("sample error, mean", name, float(means[0].mean()), float(means[1].mean()), len(z), se)
    largest = [error.max(1) for error in errors]
    se = bootstrap_error(lambda rows: float(largest[1][rows].max() - largest[0][rows].max()), len(z))
    yield row_of("sample error, largest", name, float(largest[0].max()), float(largest[1].max()), len(z), se)
    yield compare_samples(case, right, official)


def ve_denoising(case: Case) -> Iterator[Row]:
    """z + g(eps)^2 eps score instead of Tweedie's z + sigma^2 score: smaller by 2 log(sigma_max / sigma_min) eps."""
    sde = case.model.sde
    if not isinstance(sde, VESDE):
        raise NotDefined("only VE samples are left undenoised")
    latents, eps = case.latents, torch.tensor(sde.eps, dtype=torch.float64)
    share = float(sde.diffusion(eps)) ** 2 * sde.eps / latents.sigma**2
    official = latents.noisy - share * latents.sigma * latents.noise
    steps = [(z - latents.noisy).double().flatten(1) for z in (latents.clean, official)]
    squares = [step.square().mean(1).cpu().numpy() for step in steps]
    rms = [math.sqrt(square.mean()) for square in squares]
    # of a difference of roots of means, to first order
    first, second = (square / (2 * max(root, 1e-30)) for square, root in zip(squares, rms, strict=True))
    row = row_of("denoising step, rms", "latent units", *rms, len(latents.noisy), standard_error(second - first))
    ratio = 2 * math.log(sde.sigma_max / sde.sigma_min) * sde.eps
    row |= {"closed_form": rms[0] * (ratio - 1), "closed_form_se": standard_error(second - ratio * first)}
    yield row
    yield compare_samples(case, case.right_samples, case.decode(official))
