"""Folders held by one process at a time. The locks are the operating system's: they go with the process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from bench.errors import InputError
from bench.files import sweep_temporary


def checkpoint_root() -> Path:
    """``.checkpoints``, beside the runs folder unless INDM_BENCH_CHECKPOINTS says otherwise."""
    return Path(os.environ.get("INDM_BENCH_CHECKPOINTS", ".checkpoints"))


@contextmanager
def exclusive(folder: Path, wanted: bool = True) -> Iterator[None]:
    """Hold a run's checkpoint folder against a second process; InputError if another one is training that run.

    ``wanted``: only the main process of several takes it.
    """
    if not wanted:
        yield
        return
    with _locked(folder / ".lock", f"{folder.name}: another process is training this run"):
        yield


@contextmanager
def exclusive_results(folder: Path, wanted: bool = True) -> Iterator[None]:
    """Hold a folder of results against others that would write there, of whichever configuration; sweep it first.

    The lock lies beside the checkpoints: a folder of results holds results alone.
    """
    if not wanted:
        yield
        return
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    with _locked(checkpoint_root() / "locks" / name, f"{folder}: another process is writing here"):
        sweep_temporary(folder)
        yield


@contextmanager
def _locked(path: Path, said: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{said}; accepted: wait for it to end") from error
    with lock:
        yield
