"""Synthetic runs that follow the result files' contract exactly, for tests of reports without any training."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.claims import CLAIMS
from bench.files import HASH_KEY, write_hashed_json, write_json
from bench.report.claims_table import judge
from bench.report.load import load_runs
from bench.report.tables import Grid, build

EFFECTS = {
    # variant: NLL, gap, slope of log FD against log steps, training speed
    "ddpmpp-vp": (2.60, 0.060, -0.80, 1.0),
    "indm-vp-nll": (2.55, 0.010, -0.30, 0.7),
    "indm-vp-fid": (2.61, 0.055, -0.50, 0.9),
    "ncsnpp-ve": (2.70, 0.080, -0.60, 1.0),
    "indm-ve": (2.70, 0.080, -0.60, 1.0),
}
VARIANTS = tuple(EFFECTS)
# variants that some suites have and some claims ask for
OTHERS = {
    "indm-vp-glow": (2.58, 0.030, -0.40, 1.2),
    "indm-vp-pretrained": (2.53, 0.010, -0.30, 0.5),
    "sdeflow-uniform": (2.66, 0.070, -0.80, 1.1),
    "sdeflow-debiased": (2.62, 0.060, -0.80, 1.0),
    "ddpm": (2.64, 0.090, -0.90, 1.0),
    "ncsn": (2.80, 0.090, -0.90, 1.0),
    "diffflow": (2.70, 0.120, -0.20, 2.0),
}
# what a model lacks, in the words that its evaluation left, and its own sampler
NO_BOUND = "not defined: annealed Langevin dynamics has no density"
NO_CHAIN = "not defined: continuous in time, its bound is the NELBO"
NO_LAW = "not defined: the model's decoder is a density, not a law of grey levels"
NO_SAMPLER = "not defined: euler_maruyama integrates linear diffusions, and this one is not"
CHAINS = {"ddpm": 50, "ncsn": 10, "diffflow": 15}
FAMILIES = {"ddpm": "linear, discrete", "ncsn": "linear, discrete", "diffflow": "fully nonlinear, discrete"}
SAMPLERS = {"ncsn": "annealed_langevin"}


def expected(suite: str, datasets: list[str], variants=VARIANTS, seeds=(0, 1, 2)) -> list[dict[str, Any]]:
    """The grid of runs a suite should have."""
    return [
        {"suite": suite, "dataset": dataset, "variant": variant, "seed": seed}
        for variant in variants
        for seed in seeds
        for dataset in datasets
    ]


def write_suite(root: Path, suite: str, datasets: dict[str, bool], variants=VARIANTS, seeds=(0, 1, 2)) -> None:
    """All runs of a suite under ``root``; ``datasets`` maps a name to whether its data are 2-D points."""
    for dataset, flat in datasets.items():
        for variant in variants:
            for seed in seeds:
                folder = root / suite / variant / str(seed)
                write_run(folder / dataset if len(datasets) > 1 else folder, suite, dataset, variant, seed, flat)


def write_run(folder: Path, suite: str, dataset: str, variant: str, seed: int, flat: bool) -> None:
    """One finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    # what a seed shares over variants (data order) is larger than what it does not
    shared = np.random.default_rng([seed, 1]).normal() * 0.02
    own = np.random.default_rng([seed, 2, *variant.encode()])
    nll, gap, slope, speed = (EFFECTS | OTHERS)[variant]
    nll, gap = nll + shared + own.normal() * 0.0003, gap + own.normal() * 0.0001
    _likelihood(folder, suite, dataset, variant, seed, flat, nll, gap)
    _curve(folder, variant, flat, nll, gap, speed, own)
    _robustness(folder, variant, flat, slope, own)
    seconds = 60.0 + own.normal()
    write(
        folder,
        "provenance.json",
        {
            "schema": 1,
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "dirty": False,
            "config_hash": "a" * 12,
            "packages": {"torch": "2.15.0", "numpy": "2.4.0"},
            "device": "cpu",
            "cpu": "Synthetic CPU",
            "cores": 2,
            "threads": 1,
            "python": "3.11",
            "started": f"2026-11-2{seed}T10:00:00+00:00",
            "train_seconds": seconds,
            "evaluate_seconds": 20.0,
            "peak_memory_mb": 900.0 + seed,
            "images_seen": 64000,
            "steps": 1000,
            "parameters": {
                "score": 61000,
                "flow": 9000 if "indm" in variant else 0,
                **({"drift": 9000} if variant == "diffflow" else {}),
                "total": 70000 if "indm" in variant or variant == "diffflow" else 61000,
            },
            "peak_bytes": 2_500_000,
            "flops_per_step": 123456789,
        },
    )
    (folder / "config.yaml").write_text(
        f"suite: {suite}\nvariant: {variant}\ndataset: {dataset}\nseed: {seed}\n"
        "train: {curve_images: 128, curve_samples: 256, curve_steps: 32}\n"
        f"evaluate:\n  features: {'null' if flat else 'digits-cnn'}\n  samplers:\n"
        "  - {name: euler_maruyama, steps: [8, 16, 32, 64]}\n  - {name: ode, steps: [0], rtol: 1.0e-4}\n"
    )
    for name, shape in (("samples.png", (160, 160)), ("trajectory.png", (80, 240))):
        Image.fromarray(own.integers(0, 255, shape, dtype=np.uint8)).save(folder / name)


def write(folder: Path, name: str, record: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(record))


def edit(folder: Path, name: str, change) -> None:
    """Apply ``change`` to the record of a JSON file."""
    record = json.loads((folder / name).read_text())
    hashed = record.pop(HASH_KEY, None)
    change(record)
    (write_hashed_json if hashed else write_json)(folder / name, record)


def _likelihood(folder, suite, dataset, variant, seed, flat, nll, gap) -> None:
    dims, levels = (2, None) if flat else (64, 17)
    offset = {} if flat else {"dequantisation": math.log2(17 / 2)}

    def bound(total: float, middle: str, corrected: bool) -> dict[str, Any]:
        parts = {"prior": 0.1, "flow": -0.2 if "indm" in variant else 0.0}
        parts |= {"reconstruction": -3.0} if corrected else {}
        parts |= offset
        parts[middle] = total - sum(parts.values())
        return {"total": total, "se_images": 0.01, "se_repeats": 0.002, "parts": parts}

    data = {
        "name": dataset,
        "train": 0 if flat else 1500,
        "test": 297,
        "shape": [2] if flat else [1, 8, 8],
        "levels": levels,
        "hash": hashlib.sha256(dataset.encode()).hexdigest(),
    }
    nelbo = {
        "corrected": bound(nll + gap, "diffusion", True),
        "uncorrected": bound(nll + gap - 0.3, "diffusion", False),
    }
    ode = {"corrected": bound(nll, "ode", True), "uncorrected": bound(nll - 0.2, "ode", False)}
    chained = {"steps": CHAINS.get(variant), "repeats": 3}
    chain = bound(nll + gap + (0.0 if variant == "diffflow" else 0.2), "diffusion", True) | chained
    discrete = {"total": 1.9, "se_images": 0.01, "parts": {"prior": 0.1, "diffusion": 1.8}} | chained
    reasons = {} if variant in CHAINS else {"chain": NO_CHAIN}
    reasons |= {"nelbo": NO_BOUND, "gap": NO_BOUND} if variant == "ncsn" else {}
    reasons |= {"discrete": "not defined for 2-D data" if flat else NO_LAW} if flat or variant != "ddpm" else {}
    measured = {
        "nelbo": nelbo | {"repeats": 3, "times": 32},
        "nll": ode
        | {
            "solver": "dopri5",
            "rtol": 1e-5,
            "atol": 1e-5,
            "probes": "exact",
            "nfe_mean": 93.0 + seed,
            "nfe_max": 120,
            "tolerance_check": {"n": 32, "change": 1e-5},
        },
        "gap": {"corrected": {"total": gap, "se": 0.001}, "uncorrected": {"total": gap - 0.1, "se": 0.001}},
        "chain": chain,
        "discrete": discrete,
    }
    kind = f"chain of {CHAINS[variant]} steps" if variant == "diffflow" else "continuous"
    write(
        folder,
        "likelihood.json",
        {
            "schema": 1,
            "suite": suite,
            "dataset": dataset,
            "variant": variant,
            "seed": seed,
            "status": "ok",
            "units": "nats" if flat else "bits/dim",
            "dims": dims,
            "levels": levels,
            "data": data,
            "n": 297,
            "family": FAMILIES.get(variant, "linear, continuous"),
            "reasons": reasons,
            **{name: None if name in reasons else value for name, value in measured.items()},
            "truth": {"nll": 2.079, "se_images": 0.01} if flat else None,
            "protocol": {
                "eps": None if variant in CHAINS else 1e-5,
                "dequantiser": None if flat else "uniform",
                "weights": "ema",
                "bound": kind,
                "curve_sampler": SAMPLERS.get(variant, "ddim"),
            },
        },
    )


def _curve(folder, variant, flat, nll, gap, speed, own) -> None:
    unit, quality = ("nats", "energy") if flat else ("bpd", "fd")
    lines = [f"step,images,seconds,train_loss,nelbo_{unit},nll_{unit},{quality}"]
    for step in (20, 50, 100, 200, 500, 1000):
        excess = speed * 3.0 * (20 / step)
        bound = nll + gap + excess + own.normal() * 0.0002
        nelbo = "" if variant == "ncsn" else bound
        lines.append(f"{step},{step * 64},{step * 0.06},{bound + 1},{nelbo},{bound - gap},{5 + 100 * excess}")
    (folder / "learning_curve.csv").write_text("\n".join(lines) + "\n")


def _robustness(folder, variant, flat, slope, own) -> None:
    lines = ["sampler,steps,nfe,n,fd,kid,precision,recall,sliced_wasserstein,energy,seconds,status"]
    points = [("euler_maruyama", steps) for steps in (8, 16, 32, 64)] + [("ode", 0)]
    if variant in SAMPLERS:
        lines += [f'{sampler},{steps},,256,,,,,,,,"{NO_SAMPLER}"' for sampler, steps in points if steps]
        points = [(SAMPLERS[variant], 64), ("ode", 0)]
    for sampler, steps in points:
        quality = (
            10 * (max(steps, 40) / 64 if sampler == "ode" else steps / 64) ** slope * math.exp(own.normal() * 0.002)
        )
        numbers = f",,,,{quality / 50},{quality / 100}" if flat else f"{quality},{quality / 1000},0.6,0.5,,"
        lines.append(f"{sampler},{steps},{steps or 41.5},256,{numbers},{0.1 * (steps or 40)},ok")
    (folder / "robustness.csv").write_text("\n".join(lines) + "\n")


def tables(root, suite="digits", grid=()):
    return build(Grid(tuple(load_runs(suite, root, grid))))


def judged(root, suite="digits", grid=(), claims=CLAIMS):
    """The claims applied to the runs of a suite."""
    runs = Grid(tuple(load_runs(suite, root, grid)))
    units = {run.dataset: run.likelihood["units"] for run in runs.runs if run.likelihood}
    quality = {name: "fd" if unit == "bits/dim" else "sliced_wasserstein" for name, unit in units.items()}
    return judge(suite, runs, quality, units, claims)


def cell(table, metric, **keys):
    (row,) = [row for row in table.rows if all(row.keys[name] == value for name, value in keys.items())]
    return row.cells[metric]


def rows_of(path):
    return list(csv.DictReader(path.open()))


class Page(HTMLParser):
    """Collects tags, and checks that they nest."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
