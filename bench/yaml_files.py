"""The one YAML reader and writer: YAML 1.2 (``1e-4`` is a number), duplicate keys refused, damage told in one line.

Tags build no objects, and aliases may not multiply a small text into a large value.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import Node, ScalarNode

from bench.errors import InputError

LARGEST_TEXT = 2**18  # bytes; the largest suite has 6 KB
MOST_VALUES = 20_000  # keys and values of a document, those behind an alias counted wherever it stands
DEEPEST = 50


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 120
    return yaml


def parse_yaml(text: str, where: str) -> Any:
    """Read one YAML document; InputError names ``where``, the line and what is wrong with it."""
    if len(text) > LARGEST_TEXT:
        raise InputError(f"{where}: {len(text)} characters; accepted: at most {LARGEST_TEXT}")
    try:
        if "*" in text:
            _check_aliases(_yaml().compose(text))
        return _yaml().load(text)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except DuplicateKeyError as error:
        key = str(error.problem).split('"')[1] if '"' in str(error.problem) else "a key"
        raise InputError(f"{where}: line {error.problem_mark.line + 1}: {key!r} is given twice") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{where}: {line}not valid YAML ({error.problem or error.context})") from error
    except YAMLError as error:
        raise InputError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise InputError(f"{where}: not valid YAML (nested too deeply)") from error
    except Exception as error:  # a tag beside a value of another kind may raise anything
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise InputError(f"{where}: not valid YAML (a value that does not fit its tag: {reason})") from error


def _check_aliases(root: Node | None) -> None:
    """InputError where aliases make a value too large to write out, or part of itself."""
    counts: dict[int, int] = {}

    def count(node: Node, depth: int) -> int:
        if isinstance(node, ScalarNode):
            return 1
        if id(node) not in counts:
            if depth > DEEPEST:
                raise InputError(f"nested too deeply; accepted: {DEEPEST} levels")
            counts[id(node)] = MOST_VALUES + 1  # what an alias inside of it finds
            parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            counts[id(node)] = 1 + sum(count(part, depth + 1) for part in parts)
        if counts[id(node)] > MOST_VALUES:
            raise InputError(f"its aliases stand for more than {MOST_VALUES} values; accepted: fewer")
        return counts[id(node)]

    if root is not None:
        count(root, 0)


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
