"""What a suite will cost on this machine, from a few seconds of measurement of each of its models."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.config import RunConfig, load_suite
from bench.provenance import usable_cores
from bench.repro import clock

PROBE_SECONDS = 1.5
PROBE_IMAGES = 16


@dataclass(frozen=True)
class Cost:
    """Of one run: images seen in training, and estimated seconds."""

    images: int
    train: float
    evaluate: float


def print_plan(suite_name: str, settings: Sequence[str]) -> None:
    """Print one line for each variant and data set, and the total with this machine's cores at work."""
    import torch

    suite = load_suite(suite_name, settings)
    cells = [run for name in suite.variants for run in suite.runs(name, suite.seeds_of(name)[0])]
    gpu = torch.cuda.is_available()
    workers = 1 if gpu else usable_cores()
    if not gpu:
        torch.set_num_threads(1)
    total, images = 0.0, 0
    print(f"{suite_name}: {suite.count()} runs")
    print(
        f"{'variant':<20}{'data set':<16}{'seeds':>6}{'images seen':>12}{'training':>14}{'evaluation':>14}"
        "   (each run, estimated)"
    )
    for run in cells:
        cost, seeds = measure(run), len(suite.seeds_of(run.variant))
        total, images = total + seeds * (cost.train + cost.evaluate), images + seeds * cost.images
        times = f"{clock(cost.train):>14}{clock(cost.evaluate):>14}"
        print(f"{run.variant:<20}{run.dataset:<16}{seeds:>6}{cost.images:>12,}{times}", flush=True)
    device = torch.cuda.get_device_name() if gpu else f"{workers} cores"
    print(f"all: {images:,} images, about {clock(total / workers)} on {device}, start-up of the stages not counted")


def measure(run: RunConfig) -> Cost:
    """Time a few training steps, likelihoods and sampling steps of an untrained model.

    The adaptive solver takes more steps on a trained model, so the evaluation is a lower estimate.
    """
    import torch

    from bench.likelihood import nelbo_per_image, nll_per_image, test_points
    from bench.sampling import draw
    from bench.train import Trainer

    # only its steps are taken, so the learning curve's classifier need not be there
    trainer = Trainer(
        run.model_copy(update={"train": run.train.model_copy(update={"curve_samples": 0})}), progress=False
    )
    data, settings, device = trainer.data, run.evaluate, trainer.device
    trainer.model.train()
    step = timed(lambda: float(trainer.train_step()["loss"]))
    model = trainer.ema.model
    few = min(PROBE_IMAGES, len(data.test))
    x = test_points(data, few, run.seed)
    options = {"rtol": settings.rtol, "atol": settings.atol, "probes": settings.probes}
    bound = timed(lambda: nelbo_per_image(model, x, 1, 1, few, run.seed, device)) / few
    exact = timed(lambda: nll_per_image(model, x, few, run.seed, device, corrected=True, **options)) / few
    batch = min(settings.batch_size, settings.samples, 4 * PROBE_IMAGES)
    sample = timed(lambda: draw(model, batch, "ddim", 2, run.seed, batch)) / (2 * batch)
    if device.type == "cuda":
        torch.cuda.synchronize()

    images = settings.images or len(data.test)
    curve = run.train.curve * min(run.train.curve_images, len(data.test)) * (4 * bound + exact)
    curve += run.train.curve * run.train.curve_samples * run.train.curve_steps * sample
    steps = sum(sum(entry["steps"]) for entry in settings.samplers)
    # corrected and uncorrected NLL; the bound at all its times and repeats
    likelihood = images * (2 * exact + settings.nelbo_repeats * settings.nelbo_times * bound)
    return Cost(
        run.train.steps * run.train.batch_size,
        run.train.steps * step + curve,
        likelihood + steps * settings.samples * sample,
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call: the best of as many as fit into the probe's time, the first left out if there are more."""
    best, spent = float("inf"), 0.0
    for attempt in range(50):
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        spent += seconds
        best = seconds if attempt <= 1 else min(best, seconds)
        if attempt and spent > PROBE_SECONDS:
            break
    return best
