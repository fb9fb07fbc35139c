"""Everything measured on a trained run, and on a run in training for its learning curve."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import models
from bench.checkpoint import file_hash
from bench.config import RunConfig
from bench.data import Dataset, load, quantise
from bench.distances import energy_distance, sliced_wasserstein
from bench.errors import InputError
from bench.files import atomic_path, write_json, write_text_atomic
from bench.finished import is_evaluated, is_trained
from bench.likelihood import (
    FAILURES,
    Units,
    bound_kind,
    chain_steps,
    measure,
    nelbo_per_image,
    nll_per_image,
    test_points,
    total_nats,
)
from bench.sampling import draw
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
    if not bool(torch.isfinite(x).all()):
        return {"status": f"{int((~torch.isfinite(x)).flatten(1).any(1).sum())} of {len(x)} samples not finite"}
    if not metrics:
        return {"status": "ok"}
    if data.levels is None:
        measured: dict[str, Any] = {"status": "ok"}
        if "sliced_wasserstein" in metrics:
            measured["sliced_wasserstein"] = sliced_wasserstein(x, data.test[: len(x)])
        if "energy" in metrics:
            measured["energy"] = energy_distance(x, data.test)
        return measured
    from bench.fidelity import image_quality

    measured = image_quality(
        quantise(x, data.levels),
        data.train,
        extractor_name(run),
        metrics,
        levels=data.levels,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    if "fid" in measured:  # Inception's Frechet distance; the features' name stands in the record
        measured["fd"] = measured["fid"]
    return measured


def extractor_name(run: RunConfig) -> str | None:
    """The registered feature extractor of a run: its suite's classifier, by content, or Inception; None for points."""
    if run.evaluate.features != "classifier":
        return run.evaluate.features
    from bench.features import load_extractor

    if not run.features_file.is_file():
        raise InputError(f"{run.features_file}: not found; accepted: run `indm-bench features {run.suite}` first")
    return load_extractor(run.features_file).extractor_name


def curve_point(model: Model, run: RunConfig, data: Dataset, device) -> dict[str, float | None]:
    """One row of the learning curve: NELBO, NLL and sample quality of the averaged weights.

    Each is tried on its own, and None where it failed or is not defined. Samples are drawn by ``model.curve_sampler``.
    """
    settings, units = run.train, Units(data)
    suffix = "nats" if data.levels is None else "bpd"
    metric = "energy" if data.levels is None else "fd"
    x = test_points(data, min(settings.curve_images, len(data.test)), run.seed)
    batch = run.evaluate.batch_size

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
        drawn = draw(model, settings.curve_samples, model.curve_sampler, settings.curve_steps, run.seed, batch)
        return quality(drawn[0], run, data, [metric]).get(metric)

    row: dict[str, float | None] = {}
    for name, measured in ((f"nelbo_{suffix}", nelbo), (f"nll_{suffix}", nll), (metric, distance)):
        try:
            row[name] = measured()
        except FAILURES:
            row[name] = None
    return row


def robustness(model: Model, run: RunConfig, data: Dataset) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Rows of robustness.csv, and the samples of each sampler at its largest number of steps.

    Every number of steps starts from the same prior draws, so rows of one sampler are paired.
    """
    rows, kept = [], {}
    for entry in run.evaluate.samplers:
        options = {k: v for k, v in entry.items() if k not in ("name", "steps")}
        for steps in entry["steps"]:
            row = dict.fromkeys(ROBUSTNESS_COLUMNS) | {
                "sampler": entry["name"],
                "steps": steps,
                "n": run.evaluate.samples,
            }
            try:
                x, row["nfe"], row["seconds"] = draw(
                    model, run.evaluate.samples, entry["name"], steps, run.seed, run.evaluate.batch_size, **options
                )
                measured = quality(x, run, data, run.evaluate.quality)
                row |= {key: value for key, value in measured.items() if key in ROBUSTNESS_COLUMNS}
                kept[entry["name"]] = x
            except FAILURES as error:
                row["status"] = " ".join(str(error).split())
            rows.append(row)
    return rows, kept


def protocol(run: RunConfig, model: Model) -> dict[str, Any]:
    """What must agree before two likelihoods or two distances may share a table."""
    settings = run.evaluate
    return {
        # a truncation is chosen for measuring; where a chain has its first level belongs to the model itself
        "eps": model.sde.eps if hasattr(model, "sde") and chain_steps(model) is None else None,
        "chain_start": model.sde.eps if hasattr(model, "sde") and chain_steps(model) is not None else None,
        # a variant's own: each model is bounded as it is defined, and the tables say how
        "bound": bound_kind(model),
        "curve_sampler": model.curve_sampler,
        "dequantiser": "uniform",
        "weights": "ema",
        "nelbo_repeats": settings.nelbo_repeats,
        "nelbo_times": settings.nelbo_times,
        **_time_sampling(model),
        "rtol": settings.rtol,
        "atol": settings.atol,
        "probes": settings.probes,
        "images": settings.images,
        "samples": settings.samples,
        "features": extractor_name(run),
        "quantiser": "floor",
        "reference": "test" if len(model.shape) == 1 else "train",
    }


def _time_sampling(model: Model) -> dict[str, Any]:
    """How the bound's noise levels are drawn, where the model draws any: the defaults of its estimator."""
    options = inspect.signature(model.nelbo_parts).parameters
    names = ("proposal", "draws", "control_variate")
    return {f"nelbo_{name}": options[name].default for name in names if name in options}


def evaluate(run: RunConfig) -> None:
    """Write per_image.npz, robustness.csv, the pictures, a CSV file a study and, last, likelihood.json of one run."""
    if is_trained(run) and is_evaluated(run):
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(run, device)
    data, started = load(run.dataset), time.perf_counter()
    header = {
        "schema": 1,
        "suite": run.suite,
        "dataset": run.dataset,
        "variant": run.variant,
        "seed": run.seed,
        "config_hash": run.hash,
        "weights_sha256": file_hash(run.folder / "weights" / "model.safetensors"),
        "protocol": protocol(run, model),
    }
    folder = run.folder
    (folder / "likelihood.json").unlink(missing_ok=True)  # written last: until then nothing is finished
    record, arrays = measure(model, data, run.evaluate, run.seed, device)
    with atomic_path(folder / "per_image.npz") as temporary:
        np.savez_compressed(temporary, **arrays)
    rows, samples = robustness(model, run, data)
    write_robustness(folder / "robustness.csv", rows)
    pictures(model, run, data, samples, folder)
    conduct(Context(model, run, data, device), folder)
    write_json(folder / "likelihood.json", header | record | {"evaluate_seconds": time.perf_counter() - started})


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
