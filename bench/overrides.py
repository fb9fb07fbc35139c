"""Layers of settings: how those of a suite are merged, and how `--set key=value` becomes one more."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bench.errors import InputError
from bench.options import accepted
from bench.yaml_files import parse_yaml

SECTIONS = ("model", "train", "evaluate")


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """``["train.steps=100"]`` -> ``{"train": {"steps": 100}}``; values are YAML. Raises InputError."""
    merged: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(re.fullmatch(r"[A-Za-z0-9_-]+", part) for part in parts):
            raise InputError(f"--set {text}: must be key=value with a dotted key, for example train.steps=100")
        if parts[0] not in SECTIONS:
            raise InputError(f"--set {text}: unknown key {parts[0]!r}; {accepted(f'{name}.*' for name in SECTIONS)}")
        layer = parse_yaml(value, f"--set {text}")
        for part in reversed(parts):
            layer = {part: layer}
        merged = merge(merged, layer)
    return merged


def merge(under: Any, over: Any) -> Any:
    """Deep merge of mappings; anything else, and a component whose ``name`` changes, is replaced as a whole."""
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return over
    if "name" in over and over["name"] != under.get("name", over["name"]):
        return dict(over)
    return {**under, **{key: merge(under.get(key), value) for key, value in over.items()}}


def merge_all(layers: Any) -> dict[str, Any]:
    """Later layers win."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    return merged
