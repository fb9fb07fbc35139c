"""One run's configuration: its fields, where its files go, and how merged settings become one, checked and complete."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from bench.options import Invalid, Schema, accepted, resolve_component, show, signature_schema, validate
from bench.settings import (
    FEATURE_DIMS,
    IMAGE_QUALITY,
    LEARNING_RATES,
    POINT_QUALITY,
    EvaluateConfig,
    Name,
    SamplerConfig,
    TrainConfig,
)
from bench.untrusted import bounded_modules, check_parameters

# (shape, train, test) of the data sets whose size is a constant; None: endless, or known only once the files are read
FACTS: dict[str, tuple[tuple[int, ...], int | None, int | None]] = {
    "checkerboard": ((2,), None, 5000),
    "swissroll": ((2,), None, 5000),
    "gaussians": ((2,), None, 5000),
    "digits": ((1, 8, 8), 1500, 297),
    "cifar10": ((3, 32, 32), None, None),
    "cifar10-16": ((3, 16, 16), None, None),
    "cifar10-jpeg": ((3, 32, 32), None, None),
}
# settings of the evaluation that the learning curve uses, and so the training
CURVE_SETTINGS = ("batch_size", "features", "likelihood_batch_size", "probes")
# options that came after results had been made, with the values that those results had: left out of a configuration's
# files and hashes while they have them, so that a new option makes no result stale. Keys are dotted; * is any one key
# or place of a list. The value is the option's own default, wherever that stands.
QUIET_DEFAULTS: dict[str, Any] = {
    "evaluate.likelihood_batch_size": None,
    "evaluate.solver": "dopri5",
    "train.compile": False,
    "train.ema_rates": {},
    "train.memory_format": "contiguous",
    "train.raw_groups": [],
    "train.tf32": False,
}
# folder of the feature classifiers, beside those of the variants
FEATURES = "features"
# what a sampler is given by the model; its other parameters are options
SAMPLER_ARGUMENTS = ("noise", "sde", "z", "steps", "generator")


class RunConfig(Schema):
    """One run with every default filled in. ``model`` is ready for ``models.build`` once ``shape`` is added."""

    suite: Name
    variant: Name
    dataset: str
    seed: Annotated[int, Field(ge=0)]
    model: dict
    train: TrainConfig
    evaluate: EvaluateConfig
    # a suite with several data sets keeps each in a folder of its own; follows from the suite, not a setting
    subfolder: Annotated[bool, Field(exclude=True)] = False

    @property
    def folder(self) -> Path:
        """`runs/<suite>/<variant>/<seed>`, and `/<dataset>` below it where the suite has several data sets."""
        folder = runs_root() / self.suite / self.variant / str(self.seed)
        return folder / self.dataset if self.subfolder else folder

    @property
    def features_file(self) -> Path:
        """Weights of the classifier of the run's data set, made by the suite's `features` stage."""
        return features_file(self.suite, self.dataset)

    def resolved(self) -> dict[str, Any]:
        """Plain data of the configuration, complete but for QUIET_DEFAULTS, as written to `config.yaml`."""
        return without_quiet(self.model_dump(mode="json"))

    @cached_property
    def hash(self) -> str:
        """12 hex digits of the sha256 of the resolved configuration."""
        return _digest(self.resolved())

    @cached_property
    def training_hash(self) -> str:
        """As ``hash`` without the evaluation's settings: checkpoints stay good when only those change."""
        content = self.resolved()
        measured = content.pop("evaluate")
        return _digest(content | {"curve": {key: measured[key] for key in CURVE_SETTINGS if key in measured}})

    def check_data(self, shape: Sequence[int], train: int | None = None, test: int | None = None) -> None:
        """Refuse settings that do not fit the data; ``train`` and ``test`` are numbers of items, None for endless data.

        Called with what is known beforehand, and again by whoever has loaded the data. Raises Invalid.
        """
        if train is not None and self.train.batch_size > train:
            problem = f" = {self.train.batch_size}: must be at most {train}, the training images of {self.dataset}"
            raise Invalid(("train", "batch_size"), problem)
        if test is not None and (self.evaluate.images or 0) > test:
            problem = f" = {self.evaluate.images}: must be at most {test}, the test images of {self.dataset}"
            raise Invalid(("evaluate", "images"), problem)
        compared = test if "sliced_wasserstein" in self.evaluate.quality else None
        if compared is not None and self.evaluate.samples > compared:
            problem = f" = {self.evaluate.samples}: must be at most {compared}, the test points of {self.dataset}"
            raise Invalid(("evaluate", "samples"), problem)
        fitting = POINT_QUALITY if len(shape) == 1 else IMAGE_QUALITY
        for metric in self.evaluate.quality:
            if metric not in fitting:
                kind = "points" if len(shape) == 1 else "images"
                raise Invalid(
                    ("evaluate", "quality"), f" = {show(metric)}: not defined for {kind}; {accepted(fitting)}"
                )
        if len(shape) > 1 and (self.evaluate.quality or self.train.curve_samples):
            self._check_features(shape)

    def _check_features(self, shape: Sequence[int]) -> None:
        features, wanted = self.evaluate.features, "fd" in self.evaluate.quality
        if features is None:
            raise Invalid(("evaluate", "features"), f": missing; {accepted(FEATURE_DIMS)}")
        if features == "inception" and shape[0] != 3:
            raise Invalid(("evaluate", "features"), ' = "inception": needs RGB images; accepted: classifier')
        least = f"must be at least {FEATURE_DIMS[features]}, the dimension of the {features} features"
        if wanted and self.evaluate.samples < FEATURE_DIMS[features]:
            raise Invalid(("evaluate", "samples"), f" = {self.evaluate.samples}: {least}")
        if 0 < self.train.curve_samples < FEATURE_DIMS[features]:
            raise Invalid(("train", "curve_samples"), f" = {self.train.curve_samples}: {least}, or 0")


def without_quiet(content: dict[str, Any], quiet: Mapping[str, Any] = QUIET_DEFAULTS) -> dict[str, Any]:
    """A copy of plain ``content`` without the keys of ``quiet`` that have the value given there, type included."""
    content = json.loads(json.dumps(content))
    for key, default in quiet.items():
        *places, last = key.split(".")
        holders = [content]
        for place in places:
            holders = [value for holder in holders for value in _at(holder, place)]
        for holder in holders:
            if isinstance(holder, dict) and last in holder and _text(holder[last]) == _text(default):
                del holder[last]
    return content


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _at(holder: Any, place: str) -> list[Any]:
    """The values of a mapping or list at ``place``, all of them where it is *."""
    if place == "*":
        return list(holder.values()) if isinstance(holder, dict) else holder if isinstance(holder, list) else []
    return [holder[place]] if isinstance(holder, dict) and place in holder else []


def runs_root() -> Path:
    """Folder of the runs' results: INDM_BENCH_RUNS, else `runs` under the current folder."""
    return Path(os.environ.get("INDM_BENCH_RUNS") or "runs")


def reports_root() -> Path:
    """Folder of the reports: INDM_BENCH_REPORTS, else `reports` under the current folder."""
    return Path(os.environ.get("INDM_BENCH_REPORTS") or "reports")


def features_file(suite: str, dataset: str) -> Path:
    """Where a suite keeps the feature classifier of one of its data sets."""
    return runs_root() / suite / FEATURES / f"{dataset.rpartition('/')[2]}.safetensors"


def resolve_run(identity: Mapping[str, Any], settings: Mapping[str, Any]) -> RunConfig:
    """A validated run from its identity and merged settings; Invalid with the path of the first problem."""
    from models import registry

    kinds = {**registry.COMPONENTS, "model": registry.MODELS}
    model = resolve_component(kinds, "model", settings.get("model"), ("model",))
    train = validate(TrainConfig, settings.get("train", {}), ("train",))
    evaluate = validate(EvaluateConfig, settings.get("evaluate", {}), ("evaluate",))
    for group in train.learning_rates:
        if group not in LEARNING_RATES:
            raise Invalid(("train", "learning_rates", group), f": unknown key; {accepted(LEARNING_RATES)}")
    for key in ("ema_rates", "raw_groups"):
        for group in getattr(train, key):
            if group not in LEARNING_RATES:
                raise Invalid(("train", key), f": {show(group)}: unknown group; {accepted(LEARNING_RATES)}")
    # a suite's defaults speak of every group, whether or not a variant has parameters of that kind
    train = train.model_copy(update={"learning_rates": LEARNING_RATES | train.learning_rates})
    names = [entry.get("name") for entry in evaluate.samplers]
    for i, name in enumerate(names):
        if name in names[:i]:  # rows are told apart by the sampler's name
            raise Invalid(("evaluate", "samplers", i, "name"), f" = {show(name)}: given twice; accepted: once")
    samplers = [_resolve_sampler(entry, ("evaluate", "samplers", i)) for i, entry in enumerate(evaluate.samplers)]
    studies = {
        name: _resolve_study(name, options, ("evaluate", "studies", name))
        for name, options in evaluate.studies.items()
        if options is not None  # null takes away what an outer layer asked for
    }
    evaluate = evaluate.model_copy(update={"samplers": samplers, "studies": studies})
    run = RunConfig.model_construct(**identity, model=model, train=train, evaluate=evaluate)
    if run.dataset in FACTS:
        shape, items, tests = FACTS[run.dataset]
        run.check_data(shape, items, tests)
        check_buildable(model, shape)
    return run


def check_buildable(model: Mapping[str, Any], shape: Sequence[int]) -> None:
    """Build the model without memory or arithmetic; Invalid for options that do not go together or with ``shape``."""
    problem = _build_problem(json.dumps({**model, "shape": list(shape)}))
    if problem:
        raise Invalid(("model",), f": {problem}")


@lru_cache(maxsize=256)
def _build_problem(model: str) -> str | None:
    import torch

    import models

    try:
        with torch.device("meta"), bounded_modules():
            check_parameters(models.build(json.loads(model)))
    except (ValueError, TypeError, ArithmeticError, IndexError, RuntimeError) as error:
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None


def _resolve_sampler(entry: Mapping[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
    from models.samplers import SAMPLERS

    common = validate(SamplerConfig, {k: v for k, v in entry.items() if k in SamplerConfig.model_fields}, path)
    if common.name not in SAMPLERS:
        raise Invalid((*path, "name"), f" = {show(common.name)}: unknown sampler; {accepted(SAMPLERS)}")
    schema = signature_schema(SAMPLERS[common.name], skip=SAMPLER_ARGUMENTS)
    options = {k: v for k, v in entry.items() if k not in SamplerConfig.model_fields}
    for key in options:
        if key not in schema.model_fields:
            raise Invalid((*path, key), f": unknown key; {accepted(['name', 'steps', *schema.model_fields])}")
    # an adaptive sampler has a default for the steps it ignores
    adaptive = inspect.signature(SAMPLERS[common.name]).parameters["steps"].default is not inspect.Parameter.empty
    if adaptive and common.steps:
        raise Invalid(
            (*path, "steps"), f" = {show(common.steps)}: {common.name} chooses its own steps; set rtol and atol"
        )
    if not adaptive and not common.steps:
        raise Invalid((*path, "steps"), ": missing, and it has no default")
    known = validate(schema, options, path).model_dump(mode="json")
    if "end" not in options:  # the SDE's own eps, which the sampler does not know
        known.pop("end", None)
    return {"name": common.name, "steps": common.steps or [0], **known}


def _resolve_study(name: str, options: Mapping[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
    from bench.studies.names import STUDIES, options_of

    if name not in STUDIES:
        raise Invalid(path, f": unknown study; {accepted(STUDIES)}")
    schema = signature_schema(options_of(name), skip=("context",))
    for key in options:
        if key not in schema.model_fields:
            raise Invalid((*path, key), f": unknown key; {accepted(schema.model_fields)}")
    return validate(schema, options, path).model_dump(mode="json")


def _digest(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
