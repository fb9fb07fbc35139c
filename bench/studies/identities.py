"""Study: four mathematical claims, checked on one trained run.

One row a quantity: its value, the ``expected`` one if the claim is true (None: no number is predicted), the standard
error ``se`` of value - expected (None where nothing is random), and ``n``, how many numbers or images it rests on.

special-case (value: largest absolute difference between INDM and a linear diffusion written out by itself; 0, not
nearly 0): both training losses and their gradients, the bound and the ODE's likelihood (nats), samples.

dsm-is-elbo: gradient_difference_squared, |E[g_1 - g_2]|^2 / |E g|^2 of the denoising loss and the ELBO of the plug-in
reverse SDE; bound_difference, ELBO form minus denoising form of the bound (suite's unit), constants included.

equivalent-sdes: energy_sde_w (and energy_sde_w_midway), squared energy distance in latent space between samples of the
family's members w and 0, at the end (and at the middle of log(sigma / alpha)); expected: that between two independent
samples of member 0. cnf_likelihood: likelihood of member 1 by a fixed-step solver of its own minus the ODE NLL before
correction (suite's unit); ``se`` includes what halving the steps changes. elbo_sde_w: bound of member w minus that of
member 1 (nats or bits/dim); 0 where the score is exact, otherwise the members are different models: none expected.

debiased-time: log_variance_ratio_uniform_over_p: logarithm of the ratio of one-draw variances of the bound's denoising
form, time drawn uniformly against proposal p of :mod:`models.time_sampling`, pooled over images; with _paired, of the
form that subtracts the drawn |n|^2 instead of its mean.
"""

from __future__ import annotations

import copy
import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bench.likelihood import Units
from bench.studies import Context, equivalence, matching, special_case, time_variance
from models.flows import FlowInverseError, Identity
from models.indm import INDM
from models.integrators import IntegrationError
from models.noise import IndexedGenerator
from models.options import Count

COLUMNS = ("claim", "quantity", "value", "expected", "se", "n", "status")
CLAIMS = {
    "special-case": special_case.QUANTITIES,
    "dsm-is-elbo": ("gradient_difference_squared", "bound_difference"),
    "equivalent-sdes": equivalence.QUANTITIES,
    "debiased-time": time_variance.QUANTITIES,
}
Draws = Annotated[int, Field(ge=4)]


def measure(
    context: Context,
    *,
    compared: Count = 8,
    gradient_images: Count | None = None,
    gradient_points: Count | None = None,
    bound_images: Count | None = None,
    bound_points: Count | None = None,
    draws: Draws = 16,
    samples: Annotated[int, Field(ge=20)] | None = None,
    sampler_steps: Annotated[int, Field(ge=2)] | None = None,
    likelihood_images: Annotated[int, Field(ge=2)] | None = None,
    likelihood_steps: Annotated[int, Field(ge=2)] | None = None,
    repeats: Draws | None = None,
    behind_flow: bool = False,
) -> list[dict[str, Any]]:
    """Rows of identities.csv; null settings depend on the data, points before images:

    ``compared``: images of special-case. dsm-is-elbo: ``draws`` repetitions, each with ``gradient_points`` (64, 8)
    noises for each of ``gradient_images`` (8, 4), and ``bound_points`` (128, 12) for ``bound_images`` (32, 16).
    ``samples`` (1500, 150) and ``sampler_steps`` (48, 24) of the family; ``likelihood_images`` (40, 4) and
    ``likelihood_steps`` (64, 32) of the fixed-step likelihoods. ``repeats`` (64, 32): draws for each of as
    many images for debiased-time. ``behind_flow``: measure a diffusion behind a flow too; the mathematics is that of
    its latents, so that a suite learns little from it for the time it takes.
    """
    if not isinstance(context.model, INDM):
        return [_row(c, q, "the model is not a linear diffusion behind a flow") for c in CLAIMS for q in CLAIMS[c]]
    if not behind_flow and not isinstance(context.model.flow, Identity):
        reason = "checked on linear diffusions; the latents behind a flow obey the same equations"
        return [_row(c, q, reason) for c in CLAIMS for q in CLAIMS[c]]
    is_points = len(context.data.shape) == 1
    units = Units(context.data)

    def setting(value: int | None, for_points: int, for_images: int) -> int:
        return value or (for_points if is_points else for_images)

    rows = _special_case(context, compared)
    gradients = setting(gradient_images, 8, 4), setting(gradient_points, 64, 8)
    bounds = setting(bound_images, 32, 16), setting(bound_points, 128, 12)
    rows += _matching(context, units, gradients, bounds, draws)
    rows += _equivalence(
        context,
        units,
        equivalence.Settings(
            samples=setting(samples, 1500, 150),
            steps=setting(sampler_steps, 48, 24),
            images=setting(likelihood_images, 40, 4),
            likelihood_steps=setting(likelihood_steps, 64, 32),
        ),
    )
    return rows + _debiased(context, setting(repeats, 64, 32))


def latents(context: Context, count: int, purpose: str) -> Tensor:
    """z_0 of the first ``count`` test images, (count, *shape)."""
    x = context.points(count)
    with torch.no_grad():
        source = IndexedGenerator(context.run.seed, f"identities {purpose}", torch.arange(len(x), device=x.device))
        return context.model.encode(x, source)[0]


def _special_case(context: Context, count: int) -> list[dict[str, Any]]:
    claim = "special-case"
    try:
        found = special_case.compare(context, count)
    except (ValueError, IntegrationError) as error:
        return [_row(claim, quantity, " ".join(str(error).split())) for quantity in CLAIMS[claim]]
    rows = []
    for quantity in CLAIMS[claim]:
        if quantity in found:
            value, n = found[quantity]
            rows.append(_row(claim, quantity, value=value, expected=0.0, n=n))
        else:
            rows.append(_row(claim, quantity, "the score has no weights"))
    return rows


def _matching(
    context: Context, units: Units, gradients: tuple[int, int], bounds: tuple[int, int], draws: int
) -> list[dict[str, Any]]:
    """``gradients`` and ``bounds``: images, and noises for each of them in each of the ``draws``."""
    claim = "dsm-is-elbo"
    first, second = CLAIMS[claim]
    z0 = latents(context, max(gradients[0], bounds[0]), "matching flow")
    model = copy.deepcopy(context.model).eval().requires_grad_(True)
    weights = [p for p in model.score.parameters() if p.requires_grad]
    if not weights:
        return [_row(claim, quantity, "the score has no weights") for quantity in CLAIMS[claim]]
    seed, sde = context.run.seed, model.sde
    some, many = z0[: gradients[0]], z0[: bounds[0]]
    found = matching.gradient_difference(model.noise, weights, sde, some, gradients[1], draws, seed)
    if found is None:
        rows = [_row(claim, first, "the gradient is lost in the noise of its draws")]
    else:
        rows = [_row(claim, first, value=found[0], expected=0.0, se=found[1], n=len(some))]
    gap, error = matching.bound_difference(context.model.noise, sde, many, bounds[1], draws, seed)
    return rows + [_row(claim, second, value=units.part(gap), expected=0.0, se=units.part(error), n=len(many))]


def _equivalence(context: Context, units: Units, settings: equivalence.Settings) -> list[dict[str, Any]]:
    claim, rows = "equivalent-sdes", []
    for names, measured in equivalence.PARTS:
        try:
            found = measured(context, settings)
        except (IntegrationError, FlowInverseError) as error:
            rows += [_row(claim, name, " ".join(str(error).split())) for name in names]
            continue
        for name in names:
            value, expected, se, n = found[name]
            if not name.startswith("energy"):
                value, se = units.part(value), units.part(se)
            rows.append(_row(claim, name, value=value, expected=expected, se=se, n=n))
    return rows


def _debiased(context: Context, repeats: int) -> list[dict[str, Any]]:
    z0 = latents(context, repeats, "time flow")
    model = context.model
    try:
        found = time_variance.log_variance_ratios(model.noise, model.sde, z0, repeats, context.run.seed)
    except ValueError as reason:
        return [_row("debiased-time", name, str(reason)) for name in time_variance.QUANTITIES]
    return [_row("debiased-time", name, value=value, se=se, n=len(z0)) for name, (value, se) in found.items()]


def _row(
    claim: str,
    quantity: str,
    reason: str | None = None,
    value: float | None = None,
    expected: float | None = None,
    se: float | None = None,
    n: int | None = None,
) -> dict[str, Any]:
    numbers = [v for v in (value, expected, se) if v is not None]
    if reason is None and not all(math.isfinite(v) for v in numbers):
        reason, value, expected, se = f"not finite: value {value}, se {se}", None, None, None
    status = "ok" if reason is None else f"not defined: {reason.removeprefix('not defined: ')}"
    return dict(zip(COLUMNS, (claim, quantity, value, expected, se, n, status), strict=True))
