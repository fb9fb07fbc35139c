"""CIFAR-10's official files with images of our own, for the tests that read them."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile

import numpy as np


def random_images(n: int, seed: int = 0, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), dtype=np.uint8)


def python2_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """An official batch, byte for byte as Python 2 with its NumPy wrote it (protocol 2, strings as raw bytes)."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        + (b"(K\x01" + integer(data.shape[0]) + integer(data.shape[1]) + b"\x86" + kind)
        + (b"\x89" + text(data.tobytes()) + b"tb")
    )
    names = b"](" + b"".join(text(b"some_image.png") for _ in labels) + b"e"
    fields = [(b"batch_label", text(b"training batch 1 of 5")), (b"data", array), (b"filenames", names)]
    fields.append((b"labels", b"](" + b"".join(integer(label) for label in labels) + b"e"))
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in fields) + b"u."


def python3_batch(data: np.ndarray, labels: list[int]) -> bytes:
    return pickle.dumps({b"data": data, b"labels": labels}, protocol=2)


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def official_files(images: np.ndarray, labels: list[int], write=python2_batch) -> dict[str, bytes]:
    """Six batches, two images each, that hold ``images`` (12, 3, 32, 32) in order."""
    flat = images.reshape(len(images), -1)
    return {name: write(flat[2 * i : 2 * i + 2], labels[2 * i : 2 * i + 2]) for i, name in enumerate(BATCHES)}


def write_official(folder, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_tar(path, files: dict[str, bytes], mode: str) -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


LABELS = [3, 8, 0, 9, 1, 1, 5, 7, 2, 2, 6, 4]
