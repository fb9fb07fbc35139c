"""A suite in pieces of limited time: the budget of one piece, what is left of the suite, and about how many more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench.checkpoint import checkpoint_root, published
from bench.config import RunConfig
from bench.errors import InputError
from bench.files import read_json
from bench.finished import is_evaluated, is_trained

# of a piece, kept free at its end: the part in hand must end, and a checkpoint be written, before the limit
RESERVE_SHARE, RESERVE_SECONDS = 0.1, 45.0
# of a piece, gone before it computes anything new: packages, data, the first model
START_SECONDS = 15.0


def seconds_to_work(minutes: float) -> float:
    """Seconds after which a piece of ``minutes`` is asked to stop, so that it ends in good time; InputError."""
    if not (math.isfinite(minutes) and minutes > 0):
        raise InputError(f"--minutes {minutes:g}: accepted: a number above 0")
    limit = 60 * minutes
    return limit - min(RESERVE_SECONDS, RESERVE_SHARE * limit)


def pieces(seconds: float, minutes: float, workers: int = 1) -> int:
    """How many pieces of ``minutes`` hold ``seconds`` of work, shared by ``workers`` side by side."""
    useful = seconds_to_work(minutes)
    useful = max(useful - START_SECONDS, useful / 2)
    return math.ceil(seconds / max(1, workers) / useful)


@dataclass(frozen=True)
class Left:
    """What is left of some runs: those to train, those to evaluate, and seconds of work, None where nothing tells."""

    runs: int
    train: list[RunConfig]
    evaluate: list[RunConfig]
    seconds: float | None

    def describe(self, minutes: float | None = None, workers: int = 1) -> str:
        """One line: how many are done, and what the rest takes by the pace of those."""
        trained, evaluated = self.runs - len(self.train), self.runs - len(self.evaluate)
        said = f"{trained} of {self.runs} runs trained, {evaluated} evaluated"
        if not self.evaluate:
            return said
        if self.seconds is None:
            return f"{said}; how long the rest takes is not known yet"
        said += f"; about {math.ceil(self.seconds / max(1, workers) / 60)} minutes left"
        if minutes is None:
            return said
        count = pieces(self.seconds, minutes, workers)
        return f"{said}, {count} piece{'s' if count > 1 else ''} of {minutes:g} minutes"


def left_of(runs: Sequence[RunConfig]) -> Left:
    """What is left of the runs by their files alone.

    A run that is not done takes as long as the done ones of its variant and data set, else of its data set, else of
    all; one in the middle of training the rest of its steps at its own pace.
    """
    train = [run for run in runs if not is_trained(run)]
    waiting = {id(run) for run in train}
    evaluate = [run for run in runs if id(run) in waiting or not is_evaluated(run)]
    measured = {id(run) for run in evaluate}
    trained = {id(run): _recorded(run, "provenance.json", "train_seconds") for run in runs if id(run) not in waiting}
    evaluated = {
        id(run): _recorded(run, "likelihood.json", "evaluate_seconds") for run in runs if id(run) not in measured
    }
    begun = {id(run): found for run in train if (found := _begun(run))}
    # a checkpoint tells the pace of its own variant before the first run has ended
    whole = trained | {key: share[1] for key, share in begun.items()}
    seconds = [
        (1 - begun[id(run)][0]) * begun[id(run)][1] if id(run) in begun else _like(run, runs, whole) for run in train
    ]
    seconds += [_like(run, runs, evaluated) for run in evaluate]
    total = None if any(value is None for value in seconds) else sum(seconds)
    return Left(len(runs), train, evaluate, total)


def _recorded(run: RunConfig, file: str, key: str) -> float | None:
    try:
        return float(read_json(run.folder / file)[key])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _begun(run: RunConfig) -> tuple[float, float] | None:
    """(share done, seconds of the whole) of a training with a checkpoint."""
    try:
        meta = read_json(published(checkpoint_root() / run.training_hash)[-1] / "meta.json")
        share = min(1.0, meta["step"] / run.train.steps)
        return share, meta["seconds"] / share
    except (OSError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError):
        return None


def _like(run: RunConfig, runs: Sequence[RunConfig], known: dict[int, float | None]) -> float | None:
    """Mean seconds of the runs most like this one whose seconds are known."""
    alike: tuple[Callable[[RunConfig], Any], ...] = (
        lambda other: (other.variant, other.dataset) == (run.variant, run.dataset),
        lambda other: other.dataset == run.dataset,
        lambda other: True,
    )
    for same in alike:
        found = [known[id(other)] for other in runs if known.get(id(other)) is not None and same(other)]
        if found:
            return fmean(found)
    return None
