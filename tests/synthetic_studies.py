"""Synthetic study files beside synthetic runs, with known effects, and reports/estimators with its validation."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from synthetic_runs import expected

from bench.report.load import load_runs
from bench.report.study_files import FORMS
from bench.report.tables import Grid

STUDIES = tuple(FORMS)
PLANE = ("checkerboard", "swissroll")
VARIANTS = ("ddpmpp-vp", "indm-vp-nll")
SEEDS = (0, 1, 2)
PATHS, IMAGES, GRIDS = 64, 20, (32, 64)
STEPS = (4, 8, 16)
# the parts of the gap in the limit of a fine grid, and the error of a chain of N steps times N
VARIATIONAL = {"ddpmpp-vp": 0.10, "indm-vp-nll": 0.02}
SDE_TO_ODE = {"ddpmpp-vp": -0.25, "indm-vp-nll": 0.03}
SLOPES = {"nelbo": 4.0, "sde": 1.5}
TERMS = {"prior": 0.01, "estimation": 0.20}
# a convention's difference: (right, difference, its closed form)
RULERS = {
    ("two-draw-residual", "NELBO", "nats"): (2.5, 0.2, 0.2),
    ("inverse-tolerance", "sample error, mean", "data units"): (1e-6, 3e-3, None),
}


def write_studies(root: Path, suite: str, names: Iterable[str] = STUDIES, pattern: str = "*/*/*") -> list[Path]:
    """Study files in every run folder of a suite of several data sets; returns the folders."""
    folders = sorted(path.parent for path in (root / suite).glob(f"{pattern}/likelihood.json"))
    for folder in folders:
        record = json.loads((folder / "likelihood.json").read_text())
        rng = np.random.default_rng([record["seed"], *record["variant"].encode(), *record["dataset"].encode()])
        for name in names:
            write_study(folder, name, WRITERS[name](record, rng, folder))
        asked = "".join(f"    {name}: {{}}\n" for name in names)
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(f"{text}  studies:\n{asked}")
    return folders


def write_study(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """One study's file; None is a blank."""
    form = FORMS[name]
    with open(folder / f"{name}.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, [*form.keys, *form.columns, "status"], restval="")
        writer.writeheader()
        writer.writerows(rows)


def read(folder: Path, name: str) -> list[dict[str, str]]:
    """Rows of a study's file as text, to be changed."""
    with open(folder / f"{name}.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def grid_of(root):
    return Grid(tuple(load_runs("toy2d", root, expected("toy2d", list(PLANE), VARIANTS, SEEDS))))


def folder_of(root, variant="ddpmpp-vp", seed=0, dataset="checkerboard"):
    return root / "toy2d" / variant / str(seed) / dataset


def change(folder, name, edit_rows):
    """Rewrite a study's file with changed rows."""
    rows = read(folder, name)
    edit_rows(rows)
    write_study(folder, name, rows)


def split(record: dict[str, Any], rng: np.random.Generator, folder: Path) -> list[dict[str, Any]]:
    """Chains whose error is first order in the step, with one noise on both grids, as from shared paths."""
    variant, rows = record["variant"], []
    for image in range(IMAGES):
        sde = record["nelbo"]["corrected"]["total"] + float(rng.normal())
        bound = sde + VARIATIONAL.get(variant, 0.05) + 0.01 * float(rng.normal())
        ode = sde - SDE_TO_ODE.get(variant, 0.0) + 0.01 * float(rng.normal())
        for steps in GRIDS:
            row = {"image": image, "steps": steps, "paths": PATHS, "nelbo": bound + SLOPES["nelbo"] / steps}
            row |= {"sde": sde + SLOPES["sde"] / steps, "sde_se": 0.02, "ode": ode, "ess": 10.0 + image}
            rows.append(row | {"status": "ok"})
    return sorted(rows, key=lambda row: row["steps"])


def terms(record: dict[str, Any], rng: np.random.Generator, folder: Path) -> list[dict[str, Any]]:
    share = 0.5 if record["variant"].startswith("indm") else 1.0
    rows = []
    for sampler in ("euler_maruyama", "ddim"):
        for steps in STEPS:
            parts = TERMS | {"discretisation": share * 2.0 / steps + 0.001 * float(rng.normal())}
            bound = sum(parts.values())
            row = {"sampler": sampler, "steps": steps, "samples": 1000, "bins": 400, "tv": 0.9 * bound, **parts}
            rows.append(row | {"bound": bound, "floor": 0.05, "se": 0.01, "status": "ok"})
    return rows


def rulers(record: dict[str, Any], rng: np.random.Generator, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for (convention, quantity, units), (right, difference, closed) in RULERS.items():
        difference *= 1 + 0.05 * float(rng.normal())
        row = {"convention": convention, "quantity": quantity, "units": units, "right": right, "n": 100}
        row |= {"official": right + difference, "difference": difference, "se": 0.1 * abs(difference), "status": "ok"}
        rows.append(row | {"closed_form": closed, "closed_form_se": None if closed is None else 0.01})
    undefined = {"convention": "uint8-truncation", "quantity": "mean level of data"}
    return rows + [undefined | {"status": "not defined: the data <are> not grey levels"}]


def latents(record: dict[str, Any], rng: np.random.Generator, folder: Path) -> list[dict[str, Any]]:
    numbers = (("0", "kl_gaussian", 0.5), ("0", "variance", 0.9), ("1", "variance", 1.0))
    return [
        {"time": time, "quantity": name, "value": value + 0.01 * rng.normal(), "se": 0.02, "n": 200, "status": "ok"}
        for time, name, value in numbers
    ]


def identities(record: dict[str, Any], rng: np.random.Generator, folder: Path) -> list[dict[str, Any]]:
    numbers = (
        ("special-case", "samples", 0.0, 0.0, None),
        ("dsm-is-elbo", "bound_difference", 0.01 * float(rng.normal()), 0.0, 0.01),
        ("debiased-time", "log_variance_ratio", 1.5, None, 0.1),
    )
    return [
        dict(zip(("claim", "quantity", "value", "expected", "se", "n", "status"), (*row, 64, "ok"))) for row in numbers
    ]


WRITERS = dict(zip(STUDIES, (split, terms, rulers, latents, identities), strict=True))


def write_estimators(root: Path) -> Path:
    """reports/estimators with one table, a summary, a figure and a validation of four estimates, one outside."""
    from PIL import Image

    folder = root / "estimators"
    (folder / "figures").mkdir(parents=True)
    (folder / "time_sampling.csv").write_text("proposal,variance,debiased\nuniform,1234.5,false\ndebiased,0.25,true\n")
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "title": "Estimators & choices",
                "description": "Measured.",
                "chosen": {"trace": "exact", "series": {"sentence": "chosen: 5 terms <b>", "same": True}},
            }
        )
    )
    Image.new("RGB", (40, 30)).save(folder / "figures" / "time_sampling.png")
    (folder / "validate.csv").write_text(
        "problem,sde,setting,estimator,truth,estimate,se,error,bound,unit,ok\n"
        "gaussian,vp,D = 2,NLL,1.0,1.001,0.0,0.001,0.01,nats,True\n"
        "gaussian,ve,D = 2,NLL,1.0,0.5,0.0,-0.5,0.01,nats,False\n"
        "mixture,vp,<5>,NELBO,1.0,1.002,0.001,0.002,0.01,nats,True\n"
        "gaussian,-,D = 2,order,2.0,2.01,,0.01,0.1,,True\n"
    )
    return folder
