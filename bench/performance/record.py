"""The measured record of a device: one JSON file that grows by a case at a time, each measured in its own process.

A killed measurement continues: finished cases are left alone, and the file is published by a rename after each.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.errors import InputError
from bench.files import read_json, write_json

SCHEMA = 1
DEVICES = ("cpu", "gpu")
# a case that takes longer has failed
CASE_SECONDS = 1500
# share of a limit that the case in hand may take beyond it
MARGIN = 0.25


@dataclass(frozen=True)
class Outcome:
    """Names of the cases that ``failed``, now or before, and of those ``left`` because the limit came first."""

    failed: list[str]
    left: list[str]


def cases_of(device: str) -> list:
    """The cases of "cpu" or "gpu". InputError for another."""
    if device not in DEVICES:
        raise InputError(f"device = {device!r}: accepted: {', '.join(DEVICES)}")
    if device == "cpu":
        from bench.performance.cases import cpu_cases

        return cpu_cases()
    from bench.performance.gpu import gpu_cases

    return gpu_cases()


def chosen(device: str, only: Sequence[str]) -> list:
    """The cases whose names begin with one of ``only`` (all, if none is given). InputError where one fits nothing."""
    cases = cases_of(device)
    for start in only:
        if not any(case.name.startswith(start) for case in cases):
            names = ", ".join(case.name for case in cases)
            raise InputError(f"--only {start}: no case of the {device} begins so; accepted: {names}")
    return [case for case in cases if not only or case.name.startswith(tuple(only))]


def load_record(path: Path) -> dict[str, Any]:
    """The record in ``path``, or an empty one. InputError where it is damaged or of another schema."""
    if not path.is_file():
        return {"schema": SCHEMA, "cases": {}}
    try:
        record = read_json(path)
    except ValueError as error:
        raise InputError(f"{error}; accepted: the file as it was, or none") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise InputError(f"{path}: schema: accepted: {SCHEMA}; remove the file to measure anew")
    return record


def measure(
    out: Path,
    device: str = "cpu",
    only: Sequence[str] = (),
    again: bool = False,
    quick: bool = False,
    limit_seconds: float | None = None,
) -> Outcome:
    """Measure what ``out``/{device}.json lacks, one process a case; cases that failed before come last.

    ``again``: measured cases too. ``quick``: few rounds, a rehearsal. ``limit_seconds``: begin no case after that, and
    end the one in hand a quarter of it later; the next command begins with that case.
    """
    path, started, failed = out / f"{device}.json", time.monotonic(), []
    limit = math.inf if limit_seconds is None else limit_seconds
    wanted, known = chosen(device, only), load_record(path)["cases"]
    bad = {name for name, found in known.items() if "problem" in found}
    waiting = [case.name for case in wanted if again or case.name not in known or case.name in bad]
    waiting.sort(key=lambda name: name in bad)
    for number, name in enumerate(waiting, 1):
        began = time.monotonic()
        spare = limit - (began - started)
        patience = min(CASE_SECONDS, spare + MARGIN * limit)
        result = in_own_process(device, name, quick, patience) if spare > 0 else None
        if result is None and (spare <= 0 or (patience < CASE_SECONDS and number > 1)):
            print(f"stopped by the limit of {limit:g} s at {name}; the same command continues", flush=True)
            rest = waiting[number - 1 :]
            # what only fails again is no reason to come back
            return Outcome(failed + [name for name in rest if name in bad], [n for n in rest if n not in bad])
        result = result or {"problem": f"not finished after {patience:.0f} s"}
        # whoever else writes the file is not lost
        record = load_record(path)
        record["cases"][name] = result
        write_json(path, record)
        took, problem = time.monotonic() - began, result.get("problem")
        print(f"[{number}/{len(waiting)}] {name}: {problem or brief(result)} ({took:.0f} s)", flush=True)
        failed += [name] if problem else []
    return Outcome(failed, [])


def brief(result: dict[str, Any]) -> str:
    """A measured case in a few words."""
    shown = ("seconds", "multiple", "times_faster", "overhead", "evaluations", "images_per_second")
    return ", ".join(f"{name} {result[name]:.4g}" for name in shown if isinstance(result.get(name), int | float))


def in_own_process(device: str, name: str, quick: bool, seconds: float = CASE_SECONDS) -> dict[str, Any] | None:
    """Measure one case in a fresh process, whose memory and caches are its own.

    {"problem"} where it failed; None where it was ended because it took longer than ``seconds``.
    """
    # a fork spares the imports; CUDA does not survive one
    method = "fork" if device == "cpu" and sys.platform == "linux" else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        child = get_context(method).Process(target=_child, args=(device, name, result, quick))
        child.start()
        child.join(seconds)
        if child.is_alive():
            child.kill()
            child.join()
            return None
        return read_json(result) if result.is_file() else {"problem": f"ended with exit code {child.exitcode}"}


def _child(device: str, name: str, result: Path, quick: bool) -> None:
    try:
        found = measured(device, name, quick)
    except Exception as error:  # one case's failure is its result; the others go on
        traceback.print_exc()
        found = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    write_json(result, found)


def measured(device: str, name: str, quick: bool = False) -> dict[str, Any]:
    """Measure one case here; the record with where, when and by which code it was made."""
    import torch

    from bench.allocator import keep_freed_memory
    from bench.performance.cases import QUICK, Effort
    from bench.provenance import record, training_code

    if device == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()  # else a step spends some 7 % on page faults
    effort = QUICK if quick else Effort()
    case = next(case for case in cases_of(device) if case.name == name)
    result = case.run(effort)
    provenance = record("cpu" if device == "cpu" else None) | {"code": training_code()}
    provenance.pop("peak_memory_mb")
    if hasattr(os, "getloadavg"):  # what else the machine was doing
        provenance["load"] = round(os.getloadavg()[0], 1)
    return result | {"group": case.group, "effort": asdict(effort), "provenance": provenance}
