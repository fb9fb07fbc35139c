"""Ending on request: a signal or a spent budget of time sets a flag, which long work reads where it can be resumed.

Training then writes a checkpoint, evaluation drops the run in hand, no further run is begun, and the command ends with
exit code 75 (EX_TEMPFAIL of sysexits.h): stopped on request, all finished work is kept, the same command continues.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# exit code of a command that was asked to stop before its work was done
EXIT_CODE = 75
# SIGUSR1 is what Slurm's --signal=USR1@SECONDS sends ahead of the end of a job
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# one request may arrive twice, from the scheduler and from a launcher that passes it on
ECHO_SECONDS = 1.0

_handlers: dict[int, object] = {}
_reason: str | None = None
_asked_at: float | None = None
_deadline: float | None = None
_patient = False


class Stopped(RuntimeError):
    """Work was ended on request before it was done; the message is the reason."""


def install(patient: bool = False) -> None:
    """From now on SIGTERM, SIGINT and SIGUSR1 only set the flag that :func:`requested` reads.

    A second SIGTERM or SIGINT, later than a second after the first, ends the process as if there were no handler;
    ``patient``: no signal does, because another process sees to the end of this one. Without effect outside the main
    thread, where Python allows no handlers, and when called again.
    """
    global _patient
    _patient = patient
    if _handlers or threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        _handlers[number] = signal.signal(number, _receive)


def restore() -> None:
    """Take back the handlers, a request and a deadline."""
    global _reason, _asked_at, _deadline
    _reason = _asked_at = _deadline = None
    if threading.current_thread() is threading.main_thread():
        while _handlers:
            signal.signal(*_handlers.popitem())


@contextmanager
def stoppable() -> Iterator[None]:
    """A block in which signals only set the flag; handlers, request and deadline are gone afterwards."""
    install()
    try:
        yield
    finally:
        restore()


def set_deadline(seconds: float | None) -> None:
    """Ask for an end once this much wall time has passed from now on (None: never); the system's clock may be moved."""
    global _deadline
    _deadline = None if seconds is None else time.monotonic() + seconds


def remaining() -> float | None:
    """Seconds up to the deadline, negative when it has passed; None without one."""
    return None if _deadline is None else _deadline - time.monotonic()


def request(reason: str) -> None:
    """Ask for an end as a signal does; the first reason is kept."""
    global _reason, _asked_at
    if _reason is None:
        _reason, _asked_at = reason, time.monotonic()


def requested() -> str | None:
    """Why the work is to end: the name of the signal, or "time is up"; None to go on. Cheap enough for every step."""
    if _reason is None and _deadline is not None and time.monotonic() >= _deadline:
        request("time is up")
    return _reason


def check() -> None:
    """Raise Stopped if an end was asked for."""
    reason = requested()
    if reason is not None:
        raise Stopped(reason)


def _receive(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    again = _asked_at is not None and time.monotonic() - _asked_at > ECHO_SECONDS
    if again and not _patient and number != signal.SIGUSR1:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    request(name)
