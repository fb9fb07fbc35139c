"""Checkpoints that survive a kill at any moment: safetensors in a directory, published by one rename.

Intermediate checkpoints live in ``.checkpoints/<configuration hash>/<step>/``, outside DVC's outputs, so that a
stage whose outputs DVC deleted resumes where it was, and a changed configuration never resumes from another one's.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.files import file_hash, read_hashed_json, write_hashed_json
from bench.locks import checkpoint_root as checkpoint_root
from bench.locks import exclusive as exclusive
from bench.locks import exclusive_results as exclusive_results

KEEP = 2
STATE, META = "state.safetensors", "meta.json"
RAW_WEIGHTS = "raw.safetensors"  # of the last step, beside the averaged ones


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
    """Publish ``folder/<step>``; then remove older checkpoints beyond the last two, and later ones."""
    final = folder / f"{step:09d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        state = temporary / STATE
        # shared storage is refused by safetensors; clones make every tensor its own
        write_tensors({name: value.detach().contiguous().clone() for name, value in tensors.items()}, state)
        write_hashed_json(temporary / META, {"step": step} | meta | {"state_sha256": file_hash(state)})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    present = published(folder)
    # a run that stands here could not resume from a later one: damaged, or of other code
    unusable = [path for path in present if path.name > final.name]
    for old in [path for path in present if path.name <= final.name][:-KEEP] + unusable:
        shutil.rmtree(old, ignore_errors=True)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors, on the disk when it returns; OSError, which names the file, where it cannot be written."""
    try:
        save_file(tensors, path, metadata=metadata)
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def published(folder: Path) -> list[Path]:
    """Complete checkpoints of ``folder``, oldest first."""
    return sorted(p for p in folder.glob("[0-9]*") if (p / META).is_file())


def load_checkpoint(
    folder: Path, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, meta) of the newest checkpoint whose content has its hash, or None; others are named and passed over.

    Hashes are of the state's file, in meta.json, and of meta.json's own content, in itself.
    """
    for path in reversed(published(folder)):
        try:
            meta = read_hashed_json(path / META)
            if meta.pop("state_sha256", None) != file_hash(path / STATE):
                raise ValueError(f"{path / STATE}: its content differs from its hash in {META}")
            return load_file(path / STATE, device=str(device)), meta
        except (SafetensorError, ValueError, OSError) as error:
            print(f"{' '.join(str(error).split())}; trying the checkpoint before", file=sys.stderr)
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
    temporary = folder.parent / f".weights.writing-{os.getpid():08d}.safetensors"
    clones = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    try:
        write_tensors(clones, temporary, {"config": json.dumps(config, sort_keys=True)})
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
