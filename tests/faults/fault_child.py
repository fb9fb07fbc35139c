"""A server that forks a process for each command line, and what that process does: the command, with a fault in it.

The server imports the heavy packages once, and computes what every process would compute again about its own code.
It reads requests from its standard input and answers each in one line: a new process's id, or how one has ended.
"""

from __future__ import annotations

import builtins
import errno
import inspect
import io
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401 - warmed
import matplotlib.pyplot  # noqa: F401
import pandas  # noqa: F401
import safetensors.torch
import torch

import bench.checkpoint
import bench.cli
import bench.commands
import bench.evaluate
import bench.pictures
import bench.pieces
import bench.provenance
import bench.report.suite
import bench.studies.latents
import bench.train  # noqa: F401
import models.registry  # noqa: F401

WRITING = "wax+"


def warm() -> None:
    """What every process would compute again: the functions without arguments that keep their value."""
    torch.set_num_threads(1)
    for module in (bench.provenance, bench.pieces):
        for function in vars(module).values():
            if hasattr(function, "cache_info") and not inspect.signature(function).parameters:
                function()


class Events:
    """Counts the calls that change files below ``root``, and lets one of them fail as ``fault`` says.

    ``fault``: {"at": number of the call, "kind": "kill" (before or after the call, by "after"), "full" (that write and
    all later ones find the disk full), "read-only" (every change is refused)}; none: they are only counted.
    """

    def __init__(self, root: Path, fault: dict[str, Any]):
        self.root, self.fault, self.names = str(root.resolve()), fault, []
        self.real = {
            name: getattr(os, name) for name in ("replace", "fsync", "unlink", "remove", "mkdir", "rmdir", "chmod")
        }
        self.open, self.save = io.open, safetensors.torch.save_file

    def install(self) -> None:
        """Put the counted calls in the places of the real ones."""
        for name in self.real:
            setattr(os, name, self._counted(name))
        builtins.open = io.open = self._open
        bench.checkpoint.save_file = self._save

    def _ours(self, target: Any) -> bool:
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        return isinstance(target, (str, os.PathLike)) and os.path.abspath(target).startswith(self.root)

    def _event(self, name: str, target: Any, call, writes: bool):
        self.names.append(name)
        number, kind = len(self.names), self.fault.get("kind")
        if kind == "kill" and number == self.fault["at"]:
            try:
                if self.fault.get("after"):
                    call()
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        if kind == "full" and writes and number >= self.fault["at"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([str(target)] if name != "fsync" else []))
        if kind == "read-only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))
        return call()

    def _counted(self, name: str):
        real = self.real[name]

        def call(target, *arguments, **options):
            if name in ("unlink", "remove") and "dir_fd" not in options and not os.path.lexists(target):
                return real(target, *arguments, **options)  # changes nothing
            if options.get("dir_fd") is None and not self._ours(target):
                return real(target, *arguments, **options)
            return self._event(
                name, target, lambda: real(target, *arguments, **options), name in ("replace", "fsync", "mkdir")
            )

        return call

    def _open(self, file, mode="r", *arguments, **options):
        if not set(mode) & set(WRITING) or isinstance(file, int) or not self._ours(file):
            return self.open(file, mode, *arguments, **options)
        return self._event("open", file, lambda: self.open(file, mode, *arguments, **options), True)

    def _save(self, tensors, path, metadata=None):
        def half() -> None:
            with self.open(path, "wb") as stream:
                stream.write(safetensors.torch.save(tensors, metadata)[:-100])

        if self.fault.get("kind") == "kill" and len(self.names) + 1 == self.fault["at"]:
            half()  # what a kill in the middle of the write leaves
        if self.fault.get("kind") == "full" and len(self.names) + 1 >= self.fault["at"]:
            half()
            self.names.append("save")
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        return self._event("save", path, lambda: self.save(tensors, path, metadata=metadata), True)


def jumping_clock(seed: int) -> None:
    """Wall-clock time jumps by up to years in both directions, at every look."""
    source, real = random.Random(seed), time.time
    time.time = lambda: real() + source.uniform(-1e8, 1e8)


def poison(what: str, step: int, value: float) -> None:
    """NaN or infinity in the data, the loss, the gradient or the flow's inverse."""
    import bench.train as training

    whole = training.Trainer.train_step
    if what == "flow inverse":
        from models.flows.residual import ResidualFlow

        ResidualFlow.inverse = lambda self, z, *a, **k: torch.full_like(z, value)
        return

    def poisoned(self):
        if self.step != step:
            return whole(self)
        if what == "data":
            batches, self.batches = self.batches, lambda *a: batches(*a) * value
        elif what == "loss":
            losses = self.step_module.phase_losses
            losses[:] = [lambda *a, f=f: (lambda pair: (pair[0] * value, pair[1]))(f(*a)) for f in losses]
        else:
            parameter = next(p for p in self.model.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: gradient * value)
        return whole(self)

    training.Trainer.train_step = poisoned


def command(arguments: list[str], folder: str, environment: dict[str, str], fault: dict[str, Any], said: str) -> None:
    """Run one command line in ``folder``; what it says goes to ``said``, and the events to ``said``.events."""
    handle = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(handle, 1), os.dup2(handle, 2)
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    events = Events(Path(folder), fault)
    write = events.open
    if fault.get("kind") == "size":  # the system's own limit: writes beyond it fail
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["at"], resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif fault.get("kind") == "clock":
        jumping_clock(fault["at"])
    elif fault.get("kind") == "number":
        poison(fault["what"], fault["at"], float(fault["value"]))
    elif fault.get("kind") != "signal":
        events.install()
    code = 1
    try:
        code = bench.cli.execute(arguments)
    except BaseException:  # noqa: BLE001 - a traceback is what the tests look for
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    if fault.get("kind") != "size":
        with write(said + ".events", "w") as stream:
            json.dump(events.names, stream)
    os._exit(code)


def serve() -> None:
    """{"poll": process id} is answered by its exit code, the negative signal or null; all else begins a command."""
    warm()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            process, status = os.waitpid(request["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if process else None), flush=True)
            continue
        process = os.fork()
        if process == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            command(**request)
        print(process, flush=True)


if __name__ == "__main__":
    serve()
