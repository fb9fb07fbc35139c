"""Noise levels of the bound: proposals, draws and the control variate."""

from __future__ import annotations

import math
import statistics
import time

import torch
from torch import Tensor

from bench.estimators.common import COMMON, Budget, Measured, Subject, copies, default_options, moments, source
from bench.estimators.problems import Problem
from models.indm import INDM
from models.time_sampling import DRAWS, PROPOSALS

# where settings are compared on equal terms: a number of times near that of the suites
REFERENCE_TIMES = 16
DEFAULTS = default_options(INDM.nelbo_parts, "proposal", "draws", "control_variate")


@torch.no_grad()
def measure_time_sampling(problem: Problem, budget: Budget, bar) -> list[Measured]:
    """Every proposal, draw and control variate at every number of times.

    The longest estimate is measured; its draws, taken in groups, are the shorter ones: a regular grid of 64 with a
    random shift holds 4 of 16, each shift uniform.
    """
    model, x = problem.model, problem.x
    repeats = budget.repeats_trained if problem.trained else budget.repeats
    span = float(torch.diff(torch.stack(model.sde.log_ratio_range(x))))
    z0, dims = model.latent(x), x[0].numel()
    parts = model.nelbo_parts(copies(x, 16), 1, source("residual", 16 * len(x)))
    residual = parts["reconstruction"].double().reshape(len(x), 16).var(1).mean() / dims**2
    pools = {}
    for proposal in PROPOSALS:
        for draws in DRAWS:
            pools[proposal, draws] = _pool(model, z0, proposal, draws, max(budget.times), repeats, span / dims)
            bar.update()
    exact, reference = problem.integral, "quadrature"
    if exact is not None:
        exact = exact / dims
    else:
        reference = "the default's mean"
        pooled = pools[tuple(DEFAULTS[name] for name in ("proposal", "draws"))][0][True]
    rows = []
    for (proposal, draws), (both, seconds) in pools.items():
        for control in (True, False):
            options = {"proposal": proposal, "draws": draws, "control_variate": control}
            is_reference = exact is None and options == DEFAULTS
            own = both[control]
            bias, bias_se = _bias(own, exact, None if exact is not None else pooled)
            for times in budget.times:
                variance = group_variance(own, times, regular=draws == "stratified")
                found = moments(variance, times)
                values = {"problem": problem.name, "dims": dims, **options, "times": times}
                values |= {"evaluations": times, "images": len(x), "repeats": repeats}
                values |= {"se": math.sqrt(found["sd"] ** 2 + float(residual)), "se_integral": found["sd"]}
                values |= {"se_residual": math.sqrt(float(residual)), "work": found["work"]}
                values |= {"bias": None if is_reference else bias, "bias_se": None if is_reference else bias_se}
                values |= {"reference": reference, "seconds": seconds * times, "status": "ok"}
                rows.append(Measured(values, variance, times, problem.trained, options=options))
    return rows


def _pool(
    model: INDM, z0: Tensor, proposal: str, draws: str, times: int, repeats: int, scale: float
) -> tuple[dict[bool, Tensor], float]:
    """{control variate on: integrand values (I, repeats, times), nats/dim over lambda's span}, seconds a draw."""
    kept: dict[bool, list[Tensor]] = {True: [], False: []}
    seconds = []
    many, dims = copies(z0, times), z0[0].numel()
    for repeat in range(repeats):
        random = source(f"{proposal} {draws} {repeat}", len(z0))
        u = DRAWS[draws](len(z0), times, random, z0.device, z0.dtype).flatten()
        noise = random.normal((len(z0), times * dims), z0.device, z0.dtype).reshape(many.shape)
        started = time.perf_counter()
        ratio, error, control = model.integrand(many, u, noise, proposal)
        seconds.append((time.perf_counter() - started) / len(many))
        for on in kept:
            value = ratio * (error - dims - (control if on else 0))
            kept[on].append(scale * value.double().reshape(len(z0), times))
    return {on: torch.stack(values, 1) for on, values in kept.items()}, statistics.median(seconds)


def group_variance(values: Tensor, size: int, regular: bool) -> Tensor:
    """Variance (I,) of the mean of ``size`` draws, from ``values`` (I, R, T), T a multiple of ``size``.

    ``regular``: the T draws lie in the order of one shifted grid, of which every (T / size)-th make a coarser one.
    The groups of one repeat depend on each other, so only the repeats count in the correction of the common mean.
    """
    images, repeats, times = values.shape
    groups = values.unflatten(2, (size, times // size)) if regular else values.unflatten(2, (-1, size)).mT
    means = groups.mean(2)
    spread = (means - values.mean((1, 2))[:, None, None]).square().mean((1, 2))
    return spread + values.mean(2).var(1) / repeats


def _bias(values: Tensor, exact: Tensor | None, pooled: Tensor | None) -> tuple[float, float]:
    """Mean over images of (estimate - reference) and its standard error, nats/dim."""
    target = exact if pooled is None else pooled.mean((1, 2))
    squares = sum(v.mean(2).var(1) / v.shape[1] for v in (values, pooled) if v is not None)
    return float((values.mean((1, 2)) - target).mean()), float(squares.sum().sqrt()) / len(values)


SUBJECT = Subject(
    "time_sampling",
    "Noise levels of the bound",
    "se: standard error of one image's bound (sd over repeats), se_integral: its part from the noise levels, "
    "se_residual: its part from the one draw at eps, which no option here changes. Variances and efficiencies "
    "are of the integral; efficiency = variance x evaluations over that of the code's default at as many times.",
    ("problem", "dims", "proposal", "draws", "control_variate", "times", "evaluations", "images", "repeats")
    + ("se", "se_integral", "se_residual", "bias", "bias_se", "reference", "seconds", *COMMON),
    DEFAULTS,
    ("times",),
    {"times": REFERENCE_TIMES},
    measure_time_sampling,
    lambda budget: len(PROPOSALS) * len(DRAWS),
)
