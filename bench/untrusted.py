"""Guards for input that came from elsewhere: what it unpacks to, networks without end, pickles without end.

Readers that execute nothing can still be made to fill memory, or to compute for ever, by a small file.
"""

from __future__ import annotations

import lzma
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from bench.errors import InputError

# what a file may unpack to: this many bytes, or this multiple of its own size where that is more
UNPACKED = 256 * 2**20
RATIO = 50  # images and arrays stay below a tenth of it
MOST_MODULES = 20_000  # the largest network of the suites has some thousands
MOST_PARAMETERS = 10**10
LZMA_MEMORY = 256 * 2**20  # bytes; `xz -9` asks for 64 MiB
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_STORE = ("PUT", "BINPUT", "LONG_BINPUT")
_FETCH = ("GET", "BINGET", "LONG_BINGET")


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int = -1, /) -> bytes: ...


def most_unpacked(stored: int) -> int:
    """Bytes that a file of ``stored`` bytes may unpack to."""
    return max(UNPACKED, RATIO * stored)


class Bounded:
    """A stream of unpacked bytes of ``source``; InputError once it gave more than ``limit`` of them."""

    def __init__(self, stream: Readable, limit: int, source: str) -> None:
        self._stream, self._limit, self._source, self._seen = stream, limit, source, 0

    def read(self, size: int = -1) -> bytes:
        """The next ``size`` bytes, fewer at the end; all that is left for -1."""
        content = self._stream.read(self._limit - self._seen + 1 if size < 0 else size)
        self._seen += len(content)
        if self._seen > self._limit:
            raise InputError(
                f"{self._source}: unpacks to more than {self._limit} bytes; accepted: at most {RATIO} times its size"
            )
        return content


class XzStream:
    """Unpacked bytes of an .xz stream, within ``LZMA_MEMORY``: the format lets a file of bytes ask for gigabytes."""

    def __init__(self, stream: Readable) -> None:
        self._stream, self._unpacker, self._ahead = stream, self._new(), b""

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY)

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes; b"" at the end. LZMAError where the stream is damaged, EOFError where it breaks off."""
        while True:
            if self._unpacker.eof:
                # `cat a.xz b.xz` is one file; padding between the two is zeros
                self._ahead = self._unpacker.unused_data.lstrip(b"\0") or self._stream.read(2**16).lstrip(b"\0")
                if not self._ahead:
                    return b""
                self._unpacker = self._new()
            if self._unpacker.needs_input and not self._ahead:
                self._ahead = self._stream.read(2**16)
                if not self._ahead:
                    raise EOFError("the compressed stream breaks off")
            content = self._unpacker.decompress(self._ahead, size)
            self._ahead = b""
            if content:
                return content


def check_zip(path: Path, stored_only: bool = False) -> list[zipfile.ZipInfo]:
    """The members of a zip archive; InputError for one that is damaged, names a member twice or unpacks to too much.

    ``stored_only``: no member may be compressed at all.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # a damaged directory may raise anything
        raise InputError(f"{path}: damaged zip archive ({_reason(error)}); accepted: an intact one") from error
    names = [member.filename for member in members]
    repeated = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if repeated is not None:
        raise InputError(f"{path}: holds {repeated!r} twice; accepted: once")
    compressed = next((name.filename for name in members if name.compress_type != zipfile.ZIP_STORED), None)
    if stored_only and compressed is not None:
        raise InputError(f"{path}: {compressed!r} is compressed, as torch.save writes none; accepted: stored members")
    size, most = sum(member.file_size for member in members), most_unpacked(path.stat().st_size)
    if size > most:
        raise InputError(f"{path}: unpacks to {size} bytes; accepted: at most {most}, {RATIO} times its size")
    return members


def check_pickle(content: bytes) -> None:
    """Raise UnpicklingError for a pickle that a reader with a closed list of names could still not get through.

    The C reader allocates its memo up to any index that it is told; and a tuple of a tuple of ..., each twice, takes
    2**n steps to hash when it is made the key of a mapping. No file of images or weights needs either.
    """
    tuples: set[Any] = set()
    memo, last = 0, ""
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in _STORE or name == "MEMOIZE":
            index = memo if name == "MEMOIZE" else argument
            if not 0 <= index <= len(content):
                raise pickle.UnpicklingError(f"a memo of {index} entries")
            memo += 1
            (tuples.add if last in _TUPLES else tuples.discard)(index)
        elif name == "DUP" or (name in _FETCH and argument in tuples):
            raise pickle.UnpicklingError("a tuple is used twice")
        last = name


@contextmanager
def bounded_modules() -> Iterator[None]:
    """A block that builds a network; ValueError beyond ``MOST_MODULES`` modules, before they take the time to build."""
    from torch.nn.modules.module import register_module_module_registration_hook

    left = MOST_MODULES

    def seen(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"has more than {MOST_MODULES} layers; accepted: fewer")

    handle = register_module_module_registration_hook(seen)
    try:
        yield
    finally:
        handle.remove()


def check_parameters(module: Any, most: int = MOST_PARAMETERS) -> None:
    """ValueError for a network of more than ``most`` numbers; it may lie on the device "meta"."""
    numbers = sum(tensor.numel() for tensor in module.state_dict().values())
    if numbers > most:
        raise ValueError(f"has {numbers} numbers; accepted: at most {most}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
