"""What a suite costs on this machine: time from a short measurement of each model; arithmetic, memory, disk by count.

Only a model's own steps are timed, untrained, and scaled up: a training step in several places of the run, one network
evaluation of the likelihood's ODE, the bound, a sampling step. What is too slow for the time of a probe is measured on
fewer images and taken as proportional to their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.config import FACTS, FolderImages, RunConfig, load_suite
from bench.errors import InputError
from bench.plan_evaluations import usual_evaluations
from bench.provenance import usable_cores

if TYPE_CHECKING:
    from bench.data import Dataset

# of one variant on one data set, about; each of the four timings gets a share
PROBE_SECONDS = 3.0
# where in a run its steps are timed: phases come and go, a bridge trains its halves in turn
SHARES = (0.5, 0.1, 0.9)
# images on which the likelihood is computed a third time, at half the tolerance
CHECKED_IMAGES = 32
CURVE_TOLERANCE, CURVE_TIMES = 1e-3, 16
# of a sampler that solves an ODE and names no tolerance
USUAL_TOLERANCE = 1e-4
# of a run's tables and records without arrays, and of a report for each variant and data set (toy2d, digits)
RECORD_BYTES, REPORT_BYTES = 20_000, 150_000
PER_IMAGE_ARRAYS = 9
PICTURED_BYTES = 100_000
# test images of a data set whose files are not at hand, and how many random ones stand for each of its halves
PUBLISHED_TESTS, RANDOM_IMAGES = 10_000, 512


@dataclass(frozen=True)
class Cost:
    """Of one run. ``images``: seen in training; ``train`` and ``evaluate``: seconds; ``flops``: of both.

    In bytes, ``memory``: live tensors of a training step with weights, averages and moments; ``weights`` and
    ``checkpoints``: kept on disk; ``results``: the run's other files; ``samples``: one sampler's, while it is judged.
    """

    images: int
    train: float
    evaluate: float
    flops: float
    memory: int
    weights: int
    checkpoints: int
    results: int
    samples: int

    @property
    def seconds(self) -> float:
        """Training and evaluation."""
        return self.train + self.evaluate


@dataclass(frozen=True)
class Row:
    """A variant on one data set: what each of its ``seeds`` runs costs."""

    variant: str
    dataset: str
    seeds: int
    cost: Cost


def print_plan(suite_name: str, settings: Sequence[str], minutes: float | None = None, gpus: int | None = None) -> None:
    """Print a line for each variant and data set, and totals for this machine's GPU or cores.

    ``minutes``: also the number of pieces of `indm-bench run --minutes`; ``gpus``: also the time on so many devices
    like this one, a variant's stages on one of them (`indm-bench repro --gpus`).
    """
    import torch

    from bench.budget import pieces, seconds_to_work

    if minutes is not None:
        seconds_to_work(minutes)  # refuses what is no number of minutes before any work
    if gpus is not None and gpus < 1:
        raise InputError(f"--gpus {gpus}: must be at least 1")
    suite = load_suite(suite_name, settings)
    cells = [run for name in suite.variants for run in suite.runs(name, suite.seeds_of(name)[0])]
    gpu = torch.cuda.is_available()
    workers = 1 if gpu else usable_cores()
    if not gpu:
        torch.set_num_threads(1)
    print(f"{suite_name}: {suite.count()} runs")
    print(
        f"{'variant':<20}{'data set':<14}{'seeds':>5}{'images seen':>13}{'training':>13}{'evaluation':>13}{'TFLOP':>10}"
        f"{'memory':>9}{'disk':>9}   (each run, estimated)"
    )
    rows, known = [], {}
    for run in cells:
        if run.dataset not in known:
            known[run.dataset] = data_for(run, suite.folder)
        data, tests, _ = known[run.dataset]
        row = Row(run.variant, run.dataset, len(suite.seeds_of(run.variant)), measure(run, data, tests))
        rows.append(row)
        print(line(row), flush=True)
    for name, (_, tests, found) in known.items():
        if not found:
            print(f"{name} is not here; taken to have {tests:,} test images")
    device = torch.cuda.get_device_name() if gpu else f"{workers} core{'s' if workers > 1 else ''}"
    for said in totals(rows, device, workers):
        print(said)
    seconds = total_seconds(rows)
    if minutes is not None:
        count = pieces(seconds, minutes, workers)
        print(f"with --minutes {minutes:g}: about {count} piece{'s' if count > 1 else ''}")
    if gpus is not None:
        longest = makespan(stage_seconds(rows), gpus)
        print(f"on {gpus} such device{'s' if gpus > 1 else ''}, each variant on one: about {duration(longest)}")
    print("not counted: start-up, compilation, features of images, studies, pictures and the report")


def line(row: Row) -> str:
    """One variant and data set, costs of each run."""
    cost = row.cost
    disk = cost.weights + cost.checkpoints + cost.results
    return (
        f"{row.variant:<20}{row.dataset[-13:]:<14}{row.seeds:>5}{cost.images:>13,}{duration(cost.train):>13}"
        f"{duration(cost.evaluate):>13}{cost.flops / 1e12:>10,.4g}{size(cost.memory):>9}{size(disk):>9}"
    )


def totals(rows: Sequence[Row], device: str, workers: int) -> list[str]:
    """A suite's sums: images, arithmetic, time with ``workers`` side by side, disk by kind, memory."""
    images = sum(row.seeds * row.cost.images for row in rows)
    flops = sum(row.seeds * row.cost.flops for row in rows)
    seconds = total_seconds(rows) / workers
    weights, checkpoints, results = (
        sum(row.seeds * getattr(row.cost, kind) for row in rows) for kind in ("weights", "checkpoints", "results")
    )
    reports = REPORT_BYTES * len(rows)
    memory = max(row.cost.memory for row in rows)
    samples = workers * max(row.cost.samples for row in rows)
    disk = weights + checkpoints + results + reports
    return [
        f"all: {images:,} images, {flops / 1e15:.3g} PFLOP, about {duration(seconds)} ({seconds / 3600:.2f} hours) "
        f"on {device}",
        f"disk: {size(disk)} = weights {size(weights)}, checkpoints {size(checkpoints)}, results {size(results)}, "
        f"reports {size(reports)}; DVC's cache holds the weights again; samples while they are judged {size(samples)}",
        f"memory: {size(memory)} of tensors for the largest run" + (f", {workers} runs at once" if workers > 1 else ""),
    ]


def total_seconds(rows: Sequence[Row]) -> float:
    """Of all runs, one after the other."""
    return sum(row.seeds * row.cost.seconds for row in rows)


def stage_seconds(rows: Sequence[Row]) -> list[float]:
    """Of each variant's stages, which hold all its seeds and data sets."""
    stages: dict[str, float] = {}
    for row in rows:
        stages[row.variant] = stages.get(row.variant, 0.0) + row.seeds * row.cost.seconds
    return list(stages.values())


def makespan(seconds: Sequence[float], devices: int) -> float:
    """When the last of ``devices`` ends, each free one taking the longest stage that is left."""
    ends = [0.0] * devices
    for stage in sorted(seconds, reverse=True):
        first = ends.index(min(ends))
        ends[first] += stage
    return max(ends)


def duration(seconds: float) -> str:
    """Seconds as ``2 min 05 s`` or, from one hour on, ``3.4 h``."""
    from bench.repro import clock

    return clock(seconds) if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def size(count: float) -> str:
    """Bytes as ``12 MB``, in powers of 1000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def data_for(run: RunConfig, folder: FolderImages | None = None) -> tuple[Dataset, int, bool]:
    """The run's data set, its number of test images, and True; False where its files are not at hand.

    Then random images of its shape stand for it. ``folder``: what the suite says of its image folder. InputError where
    the shape is not known without the files.
    """
    import torch

    from bench.data import IMAGE_LEVELS, load, make_dataset

    try:
        data = load(run.dataset)
        return data, len(data.test), True
    except InputError:
        if run.dataset not in FACTS and folder is None:
            raise
    shape, tests = (folder.shape, folder.test) if folder else (FACTS[run.dataset][0], PUBLISHED_TESTS)
    size, source = (2, RANDOM_IMAGES, *shape), torch.Generator().manual_seed(0)
    images = torch.randint(0, IMAGE_LEVELS, size, dtype=torch.uint8, generator=source)
    return make_dataset(run.dataset, IMAGE_LEVELS, images[0], images[1]), tests, False


def measure(run: RunConfig, data: Dataset | None = None, tests: int | None = None) -> Cost:
    """Cost of one run by a probe of about PROBE_SECONDS on an untrained model.

    ``data``: the data set where it has been loaded; ``tests``: its number of test images.
    """
    import torch

    from bench.checkpoint import KEEP
    from bench.plan_probe import NOTHING, Probe
    from models.base import Model

    if data is None or tests is None:
        data, tests, _ = data_for(run)
    probe = Probe(run, data, torch.device("cuda" if torch.cuda.is_available() else "cpu"), PROBE_SECONDS)
    settings, training, model = run.evaluate, run.train, probe.model
    step = probe.training(SHARES)
    ode, bound, sampling = probe.ode_evaluation(), probe.bound(settings.nelbo_times), probe.sampling_step()
    images, dims = min(settings.images or tests, tests), math.prod(data.shape)

    def evaluations_of(solver: str, tolerance: float) -> float:
        return usual_evaluations(solver, run.model.get("preconditioning"), tolerance, dims)

    # corrected and uncorrected NLL, and the check of the tolerance
    solved = evaluations_of(settings.solver, settings.rtol) * 2 * images
    solved += evaluations_of(settings.solver, settings.rtol / 2) * min(CHECKED_IMAGES, images)
    likelihood = ode * solved
    likelihood += bound * (images * settings.nelbo_repeats)
    steps = model.chain_steps
    if steps is not None and not model.bound_is_chain:
        discrete = type(model).discrete_parts is not Model.discrete_parts and data.levels is not None
        likelihood += sampling * (images * settings.nelbo_repeats * steps * (2 if discrete else 1))
    drawn = NOTHING
    for entry in settings.samplers:
        if entry["steps"] == [0]:
            evaluations = evaluations_of("sampler", entry.get("rtol", USUAL_TOLERANCE))
        else:
            evaluations = sum(entry["steps"]) * probe.evaluations_per_step(entry["name"])
        drawn += sampling * (evaluations * settings.samples)
    curve_images = min(training.curve_images, tests)
    point = ode * (evaluations_of("dopri5", CURVE_TOLERANCE) * curve_images)
    point += bound * (curve_images * CURVE_TIMES / settings.nelbo_times)
    point += sampling * (training.curve_samples * training.curve_steps)
    trained, evaluated = step * training.steps + point * training.curve, likelihood + drawn
    state, moments = probe.state_bytes(), 2 * probe.trained_bytes()
    return Cost(
        images=training.steps * training.batch_size,
        train=trained.seconds,
        evaluate=evaluated.seconds,
        flops=trained.flops + evaluated.flops,
        memory=probe.memory(),
        weights=2 * state,  # averaged, and those of the last step
        checkpoints=KEEP * (2 * state + moments),
        results=RECORD_BYTES + 8 * PER_IMAGE_ARRAYS * images + PICTURED_BYTES,
        samples=4 * dims * settings.samples if settings.samplers else 0,
    )
