"""What the commands do, once their arguments are read."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from bench.config import RunConfig, Suite, features_file, load_suite, read_run, reports_root
from bench.errors import InputError
from bench.provenance import usable_cores
from bench.workers import Cell, ask_server, default_workers, run_beside, run_here


def run_stage(
    stage: str,
    suite_name: str,
    variant: str | None,
    seed: int | None = None,
    dataset: str | None = None,
    workers: int | None = None,
    settings: Sequence[str] | None = None,
) -> None:
    """Train or evaluate the chosen runs. Bad input in any stops all before any work; typer.Exit(1) on failure."""
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


def resolve(suite: Suite, variant: str | None, seed: int | None, dataset: str | None) -> tuple[list[RunConfig], bool]:
    """The validated runs, and whether they share a device on which only one of them has room."""
    import torch

    return suite.runs(variant, seed, dataset), torch.cuda.is_available()


def check_workers(workers: int | None) -> None:
    """Refuse a number of workers below one."""
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: must be at least 1")


def work(stage: str, suite: Suite, runs: Sequence[RunConfig], workers: int | None) -> list[Cell]:
    """Do the runs' stage, tell of each failure on stderr, and return the failed cells."""
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
        print(f"indm-bench: {stage} {cell.label}: {cell.error}", file=sys.stderr)
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
        path = features_file(suite_name, name)
        accuracy = train_classifier(load(name), path, features=FEATURE_DIMS["classifier"])
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
    from bench.report import report_suite

    load_suite(suite_name)
    report_suite(suite_name)
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
) -> None:
    """All stages of a suite in process. The report is written from what succeeded; typer.Exit(1) if anything failed."""
    suite = load_suite(suite_name, settings or [])
    check_workers(workers)
    runs, device_for_one = resolve(suite, variant, seed, dataset)
    if workers is None and device_for_one:
        workers = 1
    write_references(suite_name)
    train_features(suite_name, runs)
    failed = work("train", suite, runs, workers)
    lost = {cell.label for cell in failed}
    failed += work("evaluate", suite, [run for run in runs if label(suite, run) not in lost], workers)
    write_report(suite_name)
    write_report(None)
    if failed:
        raise typer.Exit(1)


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
    print(f"{run.variant}: {', '.join(said) or record['status']}; {run.folder}")
