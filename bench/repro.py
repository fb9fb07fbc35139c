"""`dvc repro` with a line that says how far it is, and a report of what succeeded when something failed.

Run as `python -m bench.repro [--all] [pipeline files or stages]`. Without arguments the laptop's pipeline is reproduced
without the variants that its suites list under ``more``; with ``--all`` they follow, and the reports are written again.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from bench.config import runs_root
from bench.files import read_json

# suffix of the stages that only --all runs
MORE = "-more"
RUNNING = re.compile(r"^Running stage '(?:.*:)?([^':]+)':")
SKIPPED = re.compile(r"^Stage '(?:.*:)?([^':]+)' (didn't change|is cached)")
# what DVC says of itself at every stage
CHATTER = (
    "> ",
    "Updating lock file",
    "Generating lock file",
    "To track the changes",
    "To enable auto",
    "Use `dvc push`",
    "\tgit add",
    "\tdvc config",
)


def stage_names(targets: Sequence[str]) -> list[str]:
    """Names of the stages in the targets' files, without the files' names."""
    listed = subprocess.run(
        ["dvc", "stage", "list", "--name-only", *targets], capture_output=True, text=True, check=False
    )
    return [_name(line) for line in listed.stdout.split()]


def _name(address: str) -> str:
    return address.rpartition(":")[2]


def clock(seconds: float) -> str:
    """Seconds as ``2 min 05 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Reproduction:
    """One reproduction: its stages, those seen so far, and the time."""

    def __init__(self, names: Sequence[str]):
        self.names, self.seen, self.unchanged = list(names), [], 0
        self.started, self.current = time.monotonic(), ""

    @property
    def elapsed(self) -> str:
        """Time since the start."""
        return clock(time.monotonic() - self.started)

    def run(self, *targets: str, alone: bool = False) -> int:
        """`dvc repro --keep-going` of the targets, each stage headed by its number; DVC's exit code.

        ``alone``: the targets themselves and not what they depend on (`--single-item`).
        """
        # an unbuffered DVC keeps its lines in order with those of the stages
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        command = ["dvc", "repro", "--single-item" if alone else "--keep-going", *targets]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1) as process:
            for line in process.stdout:
                self._tell(line)
        self._show_evaluated()
        return process.returncode

    def _tell(self, line: str) -> None:
        running, skipped = RUNNING.match(line), SKIPPED.match(line)
        if running:
            self._show_evaluated()
            self.current = running[1]
            self._see(running[1])
            print(f"\n[stage {len(self.seen)} of {len(self.names)}, {self.elapsed}] {running[1]}", flush=True)
        elif skipped:
            self.unchanged += self._see(skipped[1])
        elif line.strip() and not any(line.startswith(prefix) for prefix in CHATTER):
            print(line, end="", flush=True)

    def _show_evaluated(self) -> None:
        """After an evaluation, its suite's likelihoods so far: a first table long before the report."""
        stage, _, variant = self.current.partition("@")
        if variant and stage.startswith("evaluate-"):
            suites = [name.removeprefix("report-") for name in self.names if name.startswith("report-")]
            own = [suite for suite in suites if f"{stage}-".startswith(f"evaluate-{suite}-")]
            print(likelihoods(max(own, key=len), runs_root()), flush=True)
        self.current = ""

    def _see(self, name: str) -> bool:
        new = name not in self.seen
        if new:
            self.seen.append(name)
        return new


def likelihoods(suite: str, root: Path) -> str:
    """Mean NELBO, NLL and gap over the seeds evaluated so far, a line a data set and variant."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    units = ""
    for path in sorted((root / suite).rglob("likelihood.json")):
        record = read_json(path)
        if record["nll"]:
            units = record["units"]
            # NCSN has no NELBO
            pair = tuple(record[key]["corrected"]["total"] if record[key] else math.nan for key in ("nelbo", "nll"))
            found.setdefault((record["dataset"], record["variant"]), []).append(pair)
    lines = [
        f"\n{suite} so far ({units})",
        f"{'data set':14}{'variant':16}{'seeds':>5}{'NELBO':>10}{'NLL':>10}{'gap':>10}",
    ]
    for (dataset, variant), pairs in found.items():
        nelbo, nll = (fmean(values) for values in zip(*pairs, strict=True))
        lines.append(f"{dataset:14}{variant:16}{len(pairs):5}{nelbo:10.4f}{nll:10.4f}{nelbo - nll:10.4f}")
    return "\n".join(lines)


def reproduce(targets: Sequence[str], everything: bool = False) -> int:
    """Reproduce pipeline files; without targets the laptop's suites, one after the other, so that tables come early.

    After a failure the other stages go on, and the reports that DVC then skips are written from what succeeded.
    """
    from bench.pipeline import refresh

    if refresh():
        print("pipeline files written from the suites")
    if not targets:
        return reproduce_laptop(everything)
    reproduction = Reproduction(stage_names(targets))
    failed = [target for target in targets if reproduction.run(target)]
    return finish(reproduction, failed)


def reproduce_laptop(everything: bool) -> int:
    """The suites of `dvc.yaml`, first without what only ``everything`` asks for, then with it.

    A report depends on every variant of its suite, so that in the first part it is asked for alone.
    """
    names = stage_names(["dvc.yaml"])
    wanted = names if everything else [name for name in names if MORE not in name.partition("@")[0]]
    suites = [name.removeprefix("report-") for name in names if name.startswith("report-")]
    reproduction, failed = Reproduction(wanted), []

    def run(*targets: str, alone: bool = False) -> None:
        if targets and reproduction.run(*targets, alone=alone):
            failed.extend(targets)

    for suite in suites:
        own = (f"evaluate-{suite}@", f"evaluate-{suite}-", f"references-{suite}")
        last = [name for name in wanted if name.startswith(own) and MORE not in name.partition("@")[0]]
        run(*last)
        if not failed:
            run(f"report-{suite}", alone=True)
    if everything:
        for suite in suites:
            run(f"report-{suite}")
    run(*(name for name in wanted if name in ("validate", "estimators")))
    # the page depends on every report; asked for after a failure, DVC would try the failed stages a second time
    if not failed:
        run("index", alone=True)
    return finish(reproduction, failed)


def finish(reproduction: Reproduction, failed: Sequence[str]) -> int:
    """Say how it ended; after a failure write the reports that were skipped. The exit code."""
    if failed:
        report_partially([name for name in reproduction.names if name not in reproduction.seen])
    end, total = "failed" if failed else "done", len(reproduction.names)
    print(
        f"\n{end} after {reproduction.elapsed}; {reproduction.unchanged} of {total} stages were up to date", flush=True
    )
    return 1 if failed else 0


def report_partially(unvisited: Sequence[str]) -> None:
    """Write the reports that DVC skipped because something before them failed; they mark what is missing."""
    suites = [name.removeprefix("report-") for name in unvisited if name.startswith("report-")]
    for suite in suites:
        print(f"\nreport of {suite} from the runs that succeeded", flush=True)
        subprocess.run(["indm-bench", "report", suite], check=False)
    if "index" in unvisited:
        subprocess.run(["indm-bench", "report", "--index"], check=False)


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(reproduce([name for name in given if name != "--all"], "--all" in given))
