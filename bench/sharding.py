"""Several processes that share one evaluation: who does which batch, and how the results meet.

Work is dealt out in whole batches, batch k to process k mod n: a batch holds the same images on any number of
processes, so results are equal bit for bit wherever the arithmetic of a batch is. All communication is one kind of
message from every process to every other, which carries a status: what fails in one process is told to the others at
their next message, wherever that is. In a single process nothing of this acts.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bench.errors import InputError, RunFailure
from bench.stopping import Stopped

Arrays = Mapping[str, np.ndarray]
Value = TypeVar("Value")

# processes wait for one another while the first computes statistics or studies; a dead one ends all through torchrun
PATIENCE = timedelta(days=2)
# bytes of one collective: what a process buffers for each other one
CHUNK = 2**26

_groups: dict[Any, Any] = {}
_alone = False


class PeerFailed(RunFailure):
    """Another process failed; the message is its own."""


# what the others raise as it is; of anything else they raise PeerFailed
_AS_IT_IS = (InputError, Stopped)


@dataclass(frozen=True)
class Team:
    """The processes that work together: this one's number and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0


def team() -> Team:
    """The processes that torch.distributed has joined; one where it has joined none, or within :func:`on_main`."""
    if _alone or not (dist.is_available() and dist.is_initialized()):
        return Team()
    return Team(dist.get_rank(), dist.get_world_size())


def join() -> None:
    """Join the processes that torchrun or `accelerate launch` started, if there are several and they have not yet."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """The device of this process: the GPU of its number on its machine, where there are GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if team().size > 1:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def session() -> Iterator[None]:
    """A block that all processes enter and leave together: an exception in one ends it in all; blocks may be nested.

    The others raise PeerFailed, or InputError or Stopped where it was one.
    """
    if team().size == 1:
        yield
        return
    try:
        yield
    except BaseException as error:
        if not was_told(error):
            # the connection may be gone with the process that failed
            with contextlib.suppress(Exception):
                _exchange(b"", error)
            _mark_told(error)
        raise
    _exchange(b"")


def was_told(error: BaseException) -> bool:
    """Whether all processes know of an exception, because a session ended with it."""
    return getattr(error, "told_to_all", False)


def _mark_told(error: BaseException) -> None:
    error.told_to_all = True


def spread(
    count: int, work: Callable[[int], Arrays], failures: Sequence[type[Exception]] = (), main_only: bool = False
) -> list[Arrays]:
    """[work(0), ..., work(count - 1)], each computed by one of the processes, in each of them.

    An exception of ``failures`` belongs to the result: the one of the lowest k is raised in every process, as it would
    be in one. ``main_only``: the other processes get an empty list, which spares them the memory.
    """
    now = team()
    if now.size == 1:
        return [work(k) for k in range(count)]
    done: dict[str, np.ndarray] = {}
    failure = None
    for k in range(now.rank, count, now.size):
        try:
            done |= {f"{k}/{name}": value for name, value in work(k).items()}
        except tuple(failures) as error:
            failure = [k, next(i for i, kind in enumerate(failures) if isinstance(error, kind)), str(error)]
            break
    failed = [told for told in _all_json(failure) if told]
    if failed:
        _, kind, message = min(failed)
        raise failures[kind](message)
    found: list[dict[str, np.ndarray]] = [{} for _ in range(count)]
    for payload in _exchange(encode(done), main_only=main_only):
        for name, value in decode(payload).items():
            k, _, key = name.partition("/")
            found[int(k)][key] = value
    return found if now.main or not main_only else []


def on_main(work: Callable[[], Value]) -> Value:
    """What ``work()`` returns in the first process, in every one; the value must be JSON (NaN is allowed).

    Within ``work`` the process is on its own: nothing in it waits for the others.
    """
    global _alone
    now = team()
    if now.size == 1:
        return work()
    value = None
    if now.main:
        _alone = True
        try:
            value = work()
        finally:
            _alone = False
    return _all_json(value)[0]


def encode(arrays: Arrays) -> bytes:
    """Named arrays as the bytes of an .npz file, without pickled objects."""
    if any(value.dtype.hasobject for value in arrays.values()):
        raise TypeError("arrays of objects cannot be sent")
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def decode(payload: bytes) -> dict[str, np.ndarray]:
    """The arrays of :func:`encode`."""
    with np.load(io.BytesIO(payload), allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def _all_json(value: Any) -> list[Any]:
    return [json.loads(payload) for payload in _exchange(json.dumps(value).encode())]


def _group() -> Any:
    """A gloo group of all processes with much patience, made once for each initialisation of torch.distributed."""
    world = dist.group.WORLD
    if world not in _groups:
        _groups.clear()
        _groups[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _groups[world]


def _exchange(payload: bytes, error: BaseException | None = None, main_only: bool = False) -> list[bytes]:
    """The payloads of all processes, in their order; with ``main_only`` an empty list but in the first.

    ``error``: told to the others in place of the payload; they raise it. All processes must come here equally often.
    """
    now, group = team(), _group()
    if error is not None:
        said = " ".join(str(error).split()) or type(error).__name__
        kind = next((i for i, known in enumerate(_AS_IT_IS) if isinstance(error, known)), None)
        payload = json.dumps([kind, type(error).__name__, said]).encode()
    headers = [torch.zeros(2, dtype=torch.long) for _ in range(now.size)]
    dist.all_gather(headers, torch.tensor([error is not None, len(payload)]), group=group)
    failed = [rank for rank, header in enumerate(headers) if header[0]]
    sizes = [int(header[1]) for header in headers]
    payloads = _gather(payload, sizes, group, main_only and not failed)
    if failed and error is None:
        kind, name, said = json.loads(payloads[failed[0]])
        where = f"process {failed[0]} of {now.size}"
        raised = PeerFailed(f"{where}: {name}: {said}") if kind is None else _AS_IT_IS[kind](said)
        _mark_told(raised)
        raise raised
    return payloads


def _gather(payload: bytes, sizes: Sequence[int], group: Any, main_only: bool) -> list[bytes]:
    now, longest = team(), max(sizes)
    receives = now.main or not main_only
    pieces: list[list[bytes]] = [[] for _ in sizes]
    for first in range(0, longest, CHUNK):
        length = min(CHUNK, longest - first)
        own = torch.zeros(length, dtype=torch.uint8)
        part = payload[first : first + length]
        own[: len(part)] = torch.from_numpy(np.frombuffer(part, dtype=np.uint8).copy())
        into: list[Tensor] | None = [torch.empty_like(own) for _ in sizes] if receives else None
        if main_only:
            dist.gather(own, into, dst=0, group=group)
        else:
            dist.all_gather(into, own, group=group)
        for rank, received in enumerate(into or ()):
            pieces[rank].append(received.numpy().tobytes()[: max(sizes[rank] - first, 0)])
    return [b"".join(parts) for parts in pieces] if receives else []
