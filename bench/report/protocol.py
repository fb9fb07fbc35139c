"""How a number was measured, and the refusal to put numbers together that were measured differently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bench.report.load import Run

Protocol = dict[str, Any]

# a variant's own affair: its seeds must agree, other variants may differ (the corrector's step size of VE and VP, say)
OWN = ("sampler options",)
SHARED_PROTOCOL = tuple(
    f"protocol.{name}"
    for name in (
        "eps",
        "dequantiser",
        "weights",
        "quantiser",
        "reference",
        "nelbo_proposal",
        "nelbo_draws",
        "nelbo_control_variate",
    )
)


def _get(record: Any, *path: str) -> Any:
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def likelihood_protocol(run: Run) -> Protocol | None:
    """What must agree before two NELBOs or NLLs may be averaged or compared; None for a run without likelihoods."""
    record = run.likelihood
    if record is None or run.diverged:
        return None
    fields = {
        "data.hash": _get(record, "data", "hash") or "not stated",
        "units": record.get("units") or "not stated",
        "n": record.get("n") or "not stated",
        "dims": record.get("dims"),
        "levels": record.get("levels"),
        "nelbo.repeats": _get(record, "nelbo", "repeats"),
        "nelbo.times": _get(record, "nelbo", "times"),
    }
    for key in ("solver", "rtol", "atol", "probes"):
        fields[f"nll.{key}"] = _get(record, "nll", key)
    for key, value in sorted((record.get("protocol") or {}).items()):
        fields[f"protocol.{key}"] = value
    return fields


def curve_protocol(run: Run) -> Protocol | None:
    """What must agree before two learning curves may be averaged or compared."""
    if not run.curve:
        return None
    fields = {"data.hash": _data_hash(run), "columns": ", ".join(run.curve[0])}
    for key in ("curve_images", "curve_samples", "curve_steps"):
        fields[f"train.{key}"] = _get(run.config, "train", key)
    fields["evaluate.features"] = _get(run.config, "evaluate", "features")
    return fields


def robustness_protocol(run: Run, row: Mapping[str, str]) -> Protocol:
    """What must agree before the sample quality of two runs at one sampler and step count may be compared."""
    return {
        "data.hash": _data_hash(run),
        "n": row.get("n"),
        "evaluate.features": _get(run.config, "evaluate", "features"),
        "protocol.quantiser": _get(run.likelihood, "protocol", "quantiser"),
        "protocol.reference": _get(run.likelihood, "protocol", "reference"),
        "sampler options": _sampler(run, row.get("sampler")),
    }


def budget_protocol(run: Run) -> Protocol | None:
    """What must agree before two trainings had one budget and saw the data in one order."""
    if run.provenance is None and not run.config:
        return None
    return {
        "images_seen": _get(run.provenance, "images_seen"),
        "train.batch_size": _get(run.config, "train", "batch_size"),
    }


def study_protocol(run: Run, study: str) -> Protocol | None:
    """What must agree before a study's numbers of two runs may be averaged or compared."""
    options = _get(run.config, "evaluate", "studies", study)
    if run.likelihood is None or options is None:
        return None
    return {
        "data.hash": _data_hash(run),
        "units": run.likelihood.get("units"),
        "protocol.weights": _get(run.likelihood, "protocol", "weights"),
        f"evaluate.studies.{study}": str(sorted(options.items())) if isinstance(options, Mapping) else str(options),
    }


def timing_protocol(run: Run) -> Protocol | None:
    """What must agree before seconds and megabytes may be averaged."""
    if run.provenance is None:
        return None
    return {key: run.provenance.get(key) for key in ("device", "cpu", "cores", "threads")}


def _data_hash(run: Run) -> Any:
    return _get(run.likelihood, "data", "hash")


def _sampler(run: Run, name: str | None) -> Any:
    """The sampler's options beside its step counts, as the run's configuration states them."""
    samplers = _get(run.config, "evaluate", "samplers")
    for entry in samplers if isinstance(samplers, list) else []:
        if isinstance(entry, Mapping) and entry.get("name") == name:
            return str({key: value for key, value in sorted(entry.items()) if key not in ("name", "steps")})
    return None


def refusals(
    runs: Iterable[Run], protocol: Callable[[Run], Protocol | None], what: str = "rows", across: bool = True
) -> dict[str, str]:
    """Variant -> why its numbers are refused, for runs of one data set.

    Seeds of a variant must agree in every field. Across variants (unless ``across`` is False) the rows must agree with
    the most common protocol, the first of equally common ones, in the fields that are not a variant's own affair. A
    field that one side does not state is no disagreement.
    """
    seen: dict[str, dict[int, Protocol]] = {}
    for run in runs:
        fields = protocol(run)
        if fields is not None:
            seen.setdefault(run.variant, {})[run.seed] = fields
    refused, agreed = {}, {}
    for variant, seeds in seen.items():
        merged: Protocol = {}
        for seed, fields in seeds.items():
            name = _difference(merged, fields)
            if name:
                refused[variant] = (
                    f"refused: seeds differ in {name} "
                    f"(seed {seed}: {_show(fields[name])}; before it: {_show(merged[name])})"
                )
                break
            merged.update({key: value for key, value in fields.items() if value is not None})
        else:
            agreed[variant] = merged
    if across and agreed:
        counts = Counter(_key(fields) for fields in agreed.values())
        common = next(fields for fields in agreed.values() if counts[_key(fields)] == max(counts.values()))
        for variant, fields in agreed.items():
            name = _difference({name: value for name, value in common.items() if _shared(name)}, fields)
            if name:
                refused[variant] = (
                    f"refused: {name} = {_show(fields.get(name))} differs from "
                    f"{_show(common.get(name))} of the other {what}"
                )
    return refused


def _key(fields: Protocol) -> str:
    return repr(sorted((key, repr(value)) for key, value in fields.items() if _shared(key)))


def _shared(name: str) -> bool:
    return name not in OWN and (not name.startswith("protocol.") or name in SHARED_PROTOCOL)


def _difference(first: Protocol, second: Protocol) -> str | None:
    for name in first:
        a, b = first[name], second.get(name)
        if a is not None and b is not None and a != b:
            return name
    return None


def _show(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
