"""What the commands do, once their arguments are read."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from bench import seals, stopping
from bench.config import RunConfig, Suite, features_file, load_suite, read_run, reports_root
from bench.errors import InputError
from bench.provenance import usable_cores
from bench.workers import Cell, ask_server, default_workers, run_beside, run_here

# a classifier sees its data set so often, and so many images at most: one thread of a CPU trains it in a minute or two
CLASSIFIER_EPOCHS, CLASSIFIER_IMAGES = 12, 150_000


def run_stage(
    stage: str,
    suite_name: str,
    variant: str | None,
    seed: int | None = None,
    dataset: str | None = None,
    workers: int | None = None,
    settings: Sequence[str] | None = None,
) -> None:
    """Train or evaluate the chosen runs. Bad input in any stops all before any work; typer.Exit(1) on failure.

    typer.Exit(75) where an end was asked for before all was done (bench.stopping).
    """
    with ending_on_request():
        _run_stage(stage, suite_name, variant, seed, dataset, workers, settings)


@contextmanager
def ending_on_request() -> Iterator[None]:
    """Signals ask for an end, and Stopped becomes one line and typer.Exit(75)."""
    with stopping.stoppable():
        try:
            yield
        except stopping.Stopped as stopped:
            print(f"indm-bench: stopped ({stopped}); the same command continues", file=sys.stderr)
            raise typer.Exit(stopping.EXIT_CODE) from None


def _run_stage(
    stage: str,
    suite_name: str,
    variant: str | None,
    seed: int | None,
    dataset: str | None,
    workers: int | None,
    settings: Sequence[str] | None,
) -> None:
    with one_voice():
        suite = load_suite(suite_name, settings or [])
        check_workers(workers)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            workers = 1  # the processes that torchrun started share each run
        side_by_side = workers != 1 and usable_cores() > 1 and suite.count(variant, seed, dataset) > 1
        arguments = (suite, variant, seed, dataset)
        runs, device_for_one = ask_server(stage, resolve, *arguments) if side_by_side else resolve(*arguments)
    if workers is None and device_for_one:
        workers = 1
    failed = work(stage, suite, runs, workers)
    if failed:
        raise typer.Exit(2 if all(cell.bad_input for cell in failed) else 1)


@contextmanager
def one_voice() -> Iterator[None]:
    """A block in which bad input that any of several processes finds ends them all, told by the first alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    from bench import sharding

    sharding.join()
    try:
        with sharding.session():
            yield
    except InputError:
        if sharding.team().rank:
            raise typer.Exit(2) from None
        raise


def resolve(suite: Suite, variant: str | None, seed: int | None, dataset: str | None) -> tuple[list[RunConfig], bool]:
    """The validated runs, and whether they share a device on which only one of them has room."""
    import torch

    return suite.runs(variant, seed, dataset), torch.cuda.is_available()


def check_workers(workers: int | None) -> None:
    """Refuse a number of workers below one."""
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: must be at least 1")


def work(stage: str, suite: Suite, runs: Sequence[RunConfig], workers: int | None) -> list[Cell]:
    """Do the runs' stage, tell of each failure on stderr, and return the failed cells.

    Raises Stopped, once the failures are told, where an end was asked for before all were done.
    """
    cells = [Cell(label(suite, run), run) for run in runs]
    if workers is None:
        workers = default_workers(len(cells), usable_cores())
    if min(workers, len(cells)) == 1:
        run_here(stage, cells)
    else:
        run_beside(stage, cells, workers)
    failed = [cell for cell in cells if cell.error]
    for cell in failed:
        if cell.log:
            print(f"--- {stage} {cell.label}\n{cell.log.rstrip()}", file=sys.stderr)
    for cell in failed:
        if not (cell.shared and int(os.environ.get("RANK", 0))):  # several processes speak with one voice
            print(f"indm-bench: {stage} {cell.label}: {cell.error}", file=sys.stderr)
    left = sum(cell.stopped for cell in cells)
    if left:
        reason = stopping.requested() or "another process was asked to stop"
        raise stopping.Stopped(f"{reason}: {stage}: {left} of {len(cells)} runs not done")
    return failed


def label(suite: Suite, run: RunConfig) -> str:
    """`suite/variant/seed[/dataset]`, for messages."""
    parts = [run.suite, run.variant, str(run.seed)] + ([run.dataset] if len(suite.datasets) > 1 else [])
    return "/".join(parts)


def train_features(suite_name: str, runs: Sequence[RunConfig] | None = None) -> None:
    """Train the classifiers that judge the samples of the runs, by default of all; one of the same recipe is kept."""
    from bench.data import load
    from bench.features import train_classifier
    from bench.settings import FEATURE_DIMS

    for name in feature_datasets(load_suite(suite_name).runs() if runs is None else runs):
        stopping.check()
        path = features_file(suite_name, name)
        data = load(name)
        epochs = max(1, min(CLASSIFIER_EPOCHS, CLASSIFIER_IMAGES // len(data.train)))
        accuracy = train_classifier(data, path, epochs=epochs, features=FEATURE_DIMS["classifier"])
        print(f"{name}: classifier of {100 * accuracy:.1f} % test accuracy in {path}")


def write_references(suite_name: str) -> None:
    """Write `references.json` of a suite's report: likelihoods of its data sets that need no training."""
    from bench.baselines import gaussian_nll
    from bench.data import load
    from bench.files import write_json

    references = {}
    for name in load_suite(suite_name).datasets:
        data = load(name)
        nll = gaussian_nll(data)
        if nll is not None:
            units = "nats" if data.levels is None else "bits/dim"
            references[name] = {"gaussian_full_covariance": {"nll": nll, "units": units}}
            print(f"{name}: a full-covariance Gaussian reaches {nll:.4f} {units}")
    write_json(reports_root() / suite_name / "references.json", references)


def feature_datasets(runs: Sequence[RunConfig]) -> list[str]:
    """Data sets whose samples are judged through a classifier of their own, in the runs' order."""
    return list(dict.fromkeys(run.dataset for run in runs if run.evaluate.features == "classifier"))


def write_report(suite_name: str | None) -> None:
    """Write the report of a suite and print its likelihood table, or write the page of all suites (None)."""
    if suite_name is None:
        from bench.report import report_index

        report_index()
        print(f"page: {reports_root() / 'index.html'}")
        return
    from bench.pipeline import record_reports
    from bench.report import report_suite

    load_suite(suite_name)
    report_suite(suite_name)
    record_reports()
    folder = reports_root() / suite_name
    print(f"\n{(folder / 'nll_nelbo_gap.md').read_text().strip()}\n\ntables and figures: {folder}", flush=True)


def check_regression(suite_name: str, against: Path) -> None:
    """Compare a suite's report with committed tables; typer.Exit(1) where they differ beyond their tolerance."""
    from bench.regression import regression

    load_suite(suite_name)
    if not against.is_dir():
        raise InputError(f"--against {against}: no such folder; give one that holds a report of {suite_name}")
    code = regression(against, reports_root() / suite_name, suite_name)
    if code:
        raise typer.Exit(code)


def run_suite(
    suite_name: str,
    variant: str | None = None,
    seed: int | None = None,
    dataset: str | None = None,
    workers: int | None = None,
    settings: Sequence[str] | None = None,
    minutes: float | None = None,
) -> None:
    """All stages of a suite in process. The report is written from what succeeded; typer.Exit(1) if anything failed.

    typer.Exit(75), and no report, where an end was asked for before all was done (bench.stopping). ``minutes``: ask for
    it in good time before so many have passed, and say what is left.
    """
    with ending_on_request():
        if minutes is not None:
            from bench.budget import seconds_to_work

            stopping.set_deadline(seconds_to_work(minutes))
        suite = load_suite(suite_name, settings or [])
        check_workers(workers)
        runs, device_for_one = resolve(suite, variant, seed, dataset)
        workers = 1 if workers is None and device_for_one else workers
        try:
            _run_suite(suite, runs, workers, minutes)
        except stopping.Stopped:
            tell_left(suite, runs, workers, minutes)
            raise


def _run_suite(suite: Suite, runs: Sequence[RunConfig], workers: int | None, minutes: float | None) -> None:
    from bench.budget import left_of

    left = left_of(runs)
    if minutes is not None or len(left.evaluate) < len(runs):
        tell_left(suite, runs, workers, minutes)
    waiting = {label(suite, run) for run in left.train}
    for run in runs:
        if label(suite, run) not in waiting:
            (run.folder / "failure.json").unlink(missing_ok=True)  # of another configuration that was tried here
    if left.evaluate:
        train_features(suite.name, runs)
    failed = work("train", suite, left.train, workers) if left.train else []
    lost = {cell.label for cell in failed}
    measurable = [run for run in left.evaluate if label(suite, run) not in lost]
    failed += work("evaluate", suite, measurable, workers) if measurable else []
    # last, so that nothing computed can be lost by a table or a figure
    stopping.check()
    write_references(suite.name)
    stopping.check()
    write_report(suite.name)
    write_report(None)
    if failed:
        raise typer.Exit(1)


def tell_left(suite: Suite, runs: Sequence[RunConfig], workers: int | None, minutes: float | None) -> None:
    """One line on what the runs' files say is done, what is left, and how many pieces of ``minutes`` that takes."""
    from bench.budget import left_of

    left = left_of(runs)
    side_by_side = default_workers(len(left.evaluate), usable_cores()) if workers is None else workers
    print(f"{suite.name}: {left.describe(minutes, side_by_side)}", flush=True)


def trained_run(suite_name: str, variant: str, seed: int | None, dataset: str | None) -> RunConfig:
    """The run as it was trained, overrides included; InputError when it was not."""
    suite = load_suite(suite_name)
    if dataset is None and len(suite.datasets) > 1:
        raise InputError(f"--dataset: missing, {suite_name} has several; accepted: {', '.join(suite.datasets)}")
    chosen = suite.runs(variant, seed, dataset)[0]
    return read_run(chosen.folder)


def draw_samples(
    suite_name: str,
    variant: str,
    seed: int | None,
    dataset: str | None,
    count: int,
    first: int,
    sampler: str,
    steps: int,
    out: Path,
) -> None:
    """Samples ``first``..``first + count - 1`` of a trained run, as an array (count, *shape) or a picture."""
    from models.samplers import SAMPLERS

    if sampler not in SAMPLERS:
        raise InputError(f"--sampler {sampler!r}: unknown; accepted: {', '.join(SAMPLERS)}")
    if out.suffix not in (".npz", ".png"):
        raise InputError(f"--out {out}: unknown kind of file; accepted: .npz, .png")
    run = trained_run(suite_name, variant, seed, dataset)

    import numpy as np
    import torch

    from bench.data import load, quantise
    from bench.evaluate import load_model
    from bench.files import atomic_path
    from bench.sampling import draw

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load(run.dataset)
    x, nfe, seconds = draw(
        load_model(run, device), count, sampler, steps, run.seed, run.evaluate.batch_size, first=first
    )
    if out.suffix == ".png":
        from bench.pictures import draw_samples as picture

        picture(out, x, data)
    else:
        samples = x.numpy() if data.levels is None else quantise(x, data.levels).numpy()
        with atomic_path(out) as temporary:
            np.savez_compressed(temporary, samples=samples, index=np.arange(first, first + count))
    print(f"{count} samples, {nfe:g} network evaluations each, {seconds:.1f} s: {out}")


def export_run(suite_name: str, variant: str, seed: int | None, dataset: str | None, out: Path) -> None:
    """Copy weights (with the configuration in their metadata), `config.yaml` and `provenance.json`."""
    run = trained_run(suite_name, variant, seed, dataset)
    if damaged := seals.damage(run.folder, seals.TRAIN):
        raise InputError(f"{run.folder}: {next(iter(damaged.values()))}; accepted: train the run again first")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out}: this folder is not empty")
    out.mkdir(parents=True, exist_ok=True)
    for path in ("weights/model.safetensors", "config.yaml", "provenance.json"):
        source = run.folder / path
        if not source.is_file():
            raise InputError(f"{source}: missing; train the run first")
        shutil.copyfile(source, out / source.name)
    print(f"{variant} (seed {run.seed}): {out}")


def import_weights(
    file: Path,
    config: str,
    out: Path,
    kind: str,
    weights: str,
    shape: str,
    settings: Sequence[str] | None,
    flow: Path | None = None,
) -> None:
    """Write the folder of an imported checkpoint; ``shape`` is text as "3,32,32"."""
    sides = shape.split(",")
    if len(sides) != 3 or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
        raise InputError(f"--shape {shape}: accepted: channels, height and width, for example 3,32,32")

    from bench.importing.pretrained import import_checkpoint

    imported = import_checkpoint(file, out, config, kind, weights, [int(side) for side in sides], settings or (), flow)
    unusable = "" if imported.space == "data" else f"; its score is of {imported.space}, it cannot be evaluated alone"
    print(f"{imported.config} ({imported.weights} weights): {out}{unusable}")


def measure_pretrained(
    path: Path,
    suite_name: str,
    variant: str | None,
    seed: int | None,
    dataset: str | None,
    name: str | None,
    out: Path | None,
    settings: Sequence[str] | None,
) -> None:
    """Evaluate a model trained elsewhere and print its likelihood."""
    from bench.files import read_json
    from bench.importing.measure import evaluate_pretrained

    run = evaluate_pretrained(path, suite_name, variant, seed, dataset, name, out, settings or ())
    record = read_json(run.folder / "likelihood.json")
    numbers = {key: (record[key] or {}).get("corrected") for key in ("nll", "nelbo")}
    said = [f"{key.upper()} {value['total']:.4f} {record['units']}" for key, value in numbers.items() if value]
    if not int(os.environ.get("RANK", 0)):  # of several processes, one speaks
        print(f"{run.variant}: {', '.join(said) or record['status']}; {run.folder}")
