"""Datasets by name, dequantisation and its inverse, and the one formula from nats to bits per dimension.

``load(name)`` gives the whole data set in memory: uint8 images (N, C, H, W) or float32 points (N, 2). Two-dimensional
densities are endless (``Dataset.draw``); their ``train`` set serves statistics only. Every data set carries a content
hash, so that two results are compared only if they saw the same pixels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from bench import image_files, toy
from bench.errors import InputError

DIGIT_LEVELS = 17  # scikit-learn's digits count the dark pixels of a 4x4 block: 0..16
DIGIT_TEST = 297
IMAGE_LEVELS = 256
DATA_DIR_VARIABLE = "INDM_BENCH_DATA"

Number = TypeVar("Number", float, Tensor, np.ndarray)


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    ``train`` and ``test``: uint8 (N, C, H, W) with values below ``levels``, or float32 (N, 2) with ``levels`` None.
    ``hash``: sha256 (hex) over names, shapes, types and contents of both. ``std``: standard deviation of the train
    coordinates about their overall mean, for images in the scale [-1, 1] of ``dequantise``. Endless data have ``draw(n,
    generator) -> (n, 2)`` (CPU generator); ``log_prob(x) -> nats (B,)`` is exact where the density is known.
    """

    name: str
    shape: tuple[int, ...]
    levels: int | None
    train: Tensor
    test: Tensor
    hash: str
    std: float
    log_prob: Callable[[Tensor], Tensor] | None = None
    draw: Callable[[int, torch.Generator], Tensor] | None = None
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None

    def describe(self) -> dict[str, Any]:
        """Name, counts, shape, levels and hash, ready for JSON."""
        return {
            "name": self.name,
            "train": len(self.train),
            "test": len(self.test),
            "shape": list(self.shape),
            "levels": self.levels,
            "hash": self.hash,
        }


def content_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 (hex) over each tensor's name, type, shape and bytes, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        array = np.ascontiguousarray(tensor.cpu().numpy())
        digest.update(f"{name}:{array.dtype.newbyteorder('<').str}:{array.shape};".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()


def make_dataset(name: str, levels: int | None, train: Tensor, test: Tensor, **fields: Any) -> Dataset:
    """Build a ``Dataset``, computing its shape, hash and standard deviation from the tensors."""
    scale = 1.0 if levels is None else 2.0 / levels
    return Dataset(
        name=name,
        shape=tuple(train.shape[1:]),
        levels=levels,
        train=train,
        test=test,
        hash=content_hash({"train": train, "test": test}),
        std=scale * _std(train),
        **fields,
    )


def _std(values: Tensor) -> float:
    """Standard deviation in float64, by chunks: 50,000 images as float64 would not fit a laptop."""
    total = square = 0.0
    for chunk in values.split(4096):
        chunk = chunk.double()
        total += float(chunk.sum())
        square += float(chunk.square().sum())
    mean = total / values.numel()
    return math.sqrt(max(square / values.numel() - mean * mean, 0.0))


def _load_toy(name: str) -> Dataset:
    density = toy.DENSITIES[name]
    train, test = toy.fixed_sets(name)
    return make_dataset(name, None, train, test, log_prob=density.log_prob, draw=density.draw)


def _load_digits() -> Dataset:
    """scikit-learn's 1,797 digits, 8x8, 17 levels; a fixed split by class into 1,500 train and 297 test images."""
    table = _digits_table()
    pixels = torch.from_numpy(table[:, :64].reshape(-1, 1, 8, 8).copy())
    labels = torch.from_numpy(table[:, 64].astype(np.int64))
    test = _stratified(table[:, 64], DIGIT_TEST)
    return make_dataset(
        "digits",
        DIGIT_LEVELS,
        pixels[~test],
        pixels[test],
        train_labels=labels[~test],
        test_labels=labels[test],
    )


def _digits_table() -> np.ndarray:
    """The digits as uint8 (1797, 65): 64 pixels and the class."""
    spec = importlib.util.find_spec("sklearn")
    path = Path(spec.origin).parent / "datasets/data/digits.csv.gz" if spec and spec.origin else None
    if path and path.is_file():
        # the file that load_digits reads; importing scikit-learn for it would cost every process seconds
        return np.loadtxt(path, delimiter=",", dtype=np.uint8)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target]).astype(np.uint8)


def _stratified(labels: np.ndarray, count: int) -> Tensor:
    """Mask of ``count`` items whose class shares follow the whole, by largest remainders; (N,) bool.

    NumPy's legacy ``RandomState`` is used because its stream is frozen for good: the split is the same everywhere.
    """
    order = np.random.RandomState(0).permutation(len(labels))
    classes, sizes = np.unique(labels, return_counts=True)
    share = sizes * count / len(labels)
    quota = np.floor(share).astype(int)
    quota[np.argsort(quota - share, kind="stable")[: count - quota.sum()]] += 1
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for value, size in zip(classes, quota, strict=True):
        mask[order[labels[order] == value][:size]] = True
    return mask


_FILES: dict[str, Callable[[Path], image_files.Images]] = {
    "cifar10": image_files.read_cifar10,
    "cifar10-16": image_files.read_cifar10_16,
    "cifar10-jpeg": image_files.read_cifar10_jpeg,
}
NAMES = (*toy.DENSITIES, "digits", *_FILES)  # and folder:<path>
CIFAR10_COUNTS = (50_000, 10_000)


def load(name: str, data_dir: Path | str | None = None) -> Dataset:
    """Load a data set by name.

    Without files: ``checkerboard``, ``gaussians``, ``swissroll``, ``digits``. From files under ``data_dir`` (argument,
    else the environment variable INDM_BENCH_DATA, else ``data/``): ``cifar10`` (called ``cifar10-subset`` when images
    are missing), ``cifar10-jpeg``, ``cifar10-16``. ``folder:<path>``: any folder of equally large PNG or JPEG images,
    with train/ and test/ or split by name. Raises InputError for an unknown name and for files that are missing or
    damaged.
    """
    if name in toy.DENSITIES:
        return _load_toy(name)
    if name == "digits":
        return _load_digits()
    if name.startswith("folder:") and name != "folder:":
        try:
            folder = Path(name.removeprefix("folder:")).expanduser()
            # only the folder's own name: a result must not carry a machine's paths
            own = folder.resolve().name
            images = image_files.read_folder(folder)
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, of no user, through a loop of links
            raise InputError(f"dataset {name[:200]}: {' '.join(str(error).split())[:200]}") from error
        return _from_images(f"folder:{own}", images)
    if name in _FILES:
        folder = Path(data_dir or os.environ.get(DATA_DIR_VARIABLE) or "data").expanduser()
        return _load_files(name, folder, _stamp(folder))
    raise InputError(f"dataset: unknown name {name!r}; accepted: {', '.join(NAMES)}, folder:<path>")


def _stamp(folder: Path) -> tuple:
    """What changes when the files of a folder, or of the folders in it, do."""
    try:
        found = [path for one in [folder, *filter(Path.is_dir, folder.iterdir())] for path in one.iterdir()]
        return folder.resolve(), *sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in found)
    except OSError:
        return (time.monotonic_ns(),)  # the reader says what is wrong


@lru_cache(maxsize=2)  # a suite's runs and evaluations share a data set, whose preparation takes seconds
def _load_files(name: str, folder: Path, stamp: tuple) -> Dataset:
    data = _FILES[name](folder)
    complete = name != "cifar10" or (len(data.train), len(data.test)) == CIFAR10_COUNTS
    return _from_images(name if complete else "cifar10-subset", data)


def _from_images(name: str, data: image_files.Images) -> Dataset:
    def tensor(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.require(array, requirements=["C", "W"]))

    train, test = tensor(data.train), tensor(data.test)
    labels = {"train_labels": tensor(data.train_labels), "test_labels": tensor(data.test_labels)}
    return make_dataset(name, IMAGE_LEVELS, train, test, **labels)


@lru_cache(maxsize=32)
def _level_edges(levels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of ``dtype`` in each level [2k/levels - 1, 2(k+1)/levels - 1); both (levels,).

    The edges 2k/17 - 1 are not floating-point numbers; deciding with rational arithmetic once makes both directions
    exact.
    """
    kind = np.float64 if dtype == torch.float64 else np.float32
    lower = np.empty(levels + 1, dtype=kind)
    for k in range(levels + 1):
        edge = Fraction(2 * k, levels) - 1
        value = kind(float(edge))
        while Fraction(float(value)) < edge:
            value = np.nextafter(value, kind(np.inf))
        while Fraction(float(np.nextafter(value, kind(-np.inf)))) >= edge:
            value = np.nextafter(value, kind(-np.inf))
        lower[k] = value
    upper = np.nextafter(lower[1:], kind(-np.inf))
    return torch.from_numpy(lower[:-1]).to(device), torch.from_numpy(upper).to(device)


def _check_levels(levels: int) -> None:
    if not 2 <= levels <= 256:
        raise InputError(f"levels: {levels} is not accepted; an uint8 image has between 2 and 256 levels")


def dequantise(images: Tensor, uniform: Tensor, levels: int) -> Tensor:
    """Uniform dequantisation: x = 2 (k + u) / levels - 1 in [-1, 1), in the type of ``uniform`` (float32 or float64).

    ``images`` uint8 with values below ``levels``, ``uniform`` of the same shape in [0, 1). Where rounding would carry k
    + u to the next level (u = 1 - 2**-24 on k = 255), the largest number of level k is given, so
    ``quantise(dequantise(k, u)) == k`` always.
    """
    _check_levels(levels)
    if images.shape != uniform.shape:
        raise InputError(f"uniform: shape {tuple(uniform.shape)} differs from the images' shape {tuple(images.shape)}")
    if uniform.dtype not in (torch.float32, torch.float64):
        raise InputError(f"uniform: type {uniform.dtype} is not accepted; use float32 or float64")
    lower, upper = _level_edges(levels, uniform.dtype, uniform.device)
    index = images.to(uniform.device).long()
    x = (index + uniform) * (2.0 / levels) - 1.0
    return torch.minimum(torch.maximum(x, lower[index]), upper[index])


def quantise(x: Tensor, levels: int) -> Tensor:
    """Inverse of ``dequantise``: uint8 floor((x + 1) levels / 2), clipped to the levels; x of any shape.

    The one function that turns samples into pixels. Raises InputError on NaN.
    """
    _check_levels(levels)
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    if torch.isnan(x).any():
        raise InputError(f"quantise: {int(torch.isnan(x).sum())} of {x.numel()} values are NaN; pixels need numbers")
    lower, _ = _level_edges(levels, x.dtype, x.device)
    return torch.bucketize(x.contiguous(), lower[1:], right=True).to(torch.uint8)


def bits_per_dim(nats: Number, dims: int, levels: int, data_range: float = 2.0) -> Number:
    """Bits/dim of the discrete data from the ``nats`` per image of a continuous density.

    nats / (dims ln 2) + log2(levels / data_range), for levels spread evenly over an interval of length ``data_range``.

    The second term is 7 for 256 levels scaled to [-1, 1] and 3.087 for the digits' 17 levels.
    """
    return nats / (dims * math.log(2)) + math.log2(levels / data_range)
