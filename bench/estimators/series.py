"""Log-determinant of a residual flow: depth, roulette and probe of its series, and plain truncation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.estimators.common import COMMON, Budget, Measured, Subject, default_options, moments, source
from bench.estimators.problems import FlowProblem
from bench.step_costs import count_flops
from models.flows import ResidualFlow
from models.flows.log_det import Roulette

# no term after the fixed ones: a roulette so improbable that it never starts
NEVER = 1e-12
ROULETTES = {
    "geometric 0.1": Roulette(entry=0.1),
    "geometric 0.25": Roulette(entry=0.25),
    "geometric 1": Roulette(entry=1.0),
    "poisson 2": Roulette("poisson", rate=2.0),
    "none": Roulette(entry=NEVER),
}
# calls a setting is spread over; one counts operations, the others give the median time
PIECES = 4


@torch.no_grad()
def measure_series(problem: FlowProblem, budget: Budget, bar) -> list[Measured]:
    """Every depth, roulette and kind of probe of the log-determinant series, plain truncation, and the exact value."""
    flow, x = problem.flow, problem.x
    dims, repeats = x[0].numel(), budget.series_repeats_trained if problem.trained else budget.series_repeats
    flow.log_det = "exact"
    products, seconds, values = _timed_flow(flow, x, repeats=1, purpose="exact")
    exact = values[:, 0] / dims
    base = {"problem": problem.name, "dims": dims, "images": len(x), "status": "ok"}
    values = base | {"roulette": "exact", "products": products, "seconds": seconds}
    values |= {"sd": 0.0, "work": 0.0, "unbiased": "yes"}
    rows = [Measured(values, trained=problem.trained, candidate=False)]
    flow.log_det = "series"
    for name, depth, probes in _series_settings(budget):
        flow.roulette, flow.terms, flow.probes = ROULETTES[name], {True: depth, False: depth}, probes
        products, seconds, drawn = _timed_flow(flow, x, repeats, f"{probes} {name}")
        drawn = drawn / dims
        variance = drawn.var(1)
        values = base | {"roulette": name, "terms": depth, "probes": probes, "repeats": drawn.shape[1]}
        values |= {"products": products} | moments(variance, 1 + products)
        values |= {"bias": float((drawn.mean(1) - exact).mean()), "seconds": seconds}
        values |= {"bias_se": float(variance.div(drawn.shape[1]).sum().sqrt()) / len(x)}
        values |= {"unbiased": "no" if name == "none" else "yes"}
        # a Poisson's tail falls faster than any power of a Jacobian: its second moment is infinite in theory
        candidate = name != "none" and not name.startswith("poisson")
        options = {"terms_eval": depth, "roulette": name, "probes": probes}
        rows.append(Measured(values, variance, 1 + products, problem.trained, candidate, options))
        bar.update()
    return rows


def _series_settings(budget: Budget) -> Iterator[tuple[str, int, str]]:
    for name in ROULETTES:
        for depth in budget.depths:
            # without terms there is nothing to truncate
            for probes in ("rademacher", "gaussian") if depth or name != "none" else ():
                yield name, depth, probes


def _timed_flow(flow: ResidualFlow, x: Tensor, repeats: int, purpose: str) -> tuple[float, float, Tensor]:
    """(products with a Jacobian a sample and block, median seconds a sample, log-determinants (I, repeats) in nats).

    Linear work is counted: a product through a block costs what the block's forward pass costs.
    """
    drawn, seconds, work = [], [], 0.0
    for piece in range(PIECES):
        many = x.repeat(-(-repeats // PIECES), *[1] * (x.dim() - 1))
        random = source(f"{purpose} {piece}", len(many))
        if piece:
            started = time.perf_counter()
            drawn.append(flow(many, random)[1])
            seconds.append((time.perf_counter() - started) / len(many))
        else:  # counting takes time of its own
            work = count_flops(lambda: drawn.append(flow(many, random)[1])) / count_flops(lambda: flow.latent(many))
    values = torch.cat(drawn).double().reshape(-1, len(x)).T
    return work - 1, statistics.median(seconds), values


def _series_defaults() -> dict[str, Any]:
    given = default_options(
        ResidualFlow.__init__, "terms_eval", "roulette", "roulette_entry", "roulette_rate", "probes"
    )
    number = given["roulette_entry"] if given["roulette"] == "geometric" else given["roulette_rate"]
    return {"terms_eval": given["terms_eval"], "roulette": f"{given['roulette']} {number:g}", "probes": given["probes"]}


SUBJECT = Subject(
    "series",
    "Log-determinant of a residual flow",
    "sd: of one image's log-determinant over roulette and probe; products: with a block's Jacobian, a sample "
    "and block. Roulette none cuts the series after its terms, which is biased; a Poisson roulette has no "
    "finite variance in theory, whatever a sample shows. efficiency = variance x (1 + products) over that of "
    "the code's default.",
    ("problem", "dims", "roulette", "terms", "probes", "products", "images", "repeats", "sd", "bias", "bias_se")
    + ("unbiased", "seconds", *COMMON),
    _series_defaults(),
    (),
    {},
    measure_series,
    lambda budget: sum(1 for _ in _series_settings(budget)),
)
