"""The one YAML reader and writer: YAML 1.2 (``1e-4`` is a number), duplicate keys refused, damage told in one line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from bench.errors import InputError


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 120
    return yaml


def parse_yaml(text: str, where: str) -> Any:
    """Read one YAML document; InputError names ``where``, the line and what is wrong with it."""
    try:
        return _yaml().load(text)
    except DuplicateKeyError as error:
        key = str(error.problem).split('"')[1] if '"' in str(error.problem) else "a key"
        raise InputError(f"{where}: line {error.problem_mark.line + 1}: {key!r} is given twice") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{where}: {line}not valid YAML ({error.problem or error.context})") from error
    except YAMLError as error:
        raise InputError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from error


def read_yaml(path: Path | str) -> Any:
    """Read one YAML file; a missing, unreadable or damaged one raises InputError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from error
    return parse_yaml(text, str(path))


def dump_yaml(value: Any) -> str:
    """Block-style YAML of plain dicts, lists and scalars, keys in their own order."""
    stream = io.StringIO()
    _yaml().dump(value, stream)
    return stream.getvalue()
