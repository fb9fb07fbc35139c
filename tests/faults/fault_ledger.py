"""The figures of the battery, and reports/reliability.md, which is written from them and from those of tests/fuzz."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.files import read_json, write_json, write_text_atomic

FOLDER = Path("reports/reliability")
CI_POINTS = 30  # of kills, without --faults
FAULTS, FUZZ = "faults.json", "fuzz.json"
COUNTS = ("tried", "survived", "lost", "changed")
TEXT = """# Reliability

Written by `python tests/faults` from `reliability/faults.json` and `reliability/fuzz.json`; nothing here is typed.

## Faults

{tried} faults were tried on {made}, {survived} survived: the same command again ended with results that are
bit-identical to those of an unbroken run, or the command stopped with one line that says why, and nothing that was
finished before was lost or changed. Results lost: {lost}. Results changed: {changed}.

| fault | tried | survived | results lost | results changed |
| --- | ---: | ---: | ---: | ---: |
{rows}

- Each fault meets a real command of `indm-bench` in a process of its own, on a suite of two variants: a linear
  diffusion and INDM with a residual flow. The other variant's finished results stand beside, and are compared by
  sha256 before and after.
- kill -9: the process sends itself the signal at the k-th call that opens for writing, syncs, renames, makes or
  removes a file, before or after the call, k drawn from a seed; a third of the points kills the next process too. A
  file of weights is half written when the signal comes. At a random time: the signal comes from outside.
- Disk full: the k-th write and all later ones fail with "No space left on device". The file-size limit is the
  system's own (RLIMIT_FSIZE). Read-only: every change is refused.
- Compared are weights, per-image arrays, tables and pictures bit for bit; of JSON and CSV files all but the columns of
  the clock and the memory (seconds, time of start, peak memory).
- A NaN of the flow's inverse is not an error: the evaluation records the status, and no NaN stands in a file.

{fuzz}
## How to run it all

    make test                            # everything at CI's size: {ci} points of kills
    python tests/faults --faults {points}   # this table: as many points of kills, other faults in proportion
    pytest tests/fuzz --fuzz-examples 2000 --fuzz-record reports/reliability/fuzz.json
    python tests/faults --write       # this file again, from the figures that are there

## Content hashes

Every checkpoint, training and evaluation carries sha256 hashes that are verified on reading: `meta.json` of a
checkpoint, `hashes-train.json` and `hashes-evaluate.json` of a run, `summary.json` of a report. A file that differs is
named; a checkpoint falls back to the one before, a stage makes its files again, the report leaves the run out and says
so, `indm-bench regression` refuses the tables. Results from before there were hashes get them, as they are, by
`python -m bench.seals runs`.
"""


def figures(stats: dict[str, list[Any]], points: int) -> dict[str, Any]:
    """Kind -> counts, and the tests' outcomes, from pytest's reports; a fault of a failed test did not survive."""
    kinds: dict[str, dict[str, int]] = {}
    tests = {"passed": 0, "failed": 0}
    for reports in stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call" and not getattr(report, "failed", False):
                continue
            tests["passed" if report.passed else "failed"] += 1
            faults = [value for name, value in report.user_properties if name == "fault"]
            if report.failed and not faults:  # it failed before it could say which fault it was
                faults = [[f"not survived: {report.nodeid.rpartition('::')[2]}", 1, 0, 0]]
            for kind, tried, lost, changed in faults:
                row = kinds.setdefault(kind, dict.fromkeys(COUNTS, 0))
                for key, count in zip(COUNTS, (tried, tried * report.passed, lost, changed), strict=True):
                    row[key] += int(count)
    total = {key: sum(row[key] for row in kinds.values()) for key in COUNTS}
    made = time.strftime("%Y-%m-%d", time.gmtime())
    return {"made": made, "points": points, "kinds": dict(sorted(kinds.items())), "total": total, "tests": tests}


def write_figures(path: Path, stats: dict[str, list[Any]], points: int) -> None:
    """``figures`` as a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, figures(stats, points))


def write_report(folder: Path, ci: int) -> Path:
    """``folder``.md from the JSON files in ``folder``; ``ci``: points of kills in CI."""
    found = read_json(folder / FAULTS)
    rows = [f"| {kind} | {' | '.join(str(row[key]) for key in COUNTS)} |" for kind, row in found["kinds"].items()]
    text = TEXT.format(
        **found["total"], made=found["made"], rows="\n".join(rows), ci=ci, points=found["points"], fuzz=_fuzz(folder)
    )
    path = folder.with_suffix(".md")
    write_text_atomic(path, text)
    return path


def _fuzz(folder: Path) -> str:
    path = folder / FUZZ
    if not path.is_file():
        return "## Fuzzing\n\nNo figures: `reliability/fuzz.json` is not there.\n"
    found = read_json(path)
    kinds = sorted({key for counts in found["kinds"].values() for key in counts} - {"inputs"})
    lines = [
        "## Fuzzing",
        "",
        f"{found['inputs']:,} inputs were made by Hypothesis: tracebacks {found['tracebacks']}, hangs "
        f"{found['hangs']}. Each ended in success or in one line with exit code 2, within "
        f"{found['limits']['seconds']:g} s and {found['limits']['bytes'] / 2**30:g} GiB.",
        "",
        f"| input | tried | {' | '.join(kinds)} |",
        f"| --- | ---: | {' | '.join('---:' for _ in kinds)} |",
    ]
    for kind, counts in found["kinds"].items():
        lines.append(f"| {kind} | {counts['inputs']} | {' | '.join(str(counts.get(key, 0)) for key in kinds)} |")
    return "\n".join(lines) + "\n"
