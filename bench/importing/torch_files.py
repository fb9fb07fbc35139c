"""PyTorch files read as data: tensors, numbers, text, lists and mappings. Nothing in a file is executed."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.errors import InputError
from bench.untrusted import check_pickle, check_zip

LONGEST_REASON = 160


def read_torch_file(path: Path) -> dict[str, Any]:
    """The mapping that ``torch.save`` wrote to ``path``, tensors on the CPU and read from the disk as they are used.

    Only what `torch.load(weights_only=True)` admits by itself: classes that other packages have declared safe in this
    process are refused too. InputError, in one line, for anything else: a file that is missing or damaged, one of a
    PyTorch before 1.6 (which is not a zip archive), a pickle that asks for a class or a function, or no mapping.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; accepted: a checkpoint that torch.save wrote")
    if not _is_zip(path):
        raise InputError(
            f"{path}: not a zip archive as PyTorch writes since 1.6; accepted: the file saved again by torch.save there"
        )
    pickles = [member for member in check_zip(path, stored_only=True) if member.filename.endswith("data.pkl")]
    try:
        with zipfile.ZipFile(path) as archive:
            for member in pickles:
                check_pickle(archive.read(member))
        with _nothing_declared_safe():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive may raise anything; nothing of it has been executed
        raise InputError(f"{path}: refused ({_reason(error)}); accepted: tensors and plain data only") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; accepted: a mapping of names to values")
    _check_tensors(path, content)
    return content


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # its end says that it is one of several files
        return False


def _check_tensors(path: Path, content: Any) -> None:
    """Refuse tensors that are more than the file: views of one number as a billion, sparse ones, those of no memory."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                shape = list(value.shape)
                raise InputError(f"{path}: lacks numbers of a tensor of shape {shape}; accepted: files that hold all")
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value


@contextmanager
def _nothing_declared_safe() -> Iterator[None]:
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(declared)


def _reason(error: Exception) -> str:
    """What the loader minded, without its page of advice."""
    text = " ".join(str(error).split())
    wanted = re.search(r"GLOBAL ([\w.]+)", text)
    if wanted:
        return f"it asks for {wanted[1]}, which no checkpoint of weights needs"
    said = text.partition("WeightsUnpickler error: ")[2] or text or type(error).__name__
    return said if len(said) <= LONGEST_REASON else said[: LONGEST_REASON - 3] + "..."
