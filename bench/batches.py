"""An evaluation's work, batch by batch: shared out over processes, kept in files, shown, and ended on request."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from bench import stopping
from bench.pieces import Pieces
from bench.progress import Bar
from bench.sharding import Arrays, on_main, spread, team
from models.base import NotDefined
from models.flows import FlowInverseError
from models.integrators import IntegrationError

# what may keep a quantity from being measured without being a fault of the code
FAILURES = (FlowInverseError, IntegrationError, NotDefined)
SECONDS = "seconds"
_RECORD = "record"
_WHOLE = range(1)  # of a piece that is no batch of images
_LINE = "{desc}: {percentage:3.0f}% |{bar:20}| {elapsed}, about {remaining} left{postfix}"


class Work:
    """How the batches of an evaluation are done: by default computed, and no more.

    ``pieces``: where finished batches are kept and found again. ``costs``: quantity -> (images, cost of one in any
    unit), for a progress line under ``label``. With either, requests to stop are heard before each batch
    (:mod:`bench.stopping`); the learning curve's points, which have neither, are not interrupted.
    """

    def __init__(
        self, pieces: Pieces | None = None, costs: Mapping[str, tuple[int, float]] | None = None, label: str = ""
    ):
        self.pieces, self.costs = pieces, dict(costs or {})
        self.stoppable = pieces is not None or costs is not None
        self.spared = 0.0  # seconds that the pieces found by this process once took
        self._left = {quantity: images * cost for quantity, (images, cost) in self.costs.items()}
        self._bar = None
        if costs is not None and team().main:
            self._bar = Bar(total=sum(self._left.values()), desc=label, bar_format=_LINE, mininterval=0.5)

    def close(self) -> None:
        """End the progress line."""
        if self._bar is not None:
            self._bar.close()

    def batches(
        self,
        name: str,
        count: int,
        batch_size: int,
        function: Callable[[range], Arrays],
        first: int = 0,
        quantity: str | None = None,
    ) -> list[Arrays]:
        """``function(rows)`` for ``count`` consecutive rows from ``first`` on, in batches of ``batch_size``.

        Every process gets all of them, in order, each with the "seconds" that it took; where some failed, the failure
        of the first is raised in all. ``name`` tells pieces apart, ``quantity`` entries of ``costs``.
        """
        starts = range(first, first + count, batch_size)
        quantity = quantity or name
        shown = 0

        def done(k: int) -> Arrays:
            nonlocal shown
            rows = range(starts[k], min(starts[k] + batch_size, first + count))
            result = self._one(name, rows, function)
            # the other processes are about as far
            reached = rows.stop - first
            self._advance(quantity, reached - shown, f"{quantity}: {reached} of {count}")
            shown = reached
            return result

        try:
            return spread(len(starts), done, (*FAILURES, stopping.Stopped))
        except FAILURES:
            self._advance(quantity)
            raise

    def _one(self, name: str, rows: range, function: Callable[[range], Arrays]) -> Arrays:
        found = self.pieces.load(name, rows) if self.pieces else None
        if found is not None:
            self.spared += float(found[SECONDS])
            return found
        if self.stoppable:
            stopping.check()
        started = time.perf_counter()
        found = {**function(rows)}
        found[SECONDS] = np.array(time.perf_counter() - started)
        if self.pieces:
            self.pieces.save(name, rows, found)
        return found

    def result(
        self, name: str, function: Callable[[], tuple[dict[str, Any], Arrays]], parts: Iterable[str] = ()
    ) -> tuple[dict[str, Any], Arrays]:
        """``function()``, called by all processes: a JSON record, and arrays, which the first process alone returns.

        Both are kept as one piece; those of the batches ``parts`` are then removed.
        """
        arrays: dict[str, np.ndarray] = {}

        def known() -> dict[str, Any] | None:
            found = self.pieces.load(name, _WHOLE) if self.pieces else None
            if found is None:
                return None
            self.spared += float(found.pop(SECONDS))
            record = json.loads(str(found.pop(_RECORD)))
            arrays.update(found)
            return record

        record = on_main(known)
        if record is not None:
            self._advance(name)
            return record, arrays
        started, spared = time.perf_counter(), self.spared
        record, computed = function()

        def keep() -> None:
            arrays.update(computed)
            if self.pieces:
                seconds = time.perf_counter() - started + self.spared - spared
                said = {_RECORD: np.array(json.dumps(record)), SECONDS: np.array(seconds)}
                self.pieces.save(name, _WHOLE, {**computed, **said})
                for part in parts:
                    self.pieces.forget(part)

        on_main(keep)
        self._advance(name)
        return record, arrays

    def _advance(self, quantity: str, images: int | None = None, said: str = "") -> None:
        """Move the progress line on by so many images of a quantity, by default by all that are left of it."""
        if self._bar is None or quantity not in self._left:
            return
        left = self._left[quantity]
        step = left if images is None else min(images * self.costs[quantity][1], left)
        self._left[quantity] = left - step
        if said:
            self._bar.set_postfix_str(said, refresh=False)
        self._bar.update(step)
