"""The suite cifar10-lite on images made here: it resolves, every variant takes steps, its measurements run."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.commands import train_features
from bench.config import load_suite
from bench.evaluate import evaluate
from bench.train import Trainer, train

ROOT = Path(__file__).parents[1]
SUITE = load_suite("cifar10-lite")
# digits has every kind of model too; what the suite cifar10 adds are depths
VARIANTS = set(load_suite("digits").variants)
SMALL = [
    "train.batch_size=2",
    "train.warmup=1",
    "train.curve=1",
    "train.curve_images=2",
    "evaluate.images=2",
    "evaluate.nelbo_repeats=2",
    "evaluate.nelbo_times=1",
    "evaluate.rtol=0.1",
    "evaluate.atol=0.1",
    "evaluate.samples=64",
    "evaluate.samplers=[{name: ddim, steps: [2]}]",
]
TINY = [*SMALL, "train.steps=2", "train.curve_samples=0", "model.score.nf=32"]


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory):
    """Both data sets in miniature, in the formats of the real ones, and folders for results."""
    folder = tmp_path_factory.mktemp("lite")
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 4)):
        for label in range(2):
            place = folder / "data" / "cifar10-jpeg" / part / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(64 * label, 64 * label + 192, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i:04d}.jpg", quality=75)
    pixels = {
        f"{part}_images": generator.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8) for part in ("train", "test")
    }
    np.savez(folder / "data" / "cifar10-raw-subset.npz", **pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INDM_BENCH_DATA", str(folder / "data"))
        patch.setenv("INDM_BENCH_RUNS", str(folder / "runs"))
        patch.setenv("INDM_BENCH_CHECKPOINTS", str(folder / "checkpoints"))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield folder


def test_it_holds_every_variant_on_both_data_sets():
    assert set(SUITE.variants) == VARIANTS
    assert SUITE.datasets == ["cifar10-16", "cifar10"] and SUITE.seeds_of("indm-vp-nll") == [0, 1, 2]
    runs = SUITE.runs()
    assert len(runs) == SUITE.count() == len(SUITE.datasets) * (3 * len(SUITE.core) + len(SUITE.more))
    for run in runs:
        # many images are judged where there are many, the original pixels are there for likelihood
        judged = run.evaluate.samples if run.evaluate.quality else 0
        assert judged == (2048 if run.dataset == "cifar10-16" else 0)
        assert run.train.checkpoint_every <= 200  # what is killed loses little


@pytest.mark.parametrize("variant", SUITE.variants)
def test_every_variant_takes_steps(variant):
    run = load_suite("cifar10-lite", [*SMALL, "train.curve_samples=0"]).runs(variant, 0, "cifar10-16")[0]
    trainer = Trainer(run, progress=False)
    trainer.model.train()
    changes = variant.startswith("sbp") or variant == "indm-vp-pretrained"
    for step in (0, run.train.steps - 1) if changes else (0,):
        trainer.step = step
        before = {name: [p.detach().clone() for p in params] for name, params in trainer.groups.items()}
        terms = trainer.train_step()
        assert all(math.isfinite(float(value)) for value in terms.values())
    moved = {name for name, params in trainer.groups.items() if any(map(differ, before[name], params))}
    assert moved == {"drift"} or "score" in moved
    assert ("flow" in moved) == ("flow" in trainer.groups)


def differ(before, after):
    """Whether a parameter has changed."""
    return not torch.equal(before, after.detach())


@pytest.mark.parametrize("dataset", SUITE.datasets)
def test_likelihood_and_sample_quality_are_measured(dataset, files):
    run = load_suite("cifar10-lite", TINY).runs("indm-vp-nll", 0, dataset)[0]
    train_features("cifar10-lite", [run])
    train(run, progress=False)
    evaluate(run)
    record = json.loads((run.folder / "likelihood.json").read_text())
    assert record["status"] == "ok" and record["units"] == "bits/dim" and record["n"] == 2
    assert record["dims"] == (768 if dataset == "cifar10-16" else 3072)
    # the tables say which images these were
    assert record["data"]["name"] == ("cifar10-16" if dataset == "cifar10-16" else "cifar10-subset")
    for kind in ("nelbo", "nll"):
        part = record[kind]["corrected"]
        assert sum(part["parts"].values()) == pytest.approx(part["total"], abs=1e-5)
    with open(run.folder / "robustness.csv") as stream:
        (row,) = csv.DictReader(stream)
    assert row["status"] == "ok" and row["n"] == "64"
    assert bool(row["fd"]) == bool(row["kid"]) == (dataset == "cifar10-16")
    assert (run.folder / "samples.png").stat().st_size > 0
