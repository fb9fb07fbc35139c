"""Image files on disk -> uint8 arrays: official CIFAR-10, .npz, folders and archives of PNG or JPEG files.

Nothing here executes what it reads: pickles go through a closed list of names (``bench.cifar``), ``.npz`` files are
opened with ``allow_pickle=False``, archives are read in memory and never unpacked.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from bench import cifar
from bench.errors import InputError
from bench.files import atomic_path
from bench.untrusted import RATIO, Bounded, XzStream, check_zip, most_unpacked

SUFFIXES = (".png", ".jpg", ".jpeg")
MODES = ("RGB", "L")
ARRAYS = ("train_images", "test_images", "train_labels", "test_labels")  # of an .npz file
TEST_EVERY = 10  # in a folder without a split, every tenth image in name order is a test image
LARGEST_FILE = 64 * 2**20  # bytes of one image file
LARGEST_IMAGE = 2**24  # pixels
MOST_CLASSES = 10_000


@dataclass(frozen=True)
class Images:
    """A split of decoded images, ``train`` and ``test`` uint8 (N, C, H, W); labels int64 (N,) or None."""

    train: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray | None = None
    test_labels: np.ndarray | None = None


def read_cifar10(root: Path) -> Images:
    """CIFAR-10's own pixels, from the first of the four accepted entries that exists under ``root``."""
    readers: dict[str, Callable[[Path], Images]] = {
        "cifar-10-batches-py": lambda path: _from_official(cifar.read_folder(path)),
        "cifar-10-python.tar.gz": lambda path: _from_official(cifar.read_archive(path)),
        "cifar10.npz": read_npz,
        "cifar10-raw-subset.npz": read_npz,
    }
    return _first(
        root, "cifar10", readers, "the official Python version from https://www.cs.toronto.edu/~kriz/cifar.html"
    )


def read_cifar10_jpeg(root: Path) -> Images:
    """CIFAR-10 compressed again as JPEG, from the folder cifar10-jpeg/ or the archive cifar10-jpeg.tar.xz."""
    readers: dict[str, Callable[[Path], Images]] = {"cifar10-jpeg": read_folder, "cifar10-jpeg.tar.xz": read_archive}
    return _first(root, "cifar10-jpeg", readers, "images as train/<class>/*.jpg and test/<class>/*.jpg")


def read_cifar10_16(root: Path) -> Images:
    """The JPEG set averaged over blocks of 2x2 pixels to 16x16."""
    images = read_cifar10_jpeg(root)
    return Images(halve(images.train), halve(images.test), images.train_labels, images.test_labels)


def halve(images: np.ndarray) -> np.ndarray:
    """Mean of each 2x2 block, rounded half up: uint8 (N, C, H, W) -> uint8 (N, C, H/2, W/2)."""
    if images.shape[2] % 2 or images.shape[3] % 2:
        raise InputError(
            f"images: {images.shape[2]}x{images.shape[3]} pixels cannot be halved; both sides must be even"
        )
    wide = images.astype(np.uint16)
    total = wide[:, :, ::2, ::2] + wide[:, :, 1::2, ::2] + wide[:, :, ::2, 1::2] + wide[:, :, 1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


def _first(root: Path, name: str, readers: dict[str, Callable[[Path], Images]], source: str) -> Images:
    for entry, reader in readers.items():
        path = root / entry
        if path.exists():
            return reader(path)
    raise InputError(
        f"dataset {name}: nothing found under {root}; put one of {', '.join(readers)} there ({source}), "
        "or name another folder by INDM_BENCH_DATA"
    )


def _from_official(parts: tuple[cifar.Arrays, cifar.Arrays]) -> Images:
    (train, train_labels), (test, test_labels) = parts
    return Images(train, test, train_labels, test_labels)


def read_npz(path: Path) -> Images:
    """Read ``train_images`` and ``test_images``, uint8 (N, H, W, C), and their labels where present.

    Labels that are not one integer per image are left out with a warning: no likelihood and no distance needs them.
    """
    try:
        check_zip(path)
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = {key: file[key] for key in file.files if key in ARRAYS}
    except Exception as error:  # a damaged array may raise anything
        reason = _one_line(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: not a readable .npz file of plain arrays ({reason})") from error
    arrays, labels = [], []
    for part in ("train", "test"):
        key = f"{part}_images"
        if key not in found:
            raise InputError(f"{path}: no array {key!r}; expected train_images, test_images and, if any, their labels")
        array = found[key]
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or not array.size:
            raise InputError(f"{path}: {key} is {array.dtype} {array.shape}; expected uint8 (N, height, width, 1 or 3)")
        arrays.append(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))
        labels.append(_labels(found.get(f"{part}_labels"), len(array), f"{path}: {part}_labels"))
    if arrays[0].shape[1:] != arrays[1].shape[1:]:
        raise InputError(f"{path}: train images are {arrays[0].shape[1:]} but test images {arrays[1].shape[1:]}")
    return Images(*arrays, *labels)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _labels(labels: np.ndarray | None, count: int, source: str) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        problem = f"is {labels.dtype} {labels.shape}, not integers ({count},)"
    elif not np.all((labels >= 0) & (labels < MOST_CLASSES)):
        problem = f"holds a number outside 0..{MOST_CLASSES - 1}"
    else:
        return labels.astype(np.int64)
    warnings.warn(f"{source} {problem}; labels left out", stacklevel=2)
    return None


def read_folder(folder: Path) -> Images:
    """Read PNG and JPEG files below ``folder``: train/ and test/, or any layout, then split by name.

    Without train/ and test/, every tenth image in the order of names is a test image. Decoded pixels are cached beside
    the folder under the hash of all names and contents. Raises InputError naming the file that cannot be used.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder of images; accepted: train/ and test/ with PNG or JPEG files, or the files alone"
        )
    paths = sorted(
        (name, path)
        for path in folder.rglob("*")
        if _is_image(name := path.relative_to(folder).as_posix()) and path.is_file()
    )
    digest = hashlib.sha256()
    for name, path in paths:
        digest.update(os.fsencode(f"{name}:") + hashlib.sha256(_read(path)).digest())

    def decode() -> Images:
        bar = tqdm(paths, desc=f"decoding {folder.name}", unit="image", disable=None, leave=False)
        stored = sum(path.stat().st_size for _, path in paths)
        return _assemble(((name, _decode(_read(path), str(path))) for name, path in bar), folder, stored)

    return _cached(folder, digest.hexdigest(), decode)


def _is_image(name: str) -> bool:
    """Whether a relative name ends like an image and neither it nor a folder above it is hidden."""
    return name.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in PurePosixPath(name).parts)


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > LARGEST_FILE:
        raise InputError(f"{path}: larger than {LARGEST_FILE} bytes; accepted: images below that")
    return content


def read_archive(path: Path) -> Images:
    """Read a .tar.xz archive of images in memory; the same layouts, order and cache as ``read_folder``."""
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    stored = path.stat().st_size

    def images() -> Iterator[tuple[str, np.ndarray]]:
        try:
            with open(path, "rb") as packed, _tar(packed, path, stored) as archive:
                for member in tqdm(archive, desc=f"decoding {path.name}", unit="image", disable=None, leave=False):
                    name = member.name.removeprefix("./")
                    if member.isfile() and _is_image(name):
                        if member.size > LARGEST_FILE:
                            raise InputError(f"{path}: {name} has {member.size} bytes; accepted: up to {LARGEST_FILE}")
                        stream = archive.extractfile(member)
                        yield name, _decode(stream.read() if stream else b"", f"{path}: {name}")
        except InputError:
            raise
        except Exception as error:  # a damaged header may raise anything
            raise InputError(f"{path}: damaged archive ({_one_line(error)}); copy it again") from error

    return _cached(path, digest, lambda: _assemble(images(), path, stored))


def _tar(packed: BinaryIO, path: Path, stored: int) -> tarfile.TarFile:
    return tarfile.open(fileobj=Bounded(XzStream(packed), most_unpacked(stored), str(path)), mode="r|")


def _decode(content: bytes, source: str) -> tuple[str, np.ndarray]:
    """Decode one file: its mode and its pixels, uint8 (3, H, W); grey images are repeated to three channels."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            mode, size = image.mode, image.size
            if mode not in MODES:
                raise InputError(f"{source}: image mode {mode} is not accepted; convert it to 8-bit RGB or grey")
            if size[0] * size[1] > LARGEST_IMAGE:
                raise InputError(f"{source}: {size[0]}x{size[1]} pixels; accepted: at most {LARGEST_IMAGE}")
            if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
                raise InputError(f"{source}: an animation of {image.n_frames} pictures; accepted: one picture a file")
            pixels = np.asarray(image.convert("RGB"))
    except InputError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"{source}: not a readable PNG or JPEG image") from error
    return mode, pixels.transpose(2, 0, 1)


def _assemble(items: Iterator[tuple[str, tuple[str, np.ndarray]]], source: Path, stored: int) -> Images:
    decoded: dict[str, np.ndarray] = {}
    first: tuple[str, str, tuple[int, ...]] | None = None
    for name, (mode, pixels) in items:
        first = first or (name, mode, pixels.shape)
        if (mode, pixels.shape) != first[1:]:
            raise InputError(
                f"{source}: {name} is {mode} {pixels.shape[2]}x{pixels.shape[1]} but {first[0]} is {first[1]} "
                f"{first[2][2]}x{first[2][1]}; all images must share one mode and size"
            )
        decoded[name] = pixels
        if len(decoded) * pixels.nbytes > most_unpacked(stored):
            raise InputError(f"{source}: {stored} bytes unpack to over {RATIO} times as much; accepted: less")
    names = sorted(decoded)
    if len(names) < 2:
        raise InputError(
            f"{source}: {len(names)} PNG or JPEG images found; accepted: train/ and test/, or at least 2 images"
        )
    parts = _split(names, source)
    classes = sorted({label for name in names if (label := _class(name, parts)) is not None})
    labelled = len(classes) > 1 and all(_class(name, parts) is not None for name in names)
    arrays, labels = [], []
    for part in ("train", "test"):
        chosen = [name for name in names if parts[name] == part]
        arrays.append(np.stack([decoded[name] for name in chosen]))
        labels.append(
            np.array([classes.index(_class(name, parts)) for name in chosen], dtype=np.int64) if labelled else None
        )
    return Images(*arrays, *labels)


def _split(names: list[str], source: Path) -> dict[str, str]:
    """Part of each image: the folder train or test that it lies in, or by its number where there are none."""
    found = {
        name: next((part for part in PurePosixPath(name).parts[:-1] if part in ("train", "test")), None)
        for name in names
    }
    present = set(found.values())
    if present == {None}:
        return {name: "test" if index % TEST_EVERY == 0 else "train" for index, name in enumerate(names)}
    if present != {"train", "test"}:
        stray = next((name for name in names if found[name] is None), None)
        problem = f"{stray} lies in neither" if stray else f"only {present.pop()}/ has images"
        raise InputError(f"{source}: {problem}; accepted: both train/ and test/ with images, or neither")
    return {name: part for name, part in found.items() if part}


def _class(name: str, parts: dict[str, str]) -> str | None:
    """The class of an image: the folder just below train/ or test/, or None."""
    folders = PurePosixPath(name).parts[:-1]
    below = folders[folders.index(parts[name]) + 1 :] if parts[name] in folders else folders
    return below[0] if below else None


def _cached(source: Path, digest: str, decode: Callable[[], Images]) -> Images:
    """Images of ``source`` from ``<source>.decoded-<hash>.npz`` beside it, made if absent and the place is writable."""
    source = source.resolve()
    if not source.name:
        return decode()  # nothing lies beside the root
    path = source.with_name(f"{source.name}.decoded-{digest[:16]}.npz")
    if path.is_file():
        # a damaged cache is made again
        with suppress(Exception), open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            check_zip(path)
            labels = [file[key] if key in file.files else None for key in ("train_labels", "test_labels")]
            return _checked(Images(file["train"], file["test"], *labels))
    images = decode()
    if not source.parent.stat().st_mode & 0o222:  # a folder marked read-only stays untouched, even by root
        return images
    # a full disk only costs the next reader some time
    with suppress(OSError), atomic_path(path) as temporary:
        np.savez(temporary, **{key: value for key, value in vars(images).items() if value is not None})
    return images


def _checked(images: Images) -> Images:
    """The images of a cache as ``_assemble`` would have made them; ValueError for others."""
    for pixels, labels in ((images.train, images.train_labels), (images.test, images.test_labels)):
        fits = pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.size
        if not fits or not (labels is None or (labels.dtype == np.int64 and labels.shape == pixels.shape[:1])):
            raise ValueError("not a cache of images")
    if images.train.shape[1:] != images.test.shape[1:]:
        raise ValueError("not a cache of images")
    return images
