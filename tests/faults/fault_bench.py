"""Where faults happen: a tiny suite in a folder of its own, commands on it, and what its results are worth."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
VARIANTS = ("linear", "flow")
SUITE = """faults:
  title: "Faults"
  description: "A training of two dozen steps, checkpointed at every fourth."
  seeds: [0, 1]
  datasets:
    checkerboard:
      model: {score: {name: mlp, width: 8, depth: 1}}
      train: {batch_size: 16, steps: 24, learning_rates: {score: 2.0e-3, flow: 1.0e-3}, curve_images: 4}
      evaluate:
        images: 8
        samples: 16
        quality: [sliced_wasserstein]
        probes: exact
        samplers: [{name: ddim, steps: [2, 3]}]
        studies: {latents: {images: 8}}
  defaults:
    model: {name: indm, sde: {name: vp}, flow: {name: identity}, setting: nll, preconditioning: gaussian}
    train: {warmup: 2, ema: 0.9, curve: 2, curve_samples: 0, checkpoint_every: 4}
    evaluate: {nelbo_repeats: 2, nelbo_times: 2, rtol: 1.0e-1, atol: 1.0e-1, batch_size: 4}
  variants:
    linear: {}
    flow:
      model: {flow: {name: residual, blocks: 1, hidden: 4}}
"""
# state before the stage of the variant "flow", state after it
STATES = {
    "train": ("trained linear", "trained flow"),
    "evaluate": ("evaluated linear", "evaluated flow"),
    "report": ("evaluated flow", "reported"),
}
# what the clock and the memory decide
MACHINE = {"seconds", "train_seconds", "evaluate_seconds", "started", "peak_memory_mb", "commit", "dirty"}
# seals cover what the clock decides; they are checked by the code under test
UNCOMPARED = ("hashes-",)


@dataclass
class Outcome:
    """How a command ended: its exit code (negative: the signal), and what it said."""

    code: int
    said: str
    events: list[str]

    @property
    def clear(self) -> bool:
        """Whether it told its end without a traceback, a failure in one line of its own."""
        lines = [line for line in self.said.splitlines() if line.startswith("indm-bench: ")]
        return "Traceback" not in self.said and (self.code == 0 or len(lines) == 1)


class Server:
    """The process that forks the commands, see fault_child."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("fault_child.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, **request: Any) -> Any:
        """One answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the server."""
        self.process.stdin.close()
        self.process.wait(30)


@dataclass
class Command:
    """One that was begun: its process, and the file of what it says."""

    server: Server
    process: int
    said: Path

    ended: int | None = None

    def poll(self) -> int | None:
        """The exit code, the negative signal, or None while it runs."""
        if self.ended is None:
            self.ended = self.server.ask(poll=self.process)
        return self.ended

    def send(self, number: int) -> None:
        """A signal."""
        os.kill(self.process, number)

    def end(self, seconds: float = 120) -> Outcome:
        """Wait for a command; one that hangs is a failure of its own."""
        started = time.monotonic()
        while (code := self.poll()) is None:
            if time.monotonic() - started > seconds:
                self.send(signal.SIGKILL)
                raise AssertionError(f"no end after {seconds} s: {self.said.read_text()[-2000:]}")
            time.sleep(0.005)
        events = Path(f"{self.said}.events")
        names = json.loads(events.read_text()) if events.is_file() else []
        text = self.said.read_text(errors="replace") if self.said.is_file() else ""
        return Outcome(code, text, names)


class Bench:
    """A folder with the tiny suite, its runs, reports and checkpoints."""

    def __init__(self, folder: Path, server: Server):
        self.folder, self.server = folder, server
        (folder / "experiments").mkdir(parents=True, exist_ok=True)
        (folder / "experiments" / "faults.yaml").write_text(SUITE)
        self.calls = 0

    @property
    def environment(self) -> dict[str, str]:
        """Where the commands find and leave their files."""
        folders = {"RUNS": "runs", "REPORTS": "reports", "CHECKPOINTS": "checkpoints"}
        return {f"INDM_BENCH_{name}": str(self.folder / path) for name, path in folders.items()}

    def start(self, *arguments: str, fault: dict[str, Any] | None = None) -> Command:
        """Begin a command in a process of its own."""
        self.calls += 1
        said = self.folder / f"said-{self.calls}.txt"
        request = {"arguments": arguments, "folder": str(self.folder), "environment": self.environment}
        return Command(self.server, self.server.ask(**request, fault=fault or {}, said=str(said)), said)

    def run(self, *arguments: str, fault: dict[str, Any] | None = None) -> Outcome:
        """A whole command."""
        return self.start(*arguments, fault=fault).end()

    def stage(self, name: str, variant: str = "flow", **options: Any) -> Outcome:
        """``train``, ``evaluate`` or ``report``."""
        if name == "report":
            return self.run("report", "faults", **options)
        return self.run(name, "faults", variant, "--seed", "0", "--workers", "1", **options)

    def copy(self, folder: Path) -> Bench:
        """The same state in another folder."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("said-*"))
        return Bench(folder, self.server)

    def results(self, *names: str) -> dict[str, str]:
        """File -> digest of what it says, below the runs and reports (or ``names``)."""
        found = {}
        for name in names or ("runs", "reports"):
            for path in sorted((self.folder / name).rglob("*")):
                if path.is_file() and not path.name.startswith(UNCOMPARED):
                    found[path.relative_to(self.folder).as_posix()] = digest(path)
        return found

    def raw(self, *names: str) -> dict[str, str]:
        """File -> sha256 of its bytes: what is finished must not change by a bit."""
        return {
            path.relative_to(self.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for name in names
            for path in sorted((self.folder / name).rglob("*"))
            if path.is_file()
        }

    def leftovers(self) -> list[str]:
        """Half-written results and checkpoints that nobody removed."""
        hidden = [path for name in ("runs", "reports") for path in (self.folder / name).rglob(".*")]
        return [str(path) for path in (*hidden, *self.folder.glob("checkpoints/*/.[0-9]*"))]


def digest(path: Path) -> str:
    """sha256 of a file's content without what the clock and the memory decide."""
    data = path.read_bytes()
    if path.suffix == ".json":
        data = json.dumps(_without(json.loads(data)), sort_keys=True).encode()
    elif path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(data.decode())))
        data = json.dumps([{k: v for k, v in row.items() if k not in MACHINE} for row in rows]).encode()
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            data = b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays.files))
    return hashlib.sha256(data).hexdigest()


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner) for key, inner in value.items() if key not in MACHINE}
    return [_without(inner) for inner in value] if isinstance(value, list) else value


def bit_flipped(path: Path, place: float) -> None:
    """Flip one bit of a file, at a share of its length."""
    data = bytearray(path.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= 1 << int(place * 1000) % 8
    os.chmod(path, 0o644)
    path.write_bytes(bytes(data))


def truncated(path: Path, place: float) -> None:
    """Cut a file at a share of its length."""
    data = path.read_bytes()
    path.write_bytes(data[: int(place * len(data))])
