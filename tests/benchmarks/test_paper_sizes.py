"""Speed at the specification's sizes, in units of c; the full record, with memory and arithmetic, is
`indm-bench performance`.

``extra_info``: seconds of computing, c, their ratio ``multiple``, the official code's multiple on the specification's
machine, and ``ratio`` to it. Multiples do not travel between machines (see goals.py), so a case fails only where its
result is not finite, or its seconds cannot be those of its arithmetic.
"""

import statistics

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bench.performance import goals
from bench.performance.loop import batch, plain_step
from bench.performance.sizes import KINDS, build, size_named
from bench.performance.timing import Reference, clocked
from bench.step_costs import count_flops
from models.integrators import flow_field, hutchinson_probes
from models.noise import IndexedGenerator

# seconds in units of c, over arithmetic in units of c's: between 1.2 and 3.5 where it was measured
LEAST, MOST = 0.2, 50


def pytest_generate_tests(metafunc):
    """The larger size takes long: only without --benchmark-quick."""
    quick = metafunc.config.getoption("--benchmark-quick")
    if "size" in metafunc.fixturenames and metafunc.function is not test_evaluation_of_the_ode:
        metafunc.parametrize("size", ["S16"] if quick else ["S16", "S32"])
    if metafunc.function is test_evaluation_of_the_ode:
        cases = [("S16", "ddpmpp", 16), ("S16", "ddpmpp", 4), ("S32", "ddpmpp", 4)]
        metafunc.parametrize("size, kind, count", cases[:2] if quick else cases)


@pytest.fixture
def measured(benchmark, benchmark_quick):
    """measured(function, size, official=None, per=1): time it in turn with c, and put the multiples beside it."""

    def run(function, size, official=None, per=1):
        reference, references, own, results = Reference(), [], [], []
        arithmetic = count_flops(lambda: results.append(function())) / per / count_flops(reference)
        assert all(bool(torch.isfinite(value).all()) for value in tree_leaves(results))
        rounds = 2 if benchmark_quick else 15 if size == "S16" else 7
        benchmark.pedantic(
            lambda: own.append(clocked(function)[0]),
            setup=lambda: references.append(clocked(reference)[0]),
            rounds=rounds,
        )
        seconds, c = statistics.median(own) / per, statistics.median(references)
        info = {"seconds": seconds, "c": c, "multiple": seconds / c}
        if official is not None:
            info |= {"official multiple": official, "ratio": seconds / c / official}
        benchmark.extra_info |= {key: float(f"{value:.4g}") for key, value in info.items()}
        assert LEAST * arithmetic < seconds / c < MOST * arithmetic

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_optimiser_step(measured, size, kind):
    measured(plain_step(size, kind), size, goals.step_goal(size, kind)["official_multiple"])


@pytest.mark.parametrize("what", ["train", "evaluate", "inverse"])
def test_flow(measured, size, what):
    flow, x = build(size, "indm-nll-local").flow, batch(size, size_named(size).batch)
    source = torch.Generator().manual_seed(0)
    flow.train(what == "train").requires_grad_(what == "train")

    def train():
        z, log_det = flow(x, generator=source)
        loss = z.square().sum() - log_det.sum()
        loss.backward()
        return loss

    z = flow.latent(x).detach()
    ways = {"train": train, "evaluate": lambda: flow(x, generator=source), "inverse": lambda: flow.inverse(z)}
    measured(ways[what], size)


def test_evaluation_of_the_ode(measured, size, kind, count):
    model, x = build(size, kind).eval().requires_grad_(False), batch(size, count)
    field = flow_field(model.noise, model.sde, hutchinson_probes(1, x.shape, torch.Generator().manual_seed(0)))
    official = {(s, k, b): multiple for (s, k, _), (b, multiple, _) in goals.NLL.items()}[size, kind, count]
    place = torch.zeros(count)
    measured(lambda: field(place, x), size, official)


def test_sampling(measured, size):
    model, count, steps = build(size, "ddpmpp").eval().requires_grad_(False), 16, 2
    index = torch.arange(count)
    draw = lambda: model.sample(  # noqa: E731
        count, steps=steps, sampler="ddim", generator=IndexedGenerator(0, "s", index)
    )
    draw()
    measured(draw, size, per=float(model.nfe))
