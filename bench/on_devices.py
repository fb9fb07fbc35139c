"""A suite's DVC stages on several devices of one machine: each device takes the next stage that is ready.

A stage runs by `dvc repro --single-item` in a process that sees its device alone. Two of them may run at the same time:
DVC locks the repository only while it checks and records a stage, not while its command runs, and stages that do not
depend on each other write different files.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any

from bench.errors import InputError
from bench.provenance import usable_cores
from bench.stopping import EXIT_CODE
from bench.yaml_files import read_yaml

CPU = "cpu"
DEVICE = re.compile(r"^(cpu|\d+|(GPU|MIG)-[0-9A-Za-z/-]+)$")
# how long stages that were asked to stop may take to write their checkpoints
GRACE_SECONDS = 90.0
POLL_SECONDS = 0.1
UNCHANGED = re.compile(r"^Stage '.*' (didn't change|is cached)")
# lines that say nothing of the stage's work: DVC's own, and progress bars, which several processes would mix
NOISE = re.compile(
    r"^\s*$|^> |^Running stage|^(Updating|Generating) lock file|^To (track|enable)|^Use `dvc push`"
    r"|^Data and pipelines are up to date|^\t(git add|dvc config)|\d+%"
)


@dataclass
class Stage:
    """One stage: its address for DVC, its name, files that it reads and writes, and what became of it.

    ``state``: waiting, running, done, unchanged, failed, skipped (something it needs failed), stopped.
    """

    address: str
    name: str
    reads: list[str]
    writes: list[str]
    needs: list[Stage] = field(default_factory=list, repr=False)
    state: str = "waiting"

    @property
    def finished(self) -> bool:
        """Whether what depends on it may run."""
        return self.state in ("done", "unchanged")


def parse_devices(text: str) -> list[str]:
    """``"0,1"`` or ``"cpu,cpu"`` as a list; one given twice runs two stages at a time. InputError."""
    devices = [part.strip() for part in text.split(",")]
    for device in devices:
        if not DEVICE.match(device):
            raise InputError(f"--gpus {text}: accepted: numbers or ids of GPUs, or cpu, separated by commas")
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        if given and device not in (CPU, *(part.strip() for part in given.split(","))):
            raise InputError(f"--gpus {text}: {device} is not among CUDA_VISIBLE_DEVICES = {given}; accepted: those")
    return devices


def visible_devices() -> list[str]:
    """The GPUs that this process may use, else one CPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [part.strip() for part in given.split(",") if part.strip()] or [CPU]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())] or [CPU]


def read_stages(file: Path) -> list[Stage]:
    """The stages of a pipeline file, matrices with one axis expanded, each with the stages that it needs."""
    stages: list[Stage] = []
    for name, entry in read_yaml(file)["stages"].items():
        # a file in the current folder is addressed without its name
        prefix = "" if file == Path("dvc.yaml") else f"{file}:"
        for label, fill in _expansions(entry.get("matrix")):
            reads, writes = ([fill(path) for path in _paths(entry.get(kind))] for kind in ("deps", "outs"))
            stages.append(Stage(f"{prefix}{name}{label}", f"{name}{label}", reads, writes))
    for stage in stages:
        stage.needs = [
            other
            for other in stages
            if other is not stage and any(_overlap(read, made) for read in stage.reads for made in other.writes)
        ]
    return stages


def _expansions(matrix: dict[str, list] | None) -> list[tuple[str, Any]]:
    if not matrix:
        return [("", lambda text: text)]
    ((axis, values),) = matrix.items()
    return [(f"@{value}", lambda text, v=str(value): text.replace(f"${{item.{axis}}}", v)) for value in values]


def _paths(entries: list | None) -> list[str]:
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries or []]


def _overlap(first: str, second: str) -> bool:
    """Whether two paths are the same, or one is a folder above the other."""
    one, two = PurePosixPath(first), PurePosixPath(second)
    return one.is_relative_to(two) or two.is_relative_to(one)


class Devices:
    """Stages shared out over devices; a stage that fails stops only those that need it."""

    def __init__(self, stages: Sequence[Stage], devices: Sequence[str]):
        self.stages, self.devices = list(stages), list(devices)
        self.started, self.begun = time.monotonic(), 0
        self.asked: float | None = None  # when an end was asked for
        self._pending: int | None = None  # signal to pass on
        self._running: dict[int, subprocess.Popen] = {}
        self._lock = threading.RLock()

    def run(self) -> int:
        """Run all stages; 0 when all are up to date, 75 when an end was asked for, 1 when one failed."""
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        threads = [threading.Thread(target=self._serve, args=(place,)) for place in range(len(self.devices))]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(POLL_SECONDS)
                self._forward()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        counts = {state: sum(stage.state == state for stage in self.stages) for state in ("failed", "skipped")}
        unchanged = sum(stage.state == "unchanged" for stage in self.stages)
        if self.asked is not None:
            left = sum(not stage.finished for stage in self.stages)
            print(f"\nstopped; {left} of {len(self.stages)} stages left, the same command continues", flush=True)
            return EXIT_CODE
        failed = counts["failed"] + counts["skipped"]
        end = f"{counts['failed']} failed, {counts['skipped']} skipped" if failed else "done"
        print(f"\n{end} after {self._elapsed()}; {unchanged} of {len(self.stages)} stages were up to date", flush=True)
        return 1 if failed else 0

    def _serve(self, place: int) -> None:
        """A device's life: take the next ready stage until none can become ready."""
        while True:
            with self._lock:
                stage = self._next()
                if stage is not None:
                    stage.state = "running"
                    self.begun += 1
                    number = self.begun
                over = self.asked is not None or all(s.state not in ("waiting", "running") for s in self.stages)
            if stage is not None:
                self._reproduce(stage, place, number)
            elif over:
                return
            else:
                time.sleep(POLL_SECONDS)

    def _next(self) -> Stage | None:
        if self.asked is not None:
            return None
        for stage in self.stages:
            if stage.state == "waiting" and any(need.state in ("failed", "skipped") for need in stage.needs):
                stage.state = "skipped"
                missing = next(need for need in stage.needs if need.state in ("failed", "skipped"))
                self._say(stage, f"skipped, {missing.name} is missing")
        ready = (s for s in self.stages if s.state == "waiting" and all(need.finished for need in s.needs))
        return next(ready, None)

    def _reproduce(self, stage: Stage, place: int, number: int) -> None:
        device = self.devices[place]
        self._say(stage, f"begins, stage {number} of {len(self.stages)}", device)
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = "" if device == CPU else device
        command = ["dvc", "--wait-for-lock", "repro", "--single-item", stage.address]
        with self._lock:
            if self.asked is not None:
                stage.state = "waiting"
                return
            # a session of its own, so that a request reaches DVC and its command alike
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                start_new_session=True,
            )
            self._limit(process.pid, place)
            self._running[process.pid] = process
        started, unchanged = time.monotonic(), False
        for line in process.stdout:
            unchanged = unchanged or bool(UNCHANGED.match(line))
            if not NOISE.search(line) and not UNCHANGED.match(line):
                self._say(stage, line.rstrip(), device)
        code = process.wait()
        with self._lock:
            del self._running[process.pid]
            if code == 0:
                stage.state = "unchanged" if unchanged else "done"
            else:
                stage.state = "stopped" if self.asked is not None else "failed"
        took = f"after {time.monotonic() - started:.0f} s"
        self._say(stage, f"{stage.state} {took}" if code == 0 else f"{stage.state} {took} (exit code {code})", device)

    def _limit(self, pid: int, place: int) -> None:
        """Give the process its share of the cores, so that stages do not count on each other's."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        share = usable_cores() // len(self.devices)
        if cores and share:
            with suppress(OSError):
                os.sched_setaffinity(pid, cores[place * share : (place + 1) * share])

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """First request: stages are told to stop. A second one, later than a second after it, ends them."""
        if self.asked is None:
            self.asked = time.monotonic()
            self._pending = signal.SIGINT
        elif time.monotonic() - self.asked > 1.0:
            self._pending = signal.SIGKILL

    def _forward(self) -> None:
        """Pass a request on to what runs. SIGINT: DVC leaves that to the command, and records how it ended."""
        if self.asked is not None and time.monotonic() - self.asked > GRACE_SECONDS:
            self._pending = signal.SIGKILL
        if self._pending is None:
            return
        number, self._pending = self._pending, None
        with self._lock:
            for pid in self._running:
                with suppress(ProcessLookupError):
                    os.killpg(pid, number)

    def _elapsed(self) -> str:
        from bench.repro import clock

        return clock(time.monotonic() - self.started)

    def _say(self, stage: Stage, said: str, device: str = "") -> None:
        place = f" {'' if device == CPU or not device.isdecimal() else 'gpu '}{device}" if device else ""
        with self._lock:
            print(f"[{self._elapsed()}{place}] {stage.name}: {said}", flush=True)


def reproduce_on(suite_name: str, devices: str | None) -> int:
    """Reproduce one suite through DVC on the devices of ``devices``, all visible ones by default; the exit code.

    After a failure the report is written from what succeeded, as `python -m bench.repro` does.
    """
    from bench.config import load_suite
    from bench.pipeline import pipeline_file, refresh, suite_stages
    from bench.repro import report_partially

    load_suite(suite_name)
    chosen = visible_devices() if devices is None else parse_devices(devices)
    if shutil.which("dvc") is None:
        raise InputError("dvc: not found; accepted: install it, or `indm-bench run`, which does without")
    if refresh():
        print("pipeline files written from the suites")
    own = suite_stages(load_suite(suite_name))
    stages = [stage for stage in read_stages(pipeline_file(suite_name)) if stage.name.partition("@")[0] in own]
    code = Devices(stages, chosen).run()
    if code == 1:
        report_partially([stage.name for stage in stages if not stage.finished])
    return code
