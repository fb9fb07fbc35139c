"""The official CIFAR-10 files, read without executing anything.

The official batches are Python pickles, and a pickle is a program. The reader below knows four names, all of which it
answers with stand-ins of its own that do nothing but hold bytes; any other name ends the reading before anything is
called.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import InputError
from bench.untrusted import Bounded, check_pickle, most_unpacked

TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_BATCH = "test_batch"
LARGEST_BATCH = 256 * 2**20  # bytes; the official ones have 31 MB
Arrays = tuple[np.ndarray, np.ndarray]  # uint8 (N, 3, 32, 32), int64 (N,)


class _Standin:
    """Base of the stand-ins; without a ``__setstate__`` of its own, unpickling would set attributes by name."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("unexpected state")


class _Type(_Standin):
    """Stands for ``numpy.dtype``: keeps the type's name, ignores byte order and flags."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode() if isinstance(name, bytes) else str(name)

    def __setstate__(self, state: Any) -> None:
        pass


class _Array(_Standin):
    """Stands for ``numpy``'s array reconstruction: its state becomes an array of unsigned bytes, no other type."""

    def __init__(self, *_: Any) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        if not (isinstance(kind, _Type) and kind.name == "u1" and isinstance(data, bytes) and not fortran):
            raise pickle.UnpicklingError("an array is not made of unsigned bytes")
        self.values = np.frombuffer(data, dtype=np.uint8).reshape(shape)


class _Encoded(_Standin):
    """Stands for ``_codecs.encode``, by which Python 3 stores bytes in old pickles: latin1 only."""

    def __new__(cls, text: Any, encoding: Any = "latin1") -> Any:
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("bytes in an unknown encoding")
        return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _Encoded,
}


class _BatchUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image batch needs")
        return _KNOWN[module, name]


def parse_batch(content: bytes, source: str) -> Arrays:
    """Read one official batch: images uint8 (N, 3, 32, 32) and labels int64 (N,).

    ``source`` names the file in errors. Raises InputError for anything that is not such a batch, before any code in it
    could run.
    """
    try:
        check_pickle(content)
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise anything; nothing of it has been executed
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{source}: not an official CIFAR-10 batch ({reason})") from error
    if not isinstance(batch, dict):
        raise InputError(
            f"{source}: not an official CIFAR-10 batch (a {type(batch).__name__} where a dict is expected)"
        )
    fields = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    data, labels = fields.get("data"), fields.get("labels")
    data = data.values if isinstance(data, _Array) else None
    if data is None or data.ndim != 2 or data.shape[1] != 3072:
        raise InputError(f"{source}: not an official CIFAR-10 batch ('data' is not an uint8 array of shape (N, 3072))")
    valid = isinstance(labels, list) and all(type(label) is int and 0 <= label < 10 for label in labels)
    if not valid or len(labels) != len(data):
        raise InputError(
            f"{source}: not an official CIFAR-10 batch ('labels' is not a list of {len(data)} classes 0..9)"
        )
    return data.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def read_folder(folder: Path) -> tuple[Arrays, Arrays]:
    """Read the unpacked official folder ``cifar-10-batches-py``: (train, test), each images and labels."""

    def content(name: str) -> bytes:
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing; {folder.name} must hold {', '.join([*TRAIN_BATCHES, TEST_BATCH])}")
        if path.stat().st_size > LARGEST_BATCH:
            raise InputError(f"{path}: not an official CIFAR-10 batch ({path.stat().st_size} bytes are too many)")
        return path.read_bytes()

    return _assemble(content, str(folder))


def read_archive(path: Path) -> tuple[Arrays, Arrays]:
    """Read the official ``cifar-10-python.tar.gz`` in memory, extracting nothing to disk."""
    members: dict[str, bytes] = {}
    wanted = {*TRAIN_BATCHES, TEST_BATCH}
    try:
        with gzip.open(path) as unpacked, _tar(unpacked, path) as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if not member.isfile() or name not in wanted:
                    continue
                if member.size > LARGEST_BATCH:
                    raise InputError(f"{path}: member {member.name} has {member.size} bytes, too many for a batch")
                stream = archive.extractfile(member)
                members[name] = stream.read() if stream else b""
    except InputError:
        raise
    except Exception as error:  # a damaged header may raise anything
        raise InputError(f"{path}: damaged archive ({' '.join(str(error).split())}); download it again") from error

    def content(name: str) -> bytes:
        if name not in members:
            raise InputError(f"{path}: the archive has no member {name}; it is not cifar-10-python.tar.gz")
        return members[name]

    return _assemble(content, str(path))


def _tar(unpacked: gzip.GzipFile, path: Path) -> tarfile.TarFile:
    return tarfile.open(fileobj=Bounded(unpacked, most_unpacked(path.stat().st_size), str(path)), mode="r|")


def _assemble(content: Callable[[str], bytes], source: str) -> tuple[Arrays, Arrays]:
    parts = [parse_batch(content(name), f"{source}/{name}") for name in TRAIN_BATCHES]
    test = parse_batch(content(TEST_BATCH), f"{source}/{TEST_BATCH}")
    return (np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])), test
