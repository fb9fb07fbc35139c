"""Which studies there are, and the options of each, found without importing the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

STUDIES = ("gap_split", "discretisation", "conventions", "latents", "identities")


def study(name: str) -> Any:
    """The module of a study."""
    return importlib.import_module(f"bench.studies.{name}")


def options_of(name: str) -> Callable:
    """The function whose keyword arguments are the study's settings."""
    return study(name).measure
