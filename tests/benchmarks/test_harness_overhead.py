"""What the harness costs: ``Trainer.train_step`` against a bare PyTorch loop of the very same step, in the same run.

Both do the same arithmetic: draw a batch, dequantise, each phase's loss and gradients, clip, fused AdamW, averages. The
sizes are S16 of the performance page: 16x16x3, batch 16. The two alternate, in either order, and the overhead is the
median over pairs of the processor time of one thread, which a busy machine disturbs less than the clock on the wall.
"""

import copy
import math
import statistics
import time

import pytest
import torch

import bench.train
from bench.config import load_suite
from bench.data import dequantise, make_dataset
from bench.train import Trainer
from models.noise import StepRandom

SIZE, BATCH, SEED = 16, 16, 0
LIMIT = 0.03
SCORE = {
    "name": "ncsnpp",
    "nf": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [8],
    "dropout": 0.1,
}
FLOWS = {"ddpmpp": {"name": "identity"}, "indm": {"name": "residual", "blocks": [2, 2], "hidden": 64}}


def images():
    source = torch.Generator().manual_seed(1)
    train, test = (torch.randint(0, 256, (n, 3, SIZE, SIZE), generator=source, dtype=torch.uint8) for n in (512, 64))
    return make_dataset("images", 256, train, test)


def trainer_of(kind):
    (run,) = load_suite("smoke").runs("ddpmpp-vp", SEED, "digits")
    sde = {"name": "vp", "beta_min": 0.1, "beta_max": 20.0, "eps": 1e-5}
    model = {"name": "indm", "sde": sde, "score": SCORE, "flow": FLOWS[kind], "setting": "nll"}
    model |= {"preconditioning": "none", "time_sampling": "independent"}
    train = run.train.model_copy(
        update={"batch_size": BATCH, "steps": 10**6, "curve": 0, "horizontal_flip": True, "ema": 0.9999, "warmup": 0}
    )
    return Trainer(run.model_copy(update={"model": model, "train": train}), progress=False)


def bare_step(trainer):
    """The same step without the harness, on a copy of the trainer's model."""
    config, data = trainer.config, images()
    model = copy.deepcopy(trainer.model).train()
    average = copy.deepcopy(model).requires_grad_(False)
    (phase,) = model.phases()
    optimizers = {
        name: torch.optim.AdamW(parameters, lr=config.learning_rates[name], betas=config.betas, fused=True)
        for name, parameters in phase.parameters.items()
    }
    own, live = list(average.parameters()), list(model.parameters())
    order = torch.randperm(len(data.train))
    step = 0

    def run():
        nonlocal step
        random = StepRandom(SEED, step, BATCH)  # what the loss draws its times and noise from
        first = step * BATCH % len(order)
        x = data.train[order[first : first + BATCH]]
        flip = torch.rand(BATCH) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        x = dequantise(x, torch.rand(x.shape), data.levels)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss, _ = phase.loss_fn(x, random)
        loss.backward()
        for name, parameters in phase.parameters.items():
            torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
            optimizers[name].step()
        with torch.no_grad():
            torch._foreach_lerp_(own, live, 1 - config.ema)
        step += 1

    return run


def seconds(function, clock=time.thread_time):
    started = clock()
    function()
    return clock() - started


@pytest.mark.parametrize("kind", sorted(FLOWS))
def test_overhead_of_the_harness(kind, benchmark, request, monkeypatch, tmp_path):
    monkeypatch.setenv("INDM_BENCH_RUNS", str(tmp_path))
    monkeypatch.setenv("INDM_BENCH_CHECKPOINTS", str(tmp_path))
    monkeypatch.setattr(bench.train, "load", lambda name: images())
    monkeypatch.setattr(bench.train, "check_features", lambda run: None)
    pairs = 2 if request.config.getoption("--benchmark-quick") else 31
    trainer = trainer_of(kind)
    trainer.model.train()
    bare = bare_step(trainer)
    for function in (trainer.train_step, bare):
        function()
    ratios, plain = [], []
    for k in range(pairs):
        # either goes first as often: the second finds warmer caches
        functions = (trainer.train_step, bare) if k % 2 else (bare, trainer.train_step)
        taken = {function: seconds(function) for function in functions}
        ratios.append(taken[trainer.train_step] / taken[bare])
        plain.append(taken[bare])
    overhead = statistics.median(ratios) - 1
    low, high = (statistics.quantiles(ratios, n=4)[q] - 1 for q in (0, 2))
    benchmark.pedantic(trainer.train_step, rounds=1)
    benchmark.extra_info["reference"] = "a bare PyTorch loop of the same step"
    benchmark.extra_info["reference_seconds"] = statistics.median(plain)
    benchmark.extra_info["ratio"] = 1 + overhead
    benchmark.extra_info["overhead"] = f"{overhead:.2%}, half of {pairs} pairs from {low:.2%} to {high:.2%}"
    if pairs > 2:  # of two pairs a median says nothing
        assert overhead < LIMIT
