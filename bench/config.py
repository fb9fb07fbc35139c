"""Suites, variants and runs: what `experiments/<suite>.yaml` says, checked before anything is computed.

A run is one (suite, variant, data set, seed). Its settings are deep-merged: the suite's defaults, then the data set's,
then, of a variant under ``more``, the defaults given there, then the variant's, then the variant's own for that data
set (``variants.<v>.datasets.<d>``), then `--set` overrides.
A merge that changes the ``name`` of a component replaces the component.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from bench.errors import InputError
from bench.options import Invalid, Schema, accepted, dotted, locate, show, validate
from bench.overrides import SECTIONS, merge_all, parse_overrides
from bench.run_config import (
    CURVE_SETTINGS,
    FACTS,
    FEATURES,
    RunConfig,
    check_buildable,
    features_file,
    reports_root,
    resolve_run,
    runs_root,
)
from bench.settings import EvaluateConfig, Name, TrainConfig
from bench.yaml_files import dump_yaml, read_yaml

# everything a caller needs to know of configurations is found here
__all__ = [
    "CURVE_SETTINGS",
    "FACTS",
    "FEATURES",
    "EvaluateConfig",
    "RunConfig",
    "Suite",
    "SuiteFile",
    "TrainConfig",
    "check_buildable",
    "dump_config",
    "features_file",
    "load_suite",
    "read_run",
    "reports_root",
    "resolve_run",
    "runs_root",
    "suite_files",
]

Folder = Annotated[str, Field(pattern=r"^(folder:.+|[A-Za-z0-9][A-Za-z0-9_-]*)$")]


class MoreVariants(Schema):
    """Variants that `make repro` leaves to `make repro-all`: with their own seeds and defaults over the suite's."""

    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    defaults: dict = Field(default_factory=dict)
    variants: Annotated[dict[Name, dict | None], Field(min_length=1)]


class FolderImages(Schema):
    """What `indm-bench plan` takes a suite's image folder to hold where it is not at hand. Nothing else reads it."""

    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    test: Annotated[int, Field(ge=1)]


class SuiteFile(Schema):
    """The mapping under the one top-level key of a suite's file."""

    title: str
    description: str = ""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    datasets: Annotated[dict[Folder, dict | None], Field(min_length=1)]
    folder: FolderImages | None = None
    defaults: dict
    variants: Annotated[dict[Name, dict | None], Field(min_length=1)]
    more: MoreVariants | None = None


class Suite:
    """A suite's file and the overrides of the command line. Light: models are imported only by ``runs``."""

    def __init__(self, name: str, path: Path, content: SuiteFile, overrides: Mapping[str, Any]):
        self.name = name
        self.path = path
        self.title = content.title
        self.description = content.description
        more = content.more
        # those that `make repro` runs, and those that only `make repro-all` does
        self.core, self.more = list(content.variants), list(more.variants) if more else []
        self.variants = [*self.core, *self.more]
        self._seeds = {name: content.seeds for name in self.core} | {name: more.seeds for name in self.more}
        self.seeds = list(dict.fromkeys(seed for name in self.variants for seed in self._seeds[name]))
        self.datasets = list(content.datasets)
        self.folder = content.folder
        self.defaults = content.defaults
        self._content = content
        self._overrides = overrides

    def seeds_of(self, variant: str) -> list[int]:
        """The seeds of one variant."""
        return list(self._seeds[variant])

    def cells(
        self, variant: str | None = None, seed: int | None = None, dataset: str | None = None
    ) -> list[tuple[str, int, str]]:
        """(variant, seed, data set) of the runs, names checked and nothing else; imports no model. InputError."""
        variants = self._choose("variant", variant, self.variants)
        datasets = self._choose("dataset", dataset, self.datasets)
        known = self.seeds if variant is None else self.seeds_of(variant)
        seeds = self._choose("seed", seed, known)
        return [
            (name, number, data)
            for name in variants
            for number in self._seeds[name]
            for data in datasets
            if number in seeds
        ]

    def runs(self, variant: str | None = None, seed: int | None = None, dataset: str | None = None) -> list[RunConfig]:
        """The validated runs, all or those of one variant, seed or data set; InputError for an unknown one."""
        cells = self.cells(variant, seed, dataset)
        resolved = {pair: self._resolve(*pair) for pair in dict.fromkeys((name, data) for name, _, data in cells)}
        return [resolved[name, data].model_copy(update={"seed": number}) for name, number, data in cells]

    def count(self, variant: str | None = None, seed: int | None = None, dataset: str | None = None) -> int:
        """The number of those runs."""
        return len(self.cells(variant, seed, dataset))

    def _choose(self, kind: str, value: Any, known: list) -> list:
        if value is None:
            return known
        if value not in known:
            raise InputError(f"{kind} {value!r} is not in suite {self.name} ({self.path}); {accepted(known)}")
        return [value]

    def _resolve(self, variant: str, dataset: str) -> RunConfig:
        more = self._content.more if variant in self.more else None
        group = more or self._content
        own = dict(group.variants[variant] or {})
        by_dataset = own.pop("datasets", None) or {}
        place = f"{self.path}: {'more.' if more else ''}"
        layers = [
            (f"{self.path}: defaults.", self._content.defaults),
            (f"{self.path}: datasets.{dataset}.", self._content.datasets[dataset] or {}),
            (f"{place}defaults.", more.defaults if more else {}),
            (f"{place}variants.{variant}.", own),
            (f"{place}variants.{variant}.datasets.{dataset}.", by_dataset.get(dataset) or {}),
            ("--set ", self._overrides),
        ]
        identity = {"suite": self.name, "variant": variant, "dataset": dataset, "seed": self._seeds[variant][0]}
        try:
            run = resolve_run(identity, merge_all(layer for _, layer in layers))
        except Invalid as error:
            # say where the value was written; a missing one is nobody's, so name the run that lacks it
            place = f"{self.path}: variant {variant}: "
            for label, layer in layers:
                place = label if locate(layer, error.path)[0] == error.path else place
            raise InputError(f"{place}{dotted(error.path)}{error.problem}") from error
        return run.model_copy(update={"subfolder": len(self.datasets) > 1})


def load_suite(name: str, overrides: Sequence[str] = ()) -> Suite:
    """The suite `experiments/<name>.yaml`; ``overrides`` are texts ``key=value``. Raises InputError."""
    found = suite_files()
    if name not in found:
        raise InputError(f"unknown suite {name!r}; {accepted(found)}")
    path = found[name]
    content = read_yaml(path)
    if not isinstance(content, dict) or list(content) != [name]:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else show(content)
        raise InputError(f"{path}: must have the one top-level key {name!r}, has: {keys}")
    try:
        suite = validate(SuiteFile, content[name])
    except Invalid as error:
        raise InputError(f"{path}: {dotted(error.path)}{error.problem}") from error
    for place, seeds in (("", suite.seeds), ("more.", suite.more.seeds if suite.more else [])):
        repeated = [seed for seed in seeds if seeds.count(seed) > 1]
        if repeated:
            raise InputError(f"{path}: {place}seeds = {show(seeds)}: seed {repeated[0]} is given twice")
    for dataset in suite.datasets:
        if dataset not in FACTS and not dataset.startswith("folder:"):
            raise InputError(f"{path}: datasets.{dataset}: unknown data set; {accepted([*FACTS, 'folder:<path>'])}")
        if dataset.startswith("folder:") and len(suite.datasets) > 1:
            raise InputError(f"{path}: datasets.{dataset}: an image folder must be the only data set of its suite")
    if suite.folder is not None and any(dataset in FACTS for dataset in suite.datasets):
        raise InputError(f"{path}: folder: only of a suite whose data set is folder:<path>")
    if FEATURES in suite.variants:
        raise InputError(f"{path}: variants.{FEATURES}: this name is taken by the folder of the feature classifiers")
    for variant in suite.more.variants if suite.more else ():
        if variant in (FEATURES, *suite.variants):
            raise InputError(f"{path}: more.variants.{variant}: this name is taken")
    for place, known in _sections(suite).items():
        mapping = locate(suite.model_dump(), place)[1] or {}
        if not isinstance(mapping, dict):
            raise InputError(f"{path}: {dotted(place)} = {show(mapping)}: must be a mapping of keys to values")
        for key in mapping:
            if key not in known:
                raise InputError(f"{path}: {dotted((*place, key))}: unknown key; {accepted(known)}")
    return Suite(name, path, suite, parse_overrides(overrides))


def _sections(suite: SuiteFile) -> dict[tuple[str, ...], Sequence[str]]:
    """Places of a suite's file that hold sections of settings, outer ones first, with the keys each accepts."""
    places: dict[tuple[str, ...], Sequence[str]] = {("defaults",): SECTIONS}
    places |= {("datasets", name): SECTIONS for name in suite.datasets}
    groups: list[tuple[tuple[str, ...], dict]] = [(("variants",), suite.variants)]
    if suite.more:
        places[("more", "defaults")] = SECTIONS
        groups.append((("more", "variants"), suite.more.variants))
    for place, variants in groups:
        for name, variant in variants.items():
            here = (*place, name)
            places[here] = (*SECTIONS, "datasets")
            own = (variant or {}).get("datasets")
            if own is not None:
                places[(*here, "datasets")] = list(suite.datasets)
                places |= {(*here, "datasets", d): SECTIONS for d in (own if isinstance(own, dict) else ())}
    return places


def suite_files() -> dict[str, Path]:
    """Names and files of the suites: `experiments/` under the current folder, else the one beside this package."""
    for root in (Path("experiments"), Path(__file__).parents[1] / "experiments"):
        files = {path.stem: path for path in sorted(root.glob("*.yaml"))}
        if files:
            return files
    return {}


def dump_config(run: RunConfig) -> str:
    """The text of a run's `config.yaml`."""
    return dump_yaml(run.resolved())


def read_run(folder: Path) -> RunConfig:
    """The configuration that a finished run left in its folder; InputError when there is none."""
    path = folder / "config.yaml"
    if not path.exists():
        raise InputError(f"{folder}: no trained run here (its config.yaml is missing); train it first")
    content = read_yaml(path)
    try:
        run = validate(RunConfig, content)
    except Invalid as error:
        raise InputError(f"{path}: {dotted(error.path)}{error.problem}") from error
    return run.model_copy(update={"subfolder": folder.name == run.dataset})
