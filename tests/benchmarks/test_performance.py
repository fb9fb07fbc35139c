"""Performance cases: each as seconds and as a ratio to a plain reference timed in the same run.

The reference is the bare arithmetic the case cannot do without, so a ratio near 1 means that the harness costs nothing.
Timings drift between machines; compare the ratios (``extra_info``), never the seconds.
"""

import statistics
import time

import pytest
import torch

import models
from bench.config import load_suite
from bench.data import dequantise, load
from bench.train import Trainer
from models.integrators import flow_field, hutchinson_probes
from models.noise import IndexedGenerator

BATCH = 128


@pytest.fixture(scope="module")
def rounds(request):
    return 2 if request.config.getoption("--benchmark-quick") else 15


@pytest.fixture
def trainer_for(tmp_path, monkeypatch):
    monkeypatch.setenv("INDM_BENCH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("INDM_BENCH_CHECKPOINTS", str(tmp_path / "checkpoints"))

    def build(variant):
        return Trainer(load_suite("digits", ["train.curve_samples=0"]).runs(variant, 0)[0], progress=False)

    return build


@pytest.fixture(scope="module")
def digits():
    data = load("digits")
    return dequantise(data.train[:BATCH], torch.full(data.train[:BATCH].shape, 0.5), data.levels)


def model_of(variant):
    torch.manual_seed(0)
    run = load_suite("digits").runs(variant, 0)[0]
    return models.build({**run.model, "shape": [1, 8, 8]}).eval().requires_grad_(False)


def median_seconds(function, rounds):
    function()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measure(benchmark, function, reference, rounds, says):
    """Time case and reference alternately enough to share the machine's mood; put the ratio beside the seconds."""
    plain = median_seconds(reference, rounds)
    benchmark.pedantic(function, rounds=rounds, warmup_rounds=1)
    again = median_seconds(reference, rounds)
    reference_seconds = statistics.median([plain, again])
    benchmark.extra_info["reference"] = says
    benchmark.extra_info["reference_seconds"] = reference_seconds
    benchmark.extra_info["ratio"] = benchmark.stats.stats.median / reference_seconds
    return benchmark.extra_info["ratio"]


@pytest.mark.parametrize("variant", ["ddpmpp-vp", "indm-vp-nll", "indm-vp-fid", "ncsnpp-ve", "indm-ve"])
def test_training_step(benchmark, trainer_for, digits, rounds, variant):
    trainer = trainer_for(variant)
    net = trainer.model.score.net
    condition = torch.full((BATCH,), 0.5)

    def bare():
        net.zero_grad()
        net(digits, condition).square().mean().backward()

    ratio = measure(benchmark, trainer.train_step, bare, rounds, "forward and backward of the score network alone")
    assert ratio < (3 if "indm" not in variant else 20)


@pytest.mark.parametrize("variant", ["ddpmpp-vp", "indm-vp-nll"])
def test_nll(benchmark, digits, rounds, variant):
    """Seconds of a whole solve; the ratio is per evaluation, against one forward pass with one vector product."""
    model, x = model_of(variant), digits[:32]
    condition = torch.full((len(x),), 0.5)

    def bare():
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            torch.autograd.grad(model.score.net(leaf, condition), leaf, x)

    evaluations = []

    def solve():
        parts = model.nll_parts(x, rtol=1e-3, atol=1e-3, generator=IndexedGenerator(0, "b", torch.arange(len(x))))
        evaluations.append(float(parts["nfe"].double().max()))

    measure(benchmark, solve, bare, min(rounds, 5), "one forward pass and one vector-Jacobian product of the network")
    benchmark.extra_info["evaluations"] = evaluations[-1]
    benchmark.extra_info["ratio"] /= evaluations[-1]
    assert benchmark.extra_info["ratio"] < 3


def test_nelbo(benchmark, digits, rounds):
    model, times = model_of("ddpmpp-vp"), 8
    condition = torch.full((BATCH,), 0.5)
    source = IndexedGenerator(0, "b", torch.arange(BATCH))
    ratio = measure(
        benchmark,
        lambda: model.nelbo(digits, times, source),
        lambda: [model.score.net(digits, condition) for _ in range(times + 1)],
        rounds,
        "the same number of forward passes of the network",
    )
    assert ratio < 3


@pytest.mark.parametrize("sampler", ["euler_maruyama", "predictor_corrector", "ddim", "heun"])
def test_sampling(benchmark, digits, rounds, sampler):
    model, steps = model_of("ddpmpp-vp"), 8
    condition = torch.full((BATCH,), 0.5)
    index = torch.arange(BATCH)
    model.sample(1, steps=steps, sampler=sampler)
    nfe = int(model.nfe)
    ratio = measure(
        benchmark,
        lambda: model.sample(BATCH, steps=steps, sampler=sampler, generator=IndexedGenerator(0, "b", index)),
        lambda: [model.score.net(digits, condition) for _ in range(nfe)],
        rounds,
        f"{nfe} forward passes of the network",
    )
    assert ratio < 4


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_flow_forward(benchmark, digits, rounds, mode):
    """Value and log-determinant: the series in training, exact in evaluation."""
    flow = model_of("indm-vp-nll").flow.requires_grad_(mode == "train").train(mode == "train")
    net = model_of("ddpmpp-vp").score.net
    condition = torch.full((BATCH,), 0.5)
    z, log_det = flow(digits)
    assert z.shape == digits.shape and log_det.shape == (BATCH,)
    assert bool(torch.isfinite(z).all()) and bool(torch.isfinite(log_det).all())
    ratio = measure(
        benchmark, lambda: flow(digits), lambda: net(digits, condition), rounds, "one forward pass of the network"
    )
    assert ratio < (10 if mode == "train" else 60)


def test_flow_inverse(benchmark, digits, rounds):
    flow = model_of("indm-vp-nll").flow
    z = flow(digits)[0]
    assert (flow.inverse(z) - digits).abs().max() < 1e-4
    net = model_of("ddpmpp-vp").score.net
    condition = torch.full((BATCH,), 0.5)
    ratio = measure(
        benchmark, lambda: flow.inverse(z), lambda: net(digits, condition), rounds, "one forward pass of the network"
    )
    assert ratio < 30


def test_one_pass_gives_drift_and_divergence(benchmark, digits, rounds):
    """The ODE field against a forward pass for the drift and another one, with its product, for the divergence."""
    model, x = model_of("ddpmpp-vp"), digits[:32]
    probes = hutchinson_probes(1, x.shape, None)
    field = flow_field(model.noise, model.sde, probes)
    log_ratio = torch.zeros(len(x))
    condition = torch.full((len(x),), 0.5)

    def two_passes():
        with torch.no_grad():
            model.score.net(x, condition)
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            torch.autograd.grad(model.score.net(leaf, condition), leaf, probes[0])

    ratio = measure(benchmark, lambda: field(log_ratio, x), two_passes, rounds, "two forward passes and one product")
    assert ratio < 1.5
