"""What every fuzzed case must keep to: it ends in success or in one refusal, in time and within 2 GiB.

Cases run in this process, through the functions whose InputError the command line turns into one line and exit code 2
(``bench.cli.execute``); any other exception is the traceback that a user would see, and fails the test.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - imported once, outside of the limits of a case
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import models.registry
import models.samplers  # noqa: F401
from bench.errors import InputError

sys.path.append(str(Path(__file__).parents[1]))  # the synthetic files of the other tests

ACCEPTED, REFUSED = "accepted", "refused"
MEMORY = 2 * 2**30  # bytes beyond those of the process as it was
SECONDS = 60.0
# cases of the cheapest kind; `pytest tests/fuzz --fuzz-examples N` asks for more
DEFAULT_EXAMPLES = 100
examples = DEFAULT_EXAMPLES
COUNTS: dict[str, Counter[str]] = {}


class Hang(BaseException):
    """A case took longer than SECONDS; no ``except Exception`` may catch it."""


def cases(share: float = 1.0) -> settings:
    """Settings of a property test that tries ``share`` of the number of cases asked for; the same ones every time."""
    usual = examples == DEFAULT_EXAMPLES
    return settings(
        max_examples=max(5, round(share * examples)),
        deadline=None,
        derandomize=usual,  # CI is the same every time, a longer run explores
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def attempt(kind: str, call: Callable[[], Any]) -> str:
    """Make one case of ``kind``: what came of it. Raises what a user would see as a traceback, and Hang."""
    try:
        with limited():
            call()
        result = ACCEPTED
    except InputError as error:
        assert str(error).strip(), "a refusal without a word"
        result = REFUSED
    count(kind, result)
    return result


def count(kind: str, result: str) -> None:
    """Note what came of a case."""
    COUNTS.setdefault(kind, Counter())[result] += 1


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """A block that raises Hang after ``seconds``, and in which the process may map at most MEMORY more."""

    def ring(number: int, frame: Any) -> None:
        raise Hang(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


# Values that configurations and results should not hold ------------------------------------------------------------

NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 7, 17, 2**31, 2**63, -(2**63), 10**12, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308]
    + [math.nan, math.inf, -math.inf, True, False]
)
TEXTS = st.sampled_from(
    ["", " ", "x" * 5000, "../../up", "/abs", "a/b", "\0", "\n", "null", "1e5", "<script>", "ü", "–", "|", "%s", "{x}"]
    + ["name", "exact", "residual", "vp", "indm", "ode", "fd", "classifier", "inception", "folder:", "folder:~nobody"]
)
SCALARS = NUMBERS | TEXTS | st.none()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS.filter(str.strip), inner, max_size=3),
    max_leaves=6,
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside plain data."""
    items: list[tuple[Any, Any]] = []
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))
    return [found for key, value in items for found in [(*path, key), *places(value, (*path, key))]]


def changed(content: Any, path: tuple[Any, ...], value: Any, how: str = "set") -> Any:
    """A copy of plain data with the value at ``path`` replaced ("set"), taken out ("drop") or given a neighbour."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    key = path[0]
    if len(path) > 1:
        copy[key] = changed(copy[key], path[1:], value, how)
    elif how == "drop":
        del copy[key]
    elif how == "add" and isinstance(copy, dict):
        copy[value if isinstance(value, str) and value else "added"] = value
    else:
        copy[key] = value
    return copy


@st.composite
def mutated(draw: st.DrawFn, content: Any, most: int = 2) -> Any:
    """Plain data with a few values replaced, removed or added."""
    for _ in range(draw(st.integers(1, most))):
        found = places(content)
        if not found:
            break
        content = changed(content, draw(st.sampled_from(found)), draw(VALUES), draw(st.sampled_from(["set"] * 4 + HOW)))
    return content


HOW = ["drop", "add"]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut off, flipped, doubled or overwritten; sometimes bytes of no form at all."""
    kind = draw(st.sampled_from(["cut", "flip", "flip", "overwrite", "insert", "empty", "noise"]))
    if kind == "empty" or not content:
        return b""
    if kind == "noise":
        return draw(st.binary(max_size=200))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "cut":
        return content[:place]
    if kind == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=40)) + content[place:]
    if kind == "overwrite":
        patch = draw(st.sampled_from([b"\0" * 64, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\0", b"9" * 12]))
        return content[:place] + patch + content[place + len(patch) :]
    flipped = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        flipped[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(flipped)
