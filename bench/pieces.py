"""Finished pieces of an evaluation in progress, kept in files, so that one that was killed continues where it was.

They lie in ``.checkpoints/evaluation/<configuration hash>-<weights hash>/``, one .npz file a piece, and are gone once
the evaluation is published. A piece is used again only by the configuration, weights, code and kind of device that made
it, and for exactly the same images.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.checkpoint import checkpoint_root
from bench.files import atomic_path, read_json, write_json
from bench.sharding import Arrays, decode, encode

IDENTITY = "identity.json"
# what decides the values of an evaluation, besides the models
MEASURING = ("batches", "data", "distances", "evaluate", "features", "fidelity", "likelihood", "sampling", "toy")
_KEY, _DIGEST = "piece", "sha256"
# what reading a file that was damaged on the disk may raise
_DAMAGED = (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile)


@lru_cache(maxsize=1)
def measuring_code() -> str:
    """sha256, hex, over the files of the code that decides what an evaluation computes."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*(root / "models").rglob("*.py"), *(root / "bench" / f"{name}.py" for name in MEASURING)]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


class Pieces:
    """The kept pieces of one evaluation; ``identity`` (JSON) is all else that decides their values.

    Pieces of the same configuration and weights under another identity are removed by :meth:`open`.
    """

    def __init__(self, config_hash: str, weights_sha256: str, identity: dict[str, Any]):
        self.folder = checkpoint_root() / "evaluation" / f"{config_hash}-{weights_sha256[:12]}"
        said = {"config_hash": config_hash, "weights_sha256": weights_sha256, "code": measuring_code()} | identity
        self.identity = json.loads(json.dumps(said | {"torch": torch.__version__}))
        self.digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def open(self) -> None:
        """Make the folder ready for reading and writing; by one process alone."""
        try:
            known = read_json(self.folder / IDENTITY)
        except (OSError, ValueError):
            known = None
        if known != self.identity:
            self.remove()
            write_json(self.folder / IDENTITY, self.identity)

    def load(self, name: str, rows: Sequence[int]) -> dict[str, np.ndarray] | None:
        """The arrays kept under ``name`` for these consecutive images, None where they are not there or damaged."""
        try:
            found = decode(self._path(name, rows).read_bytes())
        except _DAMAGED:
            return None
        kept = [str(found.pop(key, None)) for key in (_KEY, _DIGEST)]
        return found if kept == [_key(name, rows), self.digest] else None

    def save(self, name: str, rows: Sequence[int], arrays: Arrays) -> None:
        """Keep arrays, which may have no objects in them; all or nothing."""
        said = {_KEY: np.array(_key(name, rows)), _DIGEST: np.array(self.digest)}
        with atomic_path(self._path(name, rows)) as temporary:
            temporary.write_bytes(encode({**arrays, **said}))

    def forget(self, name: str) -> None:
        """Remove every piece kept under ``name``."""
        for path in self.folder.glob(f"{_stem(name)}-*.npz"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str, rows: Sequence[int]) -> Path:
        return self.folder / f"{_stem(name)}-{rows[0]:08d}-{rows[-1] + 1:08d}.npz"


def _key(name: str, rows: Sequence[int]) -> str:
    return f"{name} of {rows[0]} to {rows[-1]}"


def _stem(name: str) -> str:
    """A file name for ``name``: readable, and with a hash of what is not."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")[:48]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
