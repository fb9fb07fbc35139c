"""The cases measured on a CPU with one thread, each by itself in a fresh process; one plain record each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.acceleration import compile_networks
from bench.performance import changes, goals
from bench.performance.evaluations import (
    ADAMS,
    CLOSE,
    MIDDLE,
    OFFICIAL,
    OURS,
    WAYS,
    Problem,
    compare,
    gaussian,
    of_network,
    solve,
)
from bench.performance.loop import batch, plain_step, trained
from bench.performance.sizes import KINDS, build, run_of, size_named
from bench.performance.timing import Reference, clocked, in_turn, side_by_side
from bench.step_costs import count_flops
from models.integrators import flow_field, hutchinson_probes
from models.noise import IndexedGenerator

TOLERANCE, STRICT = 1e-5, 1e-7
# the trained network on which all ways to solve are compared, and how many images they solve
EXPLAINED, COMPARED = ("S16", "ddpmpp", 300), 2


@dataclass(frozen=True)
class Effort:
    """How often things are done. ``rounds`` of a step at S16; larger sizes have a share of it."""

    rounds: int = 15
    strict: float = STRICT
    steps: float = 1.0  # share of the training steps before a likelihood


QUICK = Effort(rounds=2, strict=1e-6, steps=0.01)


@dataclass(frozen=True)
class Case:
    """``run(effort)`` gives the record; ``group`` is the table it stands in."""

    name: str
    group: str
    run: Callable[[Effort], dict[str, Any]]


def rounds_at(effort: Effort, size: str) -> int:
    """Rounds at a size: a larger one is timed less often."""
    return max(2, effort.rounds // (1 if size != "S32" else 3))


def peak_mb() -> float:
    """Largest resident memory of this process so far, MB."""
    from bench.provenance import peak_memory_mb

    return peak_memory_mb()


def step_case(size: str, kind: str, effort: Effort) -> dict[str, Any]:
    """An optimiser step: seconds, multiple of c, arithmetic in units of c's, peak memory of the process."""
    alone, step = peak_mb(), plain_step(size, kind)
    for _ in range(3):
        step()
    peak, reference = peak_mb(), Reference()  # before the reference and the count, which take memory of their own
    timing = in_turn(step, rounds_at(effort, size), reference)
    floor = count_flops(step) / count_flops(reference)
    parameters = {name: sum(p.numel() for p in params) for name, params in step.groups.items()}
    memory = {"peak_mb": peak, "peak_mb_alone": alone}
    return timing.record() | {"flops_in_c": floor} | memory | {"parameters": parameters} | goals.step_goal(size, kind)


def compiled_case(size: str, kind: str, effort: Effort) -> dict[str, Any]:
    """The same with the score network compiled, as train.compile does; the first step's seconds beside it.

    Its memory is the compiler's, and not recorded.
    """
    reference, step = Reference(), plain_step(size, kind)
    floor = count_flops(step) / count_flops(reference)
    compile_networks(step.model)
    first = clocked(step)[1]
    timing = in_turn(step, rounds_at(effort, size), reference)
    return timing.record() | {"flops_in_c": floor, "first_seconds": first} | goals.step_goal(size, kind)


def flow_case(size: str, kind: str, what: str, effort: Effort) -> dict[str, Any]:
    """The flow alone: value and log-determinant with gradient ("train"), without ("evaluate"), or its inverse."""
    reference, flow = Reference(), build(size, kind).flow
    x = batch(size, size_named(size).batch)
    source = torch.Generator().manual_seed(0)
    flow.train(what == "train").requires_grad_(what == "train")

    def train() -> None:
        flow.zero_grad()
        z, log_det = flow(x, generator=source)
        (z.square().sum() - log_det.sum()).backward()

    def evaluate() -> None:
        with torch.no_grad():
            flow(x, generator=source)

    ways: dict[str, Callable[[], Any]] = {"train": train, "evaluate": evaluate}
    extra = {}
    if what == "inverse":
        with torch.no_grad():
            # of a flow with a global latent: the same latent both ways, or there is nothing to return to
            fixed = flow.given(flow.posterior(x, source)[0]) if hasattr(flow, "given") else flow
            z = fixed.latent(x)
        extra["error_max"] = float((fixed.inverse(z) - x).abs().max())
        ways["inverse"] = lambda: fixed.inverse(z)
    timing = in_turn(ways[what], rounds_at(effort, size), reference)
    return timing.record() | {"flops_in_c": count_flops(ways[what]) / count_flops(reference)} | extra


def nll_case(size: str, kind: str, steps: int, count: int, effort: Effort) -> dict[str, Any]:
    """The ODE's likelihood: seconds an evaluation in c, evaluations and error beside the official method's."""
    model = trained(size, kind, max(1, round(steps * effort.steps)))
    x, reference = batch(size, count, seed=10**6), Reference()
    source = IndexedGenerator(0, "performance", torch.arange(count))
    settings, solved = run_of(kind).evaluate, {}

    def solve() -> None:
        options = {"generator": source, "solver": settings.solver}
        solved.update(model.nll_parts(x, settings.rtol, settings.atol, **options))

    _, wall = clocked(solve)
    probes = hutchinson_probes(1, x.shape, torch.Generator().manual_seed(0))
    field, place = flow_field(model.noise, model.sde, probes), torch.zeros(count)
    timing = in_turn(lambda: field(place, x), effort.rounds, reference)
    floor = count_flops(lambda: field(place, x)) / count_flops(reference)
    problem = of_network(model, x[:COMPARED])
    ways = tuple(WAYS) if (size, kind, steps) == EXPLAINED else (OFFICIAL, OURS, CLOSE, MIDDLE, ADAMS)
    found = compare(problem, TOLERANCE, *strict_solution(model, problem, effort), ways)
    return timing.record() | {
        "batch": count,
        "training_steps": steps,
        "solver": settings.solver,
        "tolerance": settings.rtol,
        "flops_in_c": floor,
        "solve_seconds": wall,
        "evaluations": float(solved["nfe"].double().mean()),
        "evaluations_max": float(solved["nfe"].max()),
        "ways": found,
        **goals.nll_goal(size, kind, steps),
    }


def strict_solution(model: Any, problem: Any, effort: Effort) -> tuple[torch.Tensor, Callable]:
    """(log p(z_eps) (B,) at a strict tolerance in float64, the log-density at the end of a solution)."""
    double = model.double()
    exact = Problem(double.noise, double.sde, problem.z.double(), problem.probes.double())
    prior = double.sde.prior_log_prob
    truth = solve(exact, "lambda", "each", effort.strict).log_density(prior)
    model.float()
    return truth, prior


def analytic_case(kind: str, effort: Effort) -> dict[str, Any]:
    """Evaluations and error against a closed form: Gaussian data."""
    problem, density = gaussian(kind)
    truth = density(problem.z, problem.sde.eps)
    return {"ways": compare(problem, TOLERANCE, truth, density), "official_evaluations": goals.ANALYTIC[kind]}


def sampling_case(size: str, kind: str, sampler: str, effort: Effort) -> dict[str, Any]:
    """Samples by a few steps: seconds an evaluation of the network in c; an INDM's inverse flow is part of it."""
    model, steps = build(size, kind).eval().requires_grad_(False), 5
    count = size_named(size).batch
    index = torch.arange(count)

    def sample() -> None:
        model.sample(count, steps=steps, sampler=sampler, generator=IndexedGenerator(0, "performance", index))

    timing = in_turn(sample, max(2, rounds_at(effort, size) // 3), warmup=1)
    record = timing.record()
    evaluations = float(model.nfe)
    return record | {"steps": steps, "evaluations": evaluations, "multiple": record["multiple"] / evaluations}


def harness_case(variant: str, effort: Effort) -> dict[str, Any]:
    """The harness's own step beside the plain loop's on the same batch of the digits suite."""
    from bench.config import load_suite
    from bench.performance.loop import PlainStep
    from bench.train import Trainer, build_model

    run = load_suite("digits", ["train.curve_samples=0"]).runs(variant, 0)[0]
    trainer = Trainer(run, progress=False)
    trainer.model.train()
    plain = PlainStep(build_model(run, trainer.data), trainer.data.train[: run.train.batch_size].float(), run.train)
    plain.x = 2 * (plain.x / 255) - 1
    timings = side_by_side({"plain": plain, "harness": trainer.train_step}, 4 * effort.rounds, warmup=3)
    ratios = sorted(own / bare for own, bare in zip(timings["harness"].work, timings["plain"].work, strict=True))
    return {
        "seconds": timings["harness"].seconds,
        "plain_seconds": timings["plain"].seconds,
        "overhead": ratios[len(ratios) // 2] - 1,
        "goal_overhead": goals.HARNESS,
        "rounds": len(ratios),
    }


def cpu_cases() -> list[Case]:
    """All of them, in the order of the tables."""
    found = []

    def add(group: str, name: str, run: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        found.append(Case(f"{group}/{name}", group, partial(run, *arguments)))

    for size in ("S16", "S32"):
        for kind in KINDS:
            add("step", f"{size}/{kind}", step_case, size, kind)
    for kind in goals.STEP["S16"]:
        add("step", f"S16/{kind}/compiled", compiled_case, "S16", kind)
    for size in ("S16", "S32"):
        for kind in ("indm-nll", "indm-nll-local"):
            for what in ("train", "evaluate", "inverse"):
                add("flow", f"{size}/{kind}/{what}", flow_case, size, kind, what)
    for size, kind, steps, count in (
        ("S16", "ddpmpp", 10, 16),
        ("S16", "ddpmpp", 300, 4),
        ("S16", "indm-nll", 250, 4),
        ("S16", "ncsnpp", 300, 4),
        ("S32", "ddpmpp", 10, 4),
        ("S32", "indm-nll", 10, 4),
    ):
        add("nll", f"{size}/{kind}/{steps}", nll_case, size, kind, steps, count)
    for kind in ("vp", "ve"):
        add("analytic", kind, analytic_case, kind)
    for kind, sampler in (("ddpmpp", "ddim"), ("indm-nll-local", "ddim"), ("ncsnpp", "predictor_corrector")):
        add("sampling", f"S32/{kind}/{sampler}", sampling_case, "S32", kind, sampler)
    for variant in ("ddpmpp-vp", "indm-vp-nll"):
        add("harness", variant, harness_case, variant)
    for name, run in changes.CHANGES.items():
        add("change", name, run)
    return found
