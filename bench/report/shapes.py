"""The shape that a record must have before the report reads it: what is a mapping, a number, a text or a list.

Values are judged elsewhere, and keys that are not named here are left alone: they may come from later code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

TEXT, NUMBER, SCALAR, LIST = "a text", "a number", "a text or a number", "a list"
Shape = dict[str, Any]

BOUND: Shape = {"total": SCALAR, "parts": {}, "se_images": SCALAR, "se_repeats": SCALAR, "steps": NUMBER}
BOTH: Shape = {"corrected": BOUND, "uncorrected": BOUND, "repeats": NUMBER, "times": NUMBER}
LIKELIHOOD: Shape = {
    "suite": TEXT,
    "dataset": TEXT,
    "variant": TEXT,
    "seed": NUMBER,
    "status": TEXT,
    "units": TEXT,
    "dims": NUMBER,
    "levels": NUMBER,
    "n": NUMBER,
    "family": TEXT,
    "config_hash": TEXT,
    "evaluate_seconds": NUMBER,
    "reasons": {},
    "data": {"name": TEXT, "train": NUMBER, "test": NUMBER, "shape": LIST, "levels": NUMBER, "hash": TEXT},
    "protocol": {
        "bound": TEXT,
        "reference": TEXT,
        "weights": TEXT,
        "quantiser": TEXT,
        "dequantiser": TEXT,
        "curve_sampler": TEXT,
        "eps": NUMBER,
    },
    "nelbo": BOTH,
    "nll": BOTH | {"solver": TEXT, "rtol": NUMBER, "atol": NUMBER, "probes": SCALAR, "nfe_mean": SCALAR},
    "gap": BOTH,
    "chain": BOUND,
    "discrete": BOUND,
    "truth": {"nll": SCALAR},
}
PROVENANCE: Shape = {
    "commit": TEXT,
    "device": TEXT,
    "cpu": TEXT,
    "cores": NUMBER,
    "threads": NUMBER,
    "python": TEXT,
    "started": TEXT,
    "images_seen": NUMBER,
    "packages": {},
    "parameters": {},
}
CONFIG: Shape = {
    "dataset": TEXT,
    "train": {"curve_images": NUMBER, "curve_samples": NUMBER, "curve_steps": NUMBER, "batch_size": NUMBER},
    "evaluate": {"features": TEXT, "samplers": LIST, "studies": {}},
    "model": {"sde": {"name": TEXT}},
}


def check(record: Any, shape: Shape, path: str = "") -> None:
    """ValueError naming the first key of ``record`` that has another shape; null and absent keys have any."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{path or 'it'} is {_kind(record)}, not a mapping")
    for key, wanted in shape.items():
        value, place = record.get(key), f"{path}.{key}" if path else key
        if value is None:
            continue
        if isinstance(wanted, dict):
            check(value, wanted, place)
        elif not _fits(value, wanted):
            raise ValueError(f"{place} is {_kind(value)}, not {wanted}")


def _fits(value: Any, wanted: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if wanted == SCALAR:
        return isinstance(value, str | int | float)
    return isinstance(value, {TEXT: str, LIST: list}.get(wanted, ())) or (wanted == NUMBER and number)


def _kind(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "a text", bool: "a truth value"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number" if math.isfinite(value) and abs(value) < 1e300 else "no finite number"
    return kinds.get(type(value), f"a {type(value).__name__}")
