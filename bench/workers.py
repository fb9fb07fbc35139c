"""The cells of a stage side by side, each in a process of its own: one that fails or is killed loses no other.

Processes are forked from a server that has imported the heavy packages once. Each runs on one thread, which makes a
result independent of how many run at once, and on a CPU is faster than one process on several threads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import stopping
from bench.errors import InputError, RunFailure

# what a stage's runs import, so that the server does it once for all
PRELOAD = {
    "train": ["models.registry", "bench.train", "bench.evaluate", "pandas"],
    "evaluate": ["models.registry", "bench.evaluate", "bench.pictures", "bench.features", "bench.fidelity", "pandas"],
}
LOG_TAIL = 4000
# how often a request to stop is looked for while the workers have nothing to say
POLL_SECONDS = 0.25
# how long workers that were asked to stop may take to write their checkpoints
GRACE_SECONDS = 60.0


@dataclass
class Cell:
    """One run of a stage: what came of it, and how far it is.

    ``shared``: all processes that work on the run know of the error.
    """

    label: str
    run: Any
    error: str | None = None
    bad_input: bool = False
    stopped: bool = False
    shared: bool = False
    log: str = ""
    fraction: float = 0.0
    process: Any = field(default=None, repr=False)


def stage_function(stage: str) -> Callable[..., None]:
    """The function of a stage, imported when it is needed; ``f(run)`` does the work or finds it done."""
    if stage == "train":
        from bench.train import train

        return train
    from bench.evaluate import evaluate

    return evaluate


def default_workers(cells: int, cores: int) -> int:
    """How many processes at once, so that no core idles in the last round: 3 cells share 2 cores from the start."""
    return max(1, min(cells, -(-cells // max(1, cells // cores))))


def start_server(stage: str) -> None:
    """Begin importing the stage's heavy packages in the fork server, while this process does other things."""
    from multiprocessing import forkserver

    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD[stage])
    forkserver.ensure_running()


def ask_server(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process forked from the server, so that this one need not import the same packages.

    An InputError raised there is raised here.
    """
    start_server(stage)
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(function, arguments, theirs, _roots()))
    process.start()
    theirs.close()
    try:
        kind, value = ours.recv()
    except EOFError:
        raise RuntimeError("the process that checks the configuration ended without a word") from None
    finally:
        process.join()
    if kind == "input":
        raise InputError(value)
    return value


def _answer(function: Callable[..., Any], arguments: Sequence[Any], channel: Connection, roots: dict[str, str]) -> None:
    os.environ.update(roots)
    try:
        channel.send(("done", function(*arguments)))
    except InputError as error:
        channel.send(("input", one_line(error)))


def _roots() -> dict[str, str]:
    """Where results go. The server keeps the environment of its start, so its children are told."""
    return {name: value for name, value in os.environ.items() if name.startswith("INDM_BENCH_")}


def run_here(stage: str, cells: Sequence[Cell]) -> None:
    """Run the cells one after the other in this process; those not done when an end is asked for are ``stopped``.

    Of several processes that share each run, one that fails alone begins no further cell: its launcher ends them all.
    """
    import torch

    from bench import sharding

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    work = stage_function(stage)
    sharding.join()
    broken = None
    for cell in cells:
        if broken:
            cell.error, cell.shared = f"not begun, since {broken} failed", True
            continue
        # the first of several processes decides for all whether to begin
        if sharding.on_main(stopping.requested):
            cell.stopped = True
            continue
        try:
            work(cell.run)
        except stopping.Stopped:
            cell.stopped = True
        except InputError as error:
            cell.error, cell.bad_input, cell.shared = one_line(error), True, True
        except RunFailure as error:
            cell.error, cell.shared = one_line(error), error.shared  # that line says it all
        except OSError as error:
            cell.error = one_line(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, the other cells go on
            cell.error, cell.log = one_line(error), traceback.format_exc()
        if cell.error and not cell.shared and sharding.team().size > 1:
            broken = cell.label  # the other processes may wait where this one will not come again


def run_beside(stage: str, cells: Sequence[Cell], workers: int) -> None:
    """Run the cells in ``workers`` processes at a time, under one progress line.

    When an end is asked for, the processes are told, and have GRACE_SECONDS for their checkpoints.
    """
    start_server(stage)
    context = multiprocessing.get_context("forkserver")
    waiting, working, told = list(cells), {}, None
    with tempfile.TemporaryDirectory() as folder, _bar(stage, len(cells)) as bar:
        try:
            while waiting or working:
                if told is None and stopping.requested():
                    told = time.monotonic()
                    for cell, _ in working.values():
                        cell.process.terminate()
                if told is not None:
                    for cell in waiting:
                        cell.stopped = True
                    waiting.clear()
                    if time.monotonic() - told > GRACE_SECONDS:
                        break
                while waiting and len(working) < workers:
                    cell = waiting.pop(0)
                    ours, theirs = context.Pipe()
                    log = Path(folder) / f"{len(waiting)}.log"
                    cell.process = context.Process(
                        target=_work, args=(stage, cell.run, str(log), theirs, _roots(), stopping.remaining())
                    )
                    cell.process.start()
                    theirs.close()
                    working[ours] = (cell, log)
                for channel in wait(list(working), timeout=POLL_SECONDS):
                    cell, log = working[channel]
                    if not _receive(channel, cell):
                        _finish(cell, log)
                        del working[channel]
                        channel.close()
                bar.update(sum(cell.fraction for cell in cells) - bar.n)
        finally:
            for cell, _ in working.values():
                cell.process.kill()
                cell.stopped = told is not None


def _bar(stage: str, cells: int) -> tqdm:
    form = "{desc}: {percentage:3.0f}% of {total} runs |{bar:20}| {elapsed}, about {remaining} left"
    return tqdm(total=cells, desc=stage, bar_format=form, mininterval=1.0, maxinterval=5.0)


def _receive(channel: Connection, cell: Cell) -> bool:
    """Take one message; False when the worker has said its last."""
    try:
        kind, value = channel.recv()
    except (EOFError, OSError):
        # a worker may be told to stop before it can receive it
        cell.stopped = stopping.requested() is not None
        cell.error = None if cell.stopped else "the process ended without a word"
        return False
    if kind == "progress":
        # evaluation and training alike end with work that no bar counts
        cell.fraction = min(max(cell.fraction, value), 0.99)
        return True
    cell.stopped = kind == "stopped"
    if kind in ("input", "failed"):
        cell.error, cell.bad_input = value, kind == "input"
    return False


def _finish(cell: Cell, log: Path) -> None:
    cell.process.join()
    cell.fraction = 1.0
    if cell.error and not cell.bad_input:
        code = cell.process.exitcode
        if code and code < 0:
            cell.error = f"killed by signal {-code}"
        with contextlib.suppress(OSError):
            cell.log = log.read_text(errors="replace")[-LOG_TAIL:]


def _work(
    stage: str, run: Any, log: str, channel: Connection, roots: dict[str, str], seconds: float | None = None
) -> None:
    """A worker's whole life; ``seconds`` are left of the command's budget of time."""
    stopping.install(patient=True)
    stopping.set_deadline(seconds)
    os.environ.update(roots)
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(handle, 1), os.dup2(handle, 2)
    threading.Thread(target=_end_with_parent, args=(channel,), daemon=True).start()

    import torch

    from bench.progress import report_to

    torch.set_num_threads(1)
    report_to(lambda done, total: channel.send(("progress", done / total if total else 0.0)))
    try:
        stage_function(stage)(run)
    except stopping.Stopped as error:
        channel.send(("stopped", str(error)))
    except InputError as error:
        channel.send(("input", one_line(error)))
    except (RunFailure, OSError) as error:
        channel.send(("failed", one_line(error)))
    except Exception as error:  # noqa: BLE001 - told to the parent
        traceback.print_exc()
        sys.stderr.flush()
        channel.send(("failed", one_line(error)))
    else:
        channel.send(("done", None))


def _end_with_parent(channel: Connection) -> None:
    """The parent never speaks; the pipe turns readable only when it has died."""
    with contextlib.suppress(OSError):
        channel.poll(None)
    os._exit(1)


def one_line(error: BaseException) -> str:
    """An exception's message on one line, its type where there is no message."""
    return " ".join(str(error).split()) or type(error).__name__
