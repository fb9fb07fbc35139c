"""Checkpoints that survive a kill at any moment: safetensors in a directory, published by one rename.

Intermediate checkpoints live in ``.checkpoints/<configuration hash>/<step>/``, outside DVC's outputs, so that a
stage whose outputs DVC deleted resumes where it was, and a changed configuration never resumes from another one's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.errors import InputError
from bench.files import read_json, write_json

KEEP = 2
RAW_WEIGHTS = "raw.safetensors"  # of the last step, beside the averaged ones


def checkpoint_root() -> Path:
    """``.checkpoints``, beside the runs folder unless INDM_BENCH_CHECKPOINTS says otherwise."""
    return Path(os.environ.get("INDM_BENCH_CHECKPOINTS", ".checkpoints"))


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimiser's state as named tensors: ``<prefix>.<parameter index>.<key>``."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """Put back what :func:`optimizer_tensors` took; hyper-parameters stay those of the optimiser."""
    full = optimizer.state_dict()
    full["state"] = {}
    for name, value in tensors.items():
        if name.startswith(prefix + "."):
            index, key = name[len(prefix) + 1 :].split(".")
            full["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(full)


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Publish ``folder/<step>``; older checkpoints beyond the last two are removed afterwards."""
    final = folder / f"{step:09d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # shared storage is refused by safetensors; clones make every tensor its own
    save_file(
        {name: value.detach().contiguous().clone() for name, value in tensors.items()}, temporary / "state.safetensors"
    )
    with open(temporary / "state.safetensors", "rb") as stream:
        os.fsync(stream.fileno())
    write_json(temporary / "meta.json", {"step": step} | meta)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in published(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def published(folder: Path) -> list[Path]:
    """Complete checkpoints of ``folder``, oldest first."""
    return sorted(p for p in folder.glob("[0-9]*") if (p / "meta.json").is_file())


def load_checkpoint(
    folder: Path, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, meta) of the newest readable checkpoint, or None; a damaged one is passed over for the one before."""
    for path in reversed(published(folder)):
        try:
            return load_file(path / "state.safetensors", device=str(device)), read_json(path / "meta.json")
        except (SafetensorError, ValueError, OSError) as error:
            print(f"checkpoint {path.name} cannot be read ({error}); trying the one before")
    return None


def sweep(folder: Path) -> None:
    """Remove half-written checkpoints that a killed process left."""
    for leftover in folder.glob(".[0-9]*"):
        shutil.rmtree(leftover, ignore_errors=True)


def save_weights(
    folder: Path, state: dict[str, Tensor], config: dict[str, Any], name: str = "model.safetensors"
) -> None:
    """Write ``folder``/``name`` with the configuration in its metadata, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    # outside the folder, which DVC takes as it is: a kill must not leave half a file in it
    temporary = folder.parent / f".weights.{os.getpid()}.safetensors"
    clones = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(clones, temporary, metadata={"config": json.dumps(config, sort_keys=True)})
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, folder / name)


def file_hash(path: Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def exclusive(folder: Path, wanted: bool = True) -> Iterator[None]:
    """Hold a run's checkpoint folder against a second process; InputError if another one is training that run.

    The lock is the operating system's: it goes with the process, however that ends. ``wanted``: only the main process
    of several takes it.
    """
    if not wanted:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"{folder.name}: another process is training this run; accepted: wait for it to end"
        ) from error
    with lock:
        yield
