"""The DVC pipelines, written from the suites: `dvc.yaml` for those a laptop runs, a file of its own for each other.

Variants of one model form a matrix stage: it depends on the code in `models/` that they execute, so that another
model's file does not make their results stale. DVC wants every output by name, so seeds and data sets stand in these
files. The report depends on the whole folder of a suite's runs, which makes it wait for every variant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import seals
from bench.closure import model_files
from bench.commands import feature_datasets
from bench.config import CURVE_SETTINGS, Suite, features_file, load_suite, suite_files
from bench.estimators.measured_runs import MEASURED_RUNS
from bench.files import file_hash, json_text, write_text_atomic
from bench.yaml_files import dump_yaml

# reproduced by a plain `dvc repro`, in this order: the first tables come from the first
LAPTOP = ("toy2d", "digits")
USUAL_MODEL = "indm"
FOLDER = Path("experiments/pipelines")
HEADER = "# Written by `indm-bench pipeline` from the suites. A new variant is an entry in its suite's file.\n"
# what the pipeline files were last written from; not part of the repository
STAMP = Path(".checkpoints/pipeline")

REPORTS = Path("reports")
ESTIMATORS = "reports/estimators"
# hashes of the reports that other pipelines have written: of what may not be there, DVC can follow a record only, and a
# stage that depended on the reports themselves would make `dvc repro` run their suites
OTHERS = REPORTS / "others.json"

# code whose change makes a stage's results stale; the rest (messages, reports, command line) is left out on purpose
DATA_CODE = ["bench/data.py", "bench/toy.py"]
IMAGE_CODE = ["bench/cifar.py", "bench/image_files.py", "bench/untrusted.py"]
TRAIN_CODE = [
    "bench/acceleration.py",
    "bench/averages.py",
    "bench/likelihood.py",
    "bench/optimizers.py",
    "bench/settings.py",
    "bench/train.py",
    "bench/training_data.py",
]
EVALUATE_CODE = [
    "bench/batches.py",
    "bench/distances.py",
    "bench/evaluate.py",
    "bench/fidelity.py",
    "bench/likelihood.py",
    "bench/sampling.py",
    "bench/conventions",
    "bench/studies",
]
REPORT_CODE = ["bench/claims", "bench/conventions/__init__.py", "bench/report", "bench/statistics.py"]

TRAINED = [*seals.TRAINED_FILES, seals.MARKERS[seals.TRAIN], seals.TRAIN]
EVALUATED = [*seals.EVALUATED_FILES, seals.MARKERS[seals.EVALUATE], seals.EVALUATE]
TABLES = [
    "bounds",
    "claims",
    "costs",
    "discrete_bounds",
    "learning_curve",
    "likelihood_parts",
    "nll_nelbo_gap",
    "step_robustness",
]
PLOTS = {
    "learning curve": ("learning_curve.csv", "images", "nelbo", "lines", "training images", "NELBO"),
    "gap": ("gap.csv", "gap", "variant", "gaps", "NELBO - NLL", "variant"),
    "step robustness": (
        "step_robustness.csv",
        "steps",
        "distance",
        "samplers",
        "sampling steps",
        "distance to the data",
    ),
}


def write_pipelines() -> None:
    """Write every pipeline file, and remove those of suites that are gone."""
    wanted = pipelines()
    for path, text in wanted.items():
        write_text_atomic(path, text)
    for path in FOLDER.glob("*/dvc.yaml"):
        if path not in wanted:
            path.unlink()


def refresh() -> bool:
    """Write the pipeline files again if the suites or the code have changed since that was last done; whether they had.

    Cheap where nothing has: imports no model.
    """
    sources = [*Path("experiments").glob("*.yaml"), *Path("models").rglob("*.py"), *Path("bench").glob("*.py")]
    record_reports()
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(f"{path}\0".encode() + path.read_bytes())
    if STAMP.is_file() and STAMP.read_text() == digest.hexdigest():
        return False
    write_pipelines()
    write_text_atomic(STAMP, digest.hexdigest())
    return True


def outdated() -> list[Path]:
    """Pipeline files that are not what the suites ask for; the record of reports changes with them, and is none."""
    wanted = pipelines()
    del wanted[OTHERS]
    differing = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    return differing + [path for path in FOLDER.glob("*/dvc.yaml") if path not in wanted]


def pipelines() -> dict[Path, str]:
    """Text of each pipeline file, and of OTHERS."""
    known = suite_files()
    texts = {Path("dvc.yaml"): pipeline([name for name in LAPTOP if name in known], Path("."))}
    for name in known:
        if name not in LAPTOP:
            texts[FOLDER / name / "dvc.yaml"] = pipeline([name], FOLDER / name)
    return texts | {OTHERS: others()}


def others() -> str:
    """Text of OTHERS: the hash of each report that is there and that no stage of `dvc.yaml` makes."""
    return json_text({path.parent.name: file_hash(path) for path in other_reports()})


def record_reports() -> None:
    """Bring OTHERS up to date, so that the page is made anew where another pipeline has written a report."""
    if OTHERS.is_file() and OTHERS.read_text() != others():
        write_text_atomic(OTHERS, others())


def other_reports() -> list[Path]:
    """Summaries of the reports that are there and that no stage of `dvc.yaml` makes."""
    made = (*LAPTOP, Path(ESTIMATORS).name)
    return sorted(path for path in REPORTS.glob("*/summary.json") if path.parent.name not in made)


def pipeline_file(suite: str) -> Path:
    """The pipeline file that holds a suite's stages."""
    return Path("dvc.yaml") if suite in LAPTOP else FOLDER / suite / "dvc.yaml"


def pipeline(names: list[str], folder: Path) -> str:
    """Text of the pipeline file in ``folder`` (relative to the repository's root) that runs the named suites."""
    up = "/".join([".."] * len(folder.parts))
    prefix = f"{up}/" if up else ""
    content: dict[str, Any] = {"vars": [f"{prefix}experiments/{name}.yaml" for name in names], "stages": {}}
    for name in names:
        content["stages"] |= suite_stages(load_suite(name))
    if not up:
        content["stages"] |= estimator_stages() | {"index": index_stage(names)}
    for stage in content["stages"].values():
        if up:
            stage["wdir"] = up
    content["metrics"] = [f"{prefix}reports/{name}/metrics.json" for name in names]
    content["plots"] = [plot(name, title, prefix) for name in names for title in PLOTS]
    return HEADER + dump_yaml(content)


def index_stage(names: list[str]) -> dict[str, Any]:
    """The page over all reports: those of the named suites, and whatever others and measurements of speed are there."""
    read = [f"{ESTIMATORS}/summary.json", f"{ESTIMATORS}/validate.csv", "reports/performance", "reports/reference.csv"]
    read += [OTHERS.as_posix(), *(f"reports/{name}/summary.json" for name in names)]
    return {
        "cmd": "indm-bench report --index",
        "deps": sorted(["bench/report", *read]),
        "outs": [uncached("reports/index.html")],
    }


def estimator_stages() -> dict[str, Any]:
    """The estimators against ground truth, and against their cost."""
    weights = [f"runs/{suite}/{variant}/0/weights" for suite, variant in MEASURED_RUNS]
    code = model_files(run for suite, variant in MEASURED_RUNS for run in load_suite(suite).runs(variant, 0))
    written = [f"{table}.{kind}" for table in ("series", "time_sampling", "trace") for kind in ("csv", "md")]
    return {
        "validate": {
            "cmd": f"indm-bench validate --out {ESTIMATORS}",
            "deps": [*(f"bench/{name}.py" for name in ("data", "likelihood", "toy", "train")), "bench/truth", "models"],
            "outs": [uncached(f"{ESTIMATORS}/{file}") for file in ("convergence.csv", "validate.csv", "validate.md")],
        },
        "estimators": {
            "cmd": f"indm-bench estimators --out {ESTIMATORS}",
            "deps": sorted(["bench/estimators", *code, *weights]),
            "outs": [uncached(f"{ESTIMATORS}/{name}") for name in (*written, "figures", "summary.json")],
        },
    }


def suite_stages(suite: Suite) -> dict[str, Any]:
    """The stages of one suite."""
    name, file = suite.name, f"experiments/{suite.name}.yaml"
    first = [run for variant in suite.variants for run in suite.runs(variant, suite.seeds_of(variant)[0])]
    classifiers = [features_file(name, dataset).as_posix() for dataset in feature_datasets(first)]
    toys = all(dataset in ("checkerboard", "swissroll", "gaussians", "digits") for dataset in suite.datasets)
    data = sorted(DATA_CODE if toys else DATA_CODE + IMAGE_CODE)
    measured_too = sorted({study for run in first for study in run.evaluate.studies})
    folder = f"reports/{name}"
    tables = [f"{folder}/{table}.{kind}" for table in (*TABLES, *measured_too) for kind in ("csv", "md")]
    features = {
        f"features-{name}": {
            "cmd": f"indm-bench features {name}",
            "deps": sorted(["bench/features.py", *data]),
            "params": [{file: [f"{name}.datasets"]}],
            "outs": classifiers,
        }
    }
    return (features if classifiers else {}) | {
        f"references-{name}": {
            "cmd": f"indm-bench references {name}",
            "deps": sorted(["bench/baselines.py", *data]),
            "params": [{file: [f"{name}.datasets"]}],
            "outs": [uncached(f"{folder}/references.json")],
        },
        **variant_stages(suite, suite.core, "", data, classifiers),
        **variant_stages(suite, suite.more, "more.", data, classifiers),
        f"report-{name}": {
            "cmd": f"indm-bench report {name}",
            "deps": sorted([*REPORT_CODE, "reports/reference.csv", f"{folder}/references.json", f"runs/{name}"]),
            "params": [{file: [f"{name}.description", f"{name}.title"]}],
            "outs": [
                uncached(out) for out in (*tables, f"{folder}/figures", f"{folder}/plots", f"{folder}/summary.json")
            ]
            + [uncached(f"{folder}/metrics.json")],
        },
    }


def variant_stages(
    suite: Suite, variants: Sequence[str], section: str, data: Sequence[str], classifiers: Sequence[str]
) -> dict[str, Any]:
    """Training and evaluation of one section of the suite's file, "" or "more.", model by model.

    Named train-<suite>, then -more and the model's name where they are not the usual ones.
    """
    groups: dict[str, list[str]] = {}
    for variant in variants:
        first = suite.runs(variant, suite.seeds_of(variant)[0], suite.datasets[0])[0]
        groups.setdefault(first.model["name"], []).append(variant)
    stages: dict[str, Any] = {}
    for model, members in groups.items():
        suffix = ("-more" if section else "") + ("" if model == USUAL_MODEL else f"-{model}")
        stages |= matrix_stages(suite, members, section, suffix, data, classifiers)
    return stages


def matrix_stages(
    suite: Suite,
    variants: Sequence[str],
    section: str,
    suffix: str,
    data: Sequence[str],
    classifiers: Sequence[str],
) -> dict[str, Any]:
    """The two stages of variants that share their code."""
    name, file = suite.name, f"experiments/{suite.name}.yaml"
    first = [run for variant in variants for run in suite.runs(variant, suite.seeds_of(variant)[0])]
    code, seeds, variant = model_files(first), suite.seeds_of(variants[0]), "${item.variant}"
    runs = {
        f"runs/{name}/{variant}/{seed}" + (f"/{dataset}" if len(suite.datasets) > 1 else ""): dataset
        for seed in seeds
        for dataset in suite.datasets
    }
    own = [f"{name}.{section}seeds", f"{name}.{section}variants.{variant}"]
    own += [f"{name}.more.defaults"] if section else []
    settings = [f"{name}.datasets", f"{name}.defaults", *own]
    narrow = [f"{name}.datasets", f"{name}.defaults.model", f"{name}.defaults.train", *own]
    # the learning curve's sample quality needs the classifiers, and some settings of the evaluation
    curved = any(run.train.curve_samples for run in first)
    given = suite.defaults.get("evaluate") or {}
    measured = [f"{name}.defaults.evaluate.{key}" for key in CURVE_SETTINGS if key in given]
    # the studies each data set's runs are asked for
    studied = {
        dataset: sorted({study for run in first if run.dataset == dataset for study in run.evaluate.studies})
        for dataset in suite.datasets
    }
    return {
        f"train-{name}{suffix}": {
            "matrix": {"variant": list(variants)},
            "cmd": f"indm-bench train {name} {variant}",
            "deps": sorted({*data, *TRAIN_CODE, *code, *(classifiers if curved else [])}),
            "params": [{file: [*narrow, *measured]}],
            "outs": [
                out for run in runs for out in (f"{run}/weights", *(uncached(f"{run}/{file}") for file in TRAINED))
            ],
        },
        f"evaluate-{name}{suffix}": {
            "matrix": {"variant": list(variants)},
            "cmd": f"indm-bench evaluate {name} {variant}",
            "deps": sorted([*classifiers, *data, *EVALUATE_CODE, *code, *(f"{run}/weights" for run in runs)]),
            "params": [{file: settings}],
            "outs": [
                uncached(f"{run}/{file}")
                for run, dataset in runs.items()
                for file in (*EVALUATED, *(f"{study}.csv" for study in studied[dataset]))
            ],
        },
    }


def uncached(path: str) -> dict[str, Any]:
    """An output that DVC watches but does not copy to its cache: small, and for reports in git."""
    return {path: {"cache": False}}


def plot(suite: str, title: str, prefix: str) -> dict[str, Any]:
    """One entry of `dvc plots show`."""
    file, x, y, template, x_label, y_label = PLOTS[title]
    path = f"{prefix}reports/{suite}/plots/{file}"
    axes = {"x": {path: x}, "y": {path: y}, "x_label": x_label, "y_label": y_label}
    return {f"{suite}: {title}": {**axes, "title": f"{suite}: {title}", "template": template}}
