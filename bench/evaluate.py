"""Everything measured on a trained run, and on a run in training for its learning curve."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import models
from bench import seals, sharding, stopping
from bench.acceleration import float32
from bench.batches import FAILURES, Work
from bench.checkpoint import exclusive_results
from bench.config import RunConfig
from bench.data import Dataset, dequantise, load, quantise
from bench.distances import energy_distance, sliced_wasserstein
from bench.errors import InputError
from bench.files import atomic_path, file_hash, write_text_atomic
from bench.finished import is_evaluated, is_trained
from bench.likelihood import (
    Units,
    bound_kind,
    expected_costs,
    likelihood_batch,
    measure,
    nelbo_per_image,
    nll_per_image,
    test_points,
    total_nats,
)
from bench.pieces import Pieces
from bench.sampling import draw, draw_samples, training_mean
from bench.studies import Context, conduct
from models.base import Model

ROBUSTNESS_COLUMNS = (
    "sampler",
    "steps",
    "nfe",
    "n",
    "fd",
    "kid",
    "precision",
    "recall",
    "sliced_wasserstein",
    "energy",
    "seconds",
    "status",
)
CURVE_TIMES = 16
CURVE_TOLERANCE = 1e-3
PICTURED = 64  # images of samples.png
# network evaluations of samplers that take more or fewer than one a step, for a progress line
EVALUATIONS = {
    "predictor_corrector": lambda steps: 2 * steps,
    "published_pc": lambda steps: 2 * steps,
    "heun": lambda steps: 2 * steps,
    "ode": lambda _: 60,
    "published_ode": lambda _: 60,
}


def load_model(run: RunConfig, device: str | torch.device = "cpu") -> Model:
    """The trained model of a run with its averaged weights; InputError when the training is missing or stale."""
    from safetensors.torch import load_file

    if not is_trained(run):
        raise InputError(
            f"{run.folder}: no finished training of this configuration ({run.training_hash}); "
            f"accepted: run `indm-bench train {run.suite} {run.variant} --seed {run.seed}` first"
        )
    data = load(run.dataset)
    model = models.build({**run.model, "shape": list(data.shape)}).to(device).eval().requires_grad_(False)
    model.load_state_dict(load_file(run.folder / "weights" / "model.safetensors", device=str(device)))
    return model


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def quality(x: Tensor, run: RunConfig, data: Dataset, metrics: Sequence[str]) -> dict[str, Any]:
    """Sample-quality metrics of model samples x (n, *shape) against the data, and a ``status``.

    Points are compared with as many test points (sliced Wasserstein) or all of them (energy); images are turned into
    uint8 by :func:`bench.data.quantise` and compared with the training images, as FID is.
    """
    finite = torch.isfinite(x).flatten(1).all(1)
    return _quality(_as_data(x, data) if bool(finite.all()) else x, finite, run, data, metrics)


def _as_data(x: Tensor, data: Dataset) -> Tensor:
    return x if data.levels is None else quantise(x, data.levels)


def _quality(
    x: Tensor, finite: Tensor, run: RunConfig, data: Dataset, metrics: Sequence[str], stoppable: bool = False
) -> dict[str, Any]:
    """As :func:`quality` of points or uint8 images; ``stoppable``: it may be ended on request (Stopped).

    All processes call it, and all get the result.
    """
    if not bool(finite.all()):
        return {"status": f"{int((~finite).sum())} of {len(x)} samples not finite"}
    if not metrics:
        return {"status": "ok"}
    if data.levels is None:
        return sharding.on_main(lambda: _point_quality(x, data, metrics))
    from bench.fidelity import image_quality

    options = {"levels": data.levels, "device": sharding.device(), "stoppable": stoppable}
    measured = image_quality(x, data.train, extractor_name(run), metrics, **options)
    if "fid" in measured:  # Inception's Frechet distance; the features' name stands in the record
        measured["fd"] = measured["fid"]
    return measured


def _point_quality(x: Tensor, data: Dataset, metrics: Sequence[str]) -> dict[str, Any]:
    measured: dict[str, Any] = {"status": "ok"}
    if "sliced_wasserstein" in metrics:
        measured["sliced_wasserstein"] = sliced_wasserstein(x, data.test[: len(x)])
    if "energy" in metrics:
        measured["energy"] = energy_distance(x, data.test)
    return measured


def extractor_name(run: RunConfig) -> str | None:
    """The registered feature extractor of a run: its suite's classifier, by content, or Inception; None for points."""
    if run.evaluate.features != "classifier":
        if run.evaluate.features == "inception":
            from bench.fidelity import given_inception

            given_inception()  # a wrong path is refused before anything is computed
        return run.evaluate.features
    from bench.features import load_extractor

    if not run.features_file.is_file():
        raise InputError(f"{run.features_file}: not found; accepted: run `indm-bench features {run.suite}` first")
    return load_extractor(run.features_file).extractor_name


def curve_point(model: Model, run: RunConfig, data: Dataset, device) -> dict[str, float | None]:
    """One row of the learning curve: NELBO, NLL and sample quality of the averaged weights.

    Each is tried on its own, and None where it failed or is not defined. Samples are drawn by ``model.curve_sampler``.
    The processes of a training share the work; all call this, and all get the row.
    """
    with sharding.session():
        return _curve_point(model, run, data, device)


def _curve_point(model: Model, run: RunConfig, data: Dataset, device) -> dict[str, float | None]:
    settings, units = run.train, Units(data)
    suffix = "nats" if data.levels is None else "bpd"
    metric = "energy" if data.levels is None else "fd"
    x = test_points(data, min(settings.curve_images, len(data.test)), run.seed)
    batch = likelihood_batch(run.evaluate)

    def nelbo() -> float | None:
        (parts,) = nelbo_per_image(model, x, 1, CURVE_TIMES, batch, run.seed, device)
        return _finite(units.total(total_nats(parts).mean()))

    def nll() -> float | None:
        tolerance = {"rtol": CURVE_TOLERANCE, "atol": CURVE_TOLERANCE, "probes": run.evaluate.probes}
        parts = nll_per_image(model, x, batch, run.seed, device, corrected=True, **tolerance)
        return _finite(units.total(total_nats(parts).mean()))

    def distance() -> float | None:
        if not settings.curve_samples:
            return None
        count, steps = settings.curve_samples, settings.curve_steps
        drawn = draw(model, count, model.curve_sampler, steps, run.seed, run.evaluate.batch_size)
        return quality(drawn[0], run, data, [metric]).get(metric)

    row: dict[str, float | None] = {}
    for name, measured in ((f"nelbo_{suffix}", nelbo), (f"nll_{suffix}", nll), (metric, distance)):
        try:
            row[name] = measured()
        except FAILURES:
            row[name] = None
    return row


def robustness(
    model: Model, run: RunConfig, data: Dataset, work: Work | None = None
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Rows of robustness.csv, and some samples of each sampler at its largest number of steps: all points, 64 images.

    Every number of steps starts from the same prior draws, so rows of one sampler are paired. Of several processes,
    which share the work, only the first has the samples.
    """
    rows, kept, work = [], {}, work or Work()
    if any(entry.get("data_mean") for entry in run.evaluate.samplers):
        model.prior_mean = training_mean(model, data, run.seed, run.evaluate.batch_size)
    for entry in run.evaluate.samplers:
        for steps in entry["steps"]:
            name = f"{entry['name']} {steps}"
            row, shown = work.result(name, lambda e=entry, s=steps: _row(model, run, data, work, e, s), [f"{name} x"])
            if "x" in shown:
                kept[entry["name"]] = torch.from_numpy(shown["x"])
            rows.append(row)
    return rows, kept


def _row(
    model: Model, run: RunConfig, data: Dataset, work: Work, entry: Mapping[str, Any], steps: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One row, and samples x to be shown where there are any."""
    settings, sampler, name = run.evaluate, entry["name"], f"{entry['name']} {steps}"
    options = {k: v for k, v in entry.items() if k not in ("name", "steps")}
    row = dict.fromkeys(ROBUSTNESS_COLUMNS) | {"sampler": sampler, "steps": steps, "n": settings.samples}
    try:
        drawn = draw_samples(
            model,
            settings.samples,
            sampler,
            steps,
            run.seed,
            settings.batch_size,
            work=work,
            name=f"{name} x",
            quantity=name,
            finish=lambda x: _as_data(x, data),
            **options,
        )
        row["nfe"], row["seconds"] = drawn.nfe, drawn.seconds
        measured = _quality(drawn.x, drawn.finite, run, data, settings.quality, work.stoppable)
    except FAILURES as error:
        return row | {"status": " ".join(str(error).split())}, {}
    row |= {key: value for key, value in measured.items() if key in ROBUSTNESS_COLUMNS}
    if not bool(drawn.finite.all()):
        return row, {}
    if data.levels is None:
        return row, {"x": drawn.x.numpy()}
    shown = drawn.x[:PICTURED]
    # the middle of each grey level: what is quantised again is the same
    return row, {"x": dequantise(shown, torch.full(shown.shape, 0.5), data.levels).numpy()}


def protocol(run: RunConfig, model: Model) -> dict[str, Any]:
    """What must agree before two likelihoods or two distances may share a table."""
    settings = run.evaluate
    return {
        # a truncation is chosen for measuring; where a chain has its first level belongs to the model itself
        "eps": model.eps if model.chain_steps is None else None,
        "chain_start": None if model.chain_steps is None else model.eps,
        # a variant's own: each model is bounded as it is defined, and the tables say how
        "bound": bound_kind(model),
        "curve_sampler": model.curve_sampler,
        "dequantiser": "uniform",
        "weights": _measured_weights(run),
        "nelbo_repeats": settings.nelbo_repeats,
        "nelbo_times": settings.nelbo_times,
        **_time_sampling(model),
        "rtol": settings.rtol,
        "atol": settings.atol,
        **({} if settings.solver == "dopri5" else {"solver": settings.solver}),
        "probes": settings.probes,
        "images": settings.images,
        "samples": settings.samples,
        "features": extractor_name(run),
        "quantiser": "floor",
        "reference": "test" if len(model.shape) == 1 else "train",
    }


def _measured_weights(run: RunConfig) -> str:
    # a model trained elsewhere has no training of this harness; whoever evaluates it says which weights it has
    return run.train.measured_weights if getattr(run, "train", None) else "ema"


def _time_sampling(model: Model) -> dict[str, Any]:
    """How the bound's noise levels are drawn, where the model draws any: the defaults of its estimator."""
    options = inspect.signature(model.nelbo_parts).parameters
    names = ("proposal", "draws", "control_variate")
    return {f"nelbo_{name}": options[name].default for name in names if name in options}


def evaluate(run: RunConfig) -> None:
    """Write per_image.npz, robustness.csv, the pictures, a CSV file a study and, last, likelihood.json of one run.

    Processes that torchrun started share the work. An evaluation that was killed, or ended on request (Stopped), is
    continued by the next call.
    """
    sharding.join()
    with sharding.session():
        if sharding.on_main(lambda: is_trained(run) and is_evaluated(run)):
            return
        with exclusive_results(run.folder, sharding.team().main):
            if not sharding.on_main(lambda: is_trained(run) and is_evaluated(run)):
                _evaluate(run)


def _evaluate(run: RunConfig) -> None:
    device = sharding.device()
    model = load_model(run, device)
    weights = file_hash(run.folder / "weights" / "model.safetensors")
    sharding.on_main(lambda: seals.begin(run.folder, seals.EVALUATE))
    write_evaluation(run, model, load(run.dataset), device, weights, protocol(run, model))


@float32(tf32=False)
def write_evaluation(
    run: RunConfig, model: Model, data: Dataset, device: torch.device, weights_sha256: str, agreed: dict[str, Any]
) -> None:
    """Measure a model and write its results to the run's folder, likelihood.json last; ``agreed``: its protocol.

    All processes of a session call it with the same model; the first one writes. Finished pieces are kept beside the
    checkpoints until the results stand.
    """
    started, folder, settings = time.perf_counter(), run.folder, run.evaluate
    pieces = Pieces(run.hash, weights_sha256, {"protocol": agreed, "data": data.hash, "device": device.type})
    sharding.on_main(pieces.open)
    images = min(settings.images or len(data.test), len(data.test))
    costs = expected_costs(model, settings, images) | {
        f"{entry['name']} {steps}": (settings.samples, EVALUATIONS.get(entry["name"], float)(steps))
        for entry in settings.samplers
        for steps in entry["steps"]
    }
    work = Work(pieces, costs, f"{run.variant}/{run.dataset}/{run.seed}")
    try:
        record, arrays = measure(model, data, settings, run.seed, device, work)
        sharding.on_main(lambda: write_arrays(folder / "per_image.npz", arrays))
        rows, samples = robustness(model, run, data, work)
    finally:
        work.close()

    def conclude() -> None:
        stopping.check()
        write_robustness(folder / "robustness.csv", rows)
        pictures(model, run, data, samples, folder)
        conduct(Context(model, run, data, device), folder)
        header = {
            "schema": 1,
            "suite": run.suite,
            "dataset": run.dataset,
            "variant": run.variant,
            "seed": run.seed,
            "config_hash": run.hash,
            "weights_sha256": weights_sha256,
            "protocol": agreed,
        }
        seconds = time.perf_counter() - started + work.spared
        done = header | record | {"evaluate_seconds": seconds}
        seals.publish(folder, seals.EVALUATE, seals.evaluated_files(settings.studies), done)
        pieces.remove()

    sharding.on_main(conclude)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """The arrays as a compressed .npz file, atomically."""
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def write_robustness(path: Path, rows: list[dict[str, Any]]) -> None:
    """The step-robustness rows as CSV; blank where a metric is not defined."""
    import pandas as pd

    write_text_atomic(path, pd.DataFrame(rows, columns=list(ROBUSTNESS_COLUMNS)).to_csv(index=False))


def pictures(model: Model, run: RunConfig, data: Dataset, samples: dict[str, Tensor], folder: Path) -> None:
    """samples.png and trajectory.png, for the eye."""
    from bench.pictures import draw_samples, draw_trajectory

    x = next((s for s in samples.values() if bool(torch.isfinite(s).all())), None)
    draw_samples(folder / "samples.png", x, data)
    few = min(8 if data.levels is not None else 2000, len(data.test))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    times = [0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0]
    try:
        from models.noise import IndexedGenerator

        source = IndexedGenerator(run.seed, "trajectory", torch.arange(few))
        path = model.trajectory(test_points(data, few, run.seed).to(device), times, source).cpu()
    except FAILURES:
        path = None
    draw_trajectory(folder / "trajectory.png", path, times, data)
