"""What `bench.evaluate` measures, on a model that was trained elsewhere, under a suite's evaluation settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from bench import seals, sharding
from bench.checkpoint import exclusive_results
from bench.config import FEATURES, RunConfig, dump_config, load_suite
from bench.data import load
from bench.errors import InputError
from bench.evaluate import is_evaluated, protocol, write_evaluation
from bench.files import read_json, write_text_atomic
from bench.importing.pretrained import Pretrained, load_pretrained
from bench.options import Invalid, dotted
from bench.provenance import record

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class PretrainedRun(RunConfig):
    """A run without training: ``pretrained`` says which model it is, ``model`` how the tables know it.

    ``out``: its folder, instead of `runs/<suite>/<name>/<seed>`.
    """

    train: None = None
    pretrained: dict
    out: Annotated[Path | None, Field(exclude=True)] = None

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return super().folder if self.out is None else self.out


def evaluate_pretrained(
    path: Path,
    suite_name: str,
    variant: str | None = None,
    seed: int | None = None,
    dataset: str | None = None,
    name: str | None = None,
    out: Path | None = None,
    settings: Sequence[str] = (),
) -> PretrainedRun:
    """Measure the model of the folder ``path``: likelihood.json last, beside it what an evaluated run has.

    Settings are those of ``variant``, by default the suite's first, in that suite and on that data set. ``name`` stands
    in the tables, by default the folder's. Results that are there already, of these weights and settings, are kept.
    InputError, in one line, for names, shapes and files that do not go together.
    """
    template = _template(suite_name, variant, seed, dataset, settings)
    suite = load_suite(suite_name)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.resolve().name).strip("-_") if name is None else name
    if not NAME.fullmatch(name):
        raise InputError(f"--name {name!r}: must begin with a letter or digit; accepted: letters, digits, - and _")
    if out is None and name in (*suite.variants, FEATURES):
        raise InputError(f"--name {name}: taken by a variant of {suite_name}; accepted: any other, or --out FOLDER")
    sharding.join()
    device = sharding.device()
    data = load(template.dataset)
    loaded = load_pretrained(path, device, template.dataset)
    if tuple(loaded.shape) != tuple(data.shape):
        raise InputError(
            f"--pretrained {path}: shape = {list(loaded.shape)}: accepted: {list(data.shape)}, that of {data.name}"
        )
    try:
        template.check_data(data.shape, None, len(data.test))
    except Invalid as error:
        raise InputError(f"{suite_name}: {dotted(error.path)}{error.problem}") from error
    run = _run(template, name, loaded, out)
    if run.folder.resolve() == path.resolve() or (run.folder / "weights").exists():
        raise InputError(f"{run.folder}: holds weights; accepted: another --name or --out, where results may go")
    with sharding.session():
        if not sharding.on_main(lambda: _is_measured(run, loaded)):
            with exclusive_results(run.folder, sharding.team().main):
                _measure(run, loaded, data, device)
    return run


def _template(
    suite_name: str, variant: str | None, seed: int | None, dataset: str | None, settings: Sequence[str]
) -> RunConfig:
    """A run of the suite, whose settings of the evaluation count."""
    suite = load_suite(suite_name, settings)
    if dataset is None and len(suite.datasets) > 1:
        raise InputError(f"--dataset: missing, {suite_name} has several; accepted: {', '.join(suite.datasets)}")
    if seed is not None and seed < 0:
        raise InputError(f"--seed {seed}: accepted: an integer of at least 0")
    chosen = suite.runs(suite.core[0] if variant is None else variant, None, dataset)[0]
    return chosen if seed is None else chosen.model_copy(update={"seed": seed})


def _run(template: RunConfig, name: str, loaded: Pretrained, out: Path | None) -> PretrainedRun:
    identity = {key: getattr(template, key) for key in ("suite", "dataset", "seed", "evaluate", "subfolder")}
    said = {key: value for key, value in loaded.description.items() if key != "model"} | {"source": loaded.source}
    model = loaded.description["model"]
    return PretrainedRun.model_construct(**identity, variant=name, model=model, train=None, pretrained=said, out=out)


def _is_measured(run: PretrainedRun, loaded: Pretrained) -> bool:
    if not is_evaluated(run) or not seals.intact(run.folder, seals.TRAIN):
        return False
    return read_json(run.folder / "provenance.json")["weights_sha256"] == loaded.weights_sha256


def _weights(loaded: Pretrained) -> str | None:
    """Which weights were measured, as the tables tell runs apart; None where the source does not say."""
    weights = loaded.description.get("weights")
    return f"{weights} score, raw flow" if "flow" in loaded.source else weights


def _measure(run: PretrainedRun, loaded: Pretrained, data: Any, device: torch.device) -> None:
    if device.type != "cuda":
        torch.set_num_threads(1)  # as in every evaluation: results do not depend on how many run at once
    sharding.on_main(lambda: _write_training(run, loaded, device))
    agreed = protocol(run, loaded.model) | {"weights": _weights(loaded)}
    write_evaluation(run, loaded.model, data, device, loaded.weights_sha256, agreed)


def _write_training(run: PretrainedRun, loaded: Pretrained, device: torch.device) -> None:
    """What a training would have left in the run's folder, as far as it is known."""
    folder, model = run.folder, loaded.model
    seals.begin(folder, seals.TRAIN, seals.EVALUATE)  # likelihood.json is written last: until then all is unfinished
    total, flow = (sum(p.numel() for p in part.parameters()) for part in (model, model.flow))
    write_text_atomic(folder / "config.yaml", dump_config(run))
    # a header alone: no curve was seen, and the report reads it as such
    write_text_atomic(folder / "learning_curve.csv", "images\n")
    known = {
        "config_hash": run.training_hash,
        "weights_sha256": loaded.weights_sha256,
        "parameters": {"score": total - flow, "flow": flow, "total": total},
        "source": loaded.source,
    }
    seals.publish(folder, seals.TRAIN, seals.TRAINED_FILES, record(device) | known)
