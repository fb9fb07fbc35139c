"""Atomic writes and strict JSON: a reader never sees half a file, and NaN never reaches a result."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# what atomic_path, and the writing of weights, leave behind when the process is killed
TEMPORARY = re.compile(r"\..+\.writing-[a-z0-9_]{8}(\.\w+)?")
HASH_KEY = "sha256"


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside ``path``; publish it by one rename when the block ends without an error."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.writing-", suffix=path.suffix)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        # mkstemp makes the file private; a published result has ordinary permissions
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        # one of writing says only "No space left on device"
        if error.errno is None or error.filename not in (None, name):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def sweep_temporary(folder: Path) -> None:
    """Remove what killed processes left half written in and below ``folder``; the caller holds it against others."""
    for path in folder.rglob(".*"):
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def write_bytes_atomic(path: Path | str, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves either the old file or the new one."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text_atomic(path: Path | str, text: str) -> None:
    """Write UTF-8 ``text`` to ``path`` atomically."""
    write_bytes_atomic(path, text.encode())


def json_text(value: Any) -> str:
    """Strict JSON as it is written to files; NaN and infinity raise ValueError: a status must stand in their place."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_json(path: Path | str, value: Any) -> None:
    """Write strict JSON, see :func:`json_text`."""
    write_text_atomic(path, json_text(value))


def read_json(path: Path | str) -> Any:
    """Read one JSON file; a damaged one raises ValueError that names it."""
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and deep nesting too
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def file_hash(path: Path | str) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_hashed_json(path: Path | str, value: dict[str, Any]) -> None:
    """Write strict JSON with the hash of its own content under "sha256"."""
    # what comes back from the file is what is hashed: keys as text, tuples as lists
    content = json.loads(json.dumps(value, allow_nan=False))
    write_json(path, content | {HASH_KEY: content_hash(content)})


def read_hashed_json(path: Path | str) -> dict[str, Any]:
    """What :func:`write_hashed_json` was given; ValueError, which names the file, where the content is another."""
    content = read_json(path)
    wanted = content.pop(HASH_KEY, None) if isinstance(content, dict) else None
    if wanted is None:
        raise ValueError(f"{path}: carries no hash of its content")
    if content_hash(content) != wanted:
        raise ValueError(f"{path}: its content differs from its hash")
    return content


def content_hash(value: Any) -> str:
    """sha256, hex, of JSON data in canonical form: sorted keys, no blanks."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
