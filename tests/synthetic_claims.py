"""Files that the claims need beside those of every run: studies and per-image likelihoods, of known effects."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bench.claims import CLAIMS

STEPS = (4, 8, 16)
COLUMNS = {
    "discretisation": "sampler steps samples bins tv prior estimation discretisation bound floor se status",
    "latents": "time quantity value se n status",
    "identities": "claim quantity value expected se n status",
}
SPECIAL = ("likelihood_loss", "nelbo", "nll", "samples_ddim")


def write_studies(root: Path, suite: str) -> list[Path]:
    """discretisation.csv, latents.csv and identities.csv in every run folder of a suite; returns the folders."""
    folders = sorted(path.parent for path in (root / suite).rglob("likelihood.json"))
    for folder in folders:
        record = json.loads((folder / "likelihood.json").read_text())
        rng = np.random.default_rng([record["seed"], 5, *record["variant"].encode(), *record["dataset"].encode()])
        for name, rows in studies(record, rng).items():
            write_study(folder, name, rows)
        text = (folder / "config.yaml").read_text()
        asked = "".join(f"    {name}: {{groups: 20}}\n" for name in COLUMNS)
        (folder / "config.yaml").write_text(f"{text}  studies:\n{asked}")
    return folders


def write_study(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """One file; what a row lacks is blank."""
    with open(folder / f"{name}.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS[name].split(), restval="")
        writer.writeheader()
        writer.writerows(rows)


def read_study(folder: Path, name: str) -> list[dict[str, str]]:
    """Rows as text, to be changed and written again."""
    with open(folder / f"{name}.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def studies(record: dict[str, Any], rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Rows of each study of one run."""
    indm = record["variant"].startswith("indm")

    def noise(size: float) -> float:
        return size * float(rng.normal())

    terms = []
    for sampler in ("euler_maruyama", "ddim"):
        for steps in STEPS:
            parts = {
                "prior": 0.01,
                "estimation": 0.2,
                "discretisation": (0.5 if indm else 1.0) * 2 / steps + noise(0.01),
            }
            bound = sum(parts.values())
            row = {"sampler": sampler, "steps": steps, "samples": 1000, "bins": 400, "tv": 0.9 * bound, "bound": bound}
            terms.append(row | parts | {"floor": 0.05, "se": 0.01, "status": "ok"})
    change = -0.3 + noise(0.05) if indm else noise(1e-17)
    latents = [
        {"time": time, "quantity": quantity, "value": value, "se": 0.02, "n": 200, "status": "ok"}
        for time, quantity, value in (
            (0, "variance", 0.9),
            (0, "kl_gaussian", 0.8 + change),
            (0, "kl_gaussian_change", change),
            (1, "kl_gaussian", 0.01),
        )
    ]
    rows = [("special-case", name, None if indm else 0.0, 0.0, None, None if indm else 16) for name in SPECIAL]
    rows += [
        ("dsm-is-elbo", "gradient_difference_squared", noise(0.004), 0.0, 0.005, 64),
        ("dsm-is-elbo", "bound_difference", noise(0.008), 0.0, 0.01, 64),
        ("equivalent-sdes", "energy_sde_0.5", 0.002 + noise(0.0005), 0.002, 0.001, 1000),
        ("equivalent-sdes", "energy_sde_1", 0.092 + noise(0.0005), 0.002, 0.001, 1000),
        ("equivalent-sdes", "cnf_likelihood", noise(0.05), 0.0, 0.1, 50),
        ("equivalent-sdes", "elbo_sde_0", 0.4, 0.0, 0.01, 50),
        ("debiased-time", "log_variance_ratio_uniform_over_debiased", 2.0 + noise(0.2), None, 0.1, 64),
        ("debiased-time", "log_variance_ratio_uniform_over_importance", -0.1 + noise(0.9), None, 0.1, 64),
        ("debiased-time", "log_variance_ratio_uniform_over_debiased_paired", -0.5 + noise(0.01), None, 0.1, 64),
    ]
    identities = []
    for claim, quantity, value, expected, se, n in rows:
        row = {"claim": claim, "quantity": quantity, "status": "ok"}
        if value is None:
            identities.append(row | {"status": "not defined: the flow is not the identity"})
        else:
            identities.append(row | {"value": value, "expected": expected, "se": se, "n": n})
    return {"discretisation": terms, "latents": latents, "identities": identities}


def write_per_image(folder: Path) -> None:
    """per_image.npz in nats, skewed over images, with the means that likelihood.json states."""
    record = json.loads((folder / "likelihood.json").read_text())
    images = np.random.default_rng(11).gamma(1.0, 3.0, record["n"])  # what models share: hard and easy images
    rng = np.random.default_rng([12, *record["variant"].encode()])
    scale, shift = 1.0, 0.0
    if record["units"] == "bits/dim":
        scale = record["dims"] * np.log(2)
        shift = np.log2(record["levels"] / 2)
    arrays: dict[str, np.ndarray] = {"index": np.arange(record["n"])}
    for name in ("nelbo", "nll"):
        values = images + rng.gamma(0.5, 2.0, record["n"])
        arrays[name] = values - values.mean() + scale * (record[name]["corrected"]["total"] - shift)
    np.savez(folder / "per_image.npz", **arrays)


def only(
    rows: Iterable[Any], claim: str, variant: str | None = None, sampler: str | None = None, statistic: str = ""
) -> Any:
    """The one row of a claim that fits."""
    (row,) = [
        row
        for row in rows
        if row.claim == claim
        and variant in (None, row.variant)
        and sampler in (None, row.sampler)
        and statistic in row.statistic
    ]
    return row


def claim(*names: str) -> list[Any]:
    """The claims of these names."""
    return [one for one in CLAIMS if one.id in names]


def change_rows(root: Path, name: str, variant: str, seed: int, change: dict[str, Any], **keys: str) -> None:
    """Update the rows of a study of one run that have these keys."""
    folder = root / "toy2d" / variant / str(seed)
    rows = read_study(folder, name)
    for row in rows:
        if all(row[key] == value for key, value in keys.items()):
            row.update(change)
    write_study(folder, name, rows)
