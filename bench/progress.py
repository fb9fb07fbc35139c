"""One progress bar, wherever the work is done: in the terminal, or told to the process that waits for this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

# set in a worker: receives (done, total) instead of drawing a bar
_listener: Callable[[float, float], None] | None = None


def report_to(listener: Callable[[float, float], None] | None) -> None:
    """From now on the bars of this process tell ``listener(done, total)`` and draw nothing."""
    global _listener
    _listener = listener


class Bar(tqdm):
    """A tqdm bar with the seconds left, that speaks to the listener where there is one."""

    def __init__(self, *args: Any, disable: bool = False, **kwargs: Any):
        self.listener = _listener
        super().__init__(*args, disable=disable and self.listener is None, **kwargs)

    def display(self, *args: Any, **kwargs: Any) -> bool:
        """Called by tqdm at its own pace, so a worker speaks no more often than a bar would be drawn."""
        if self.listener is None:
            return super().display(*args, **kwargs)
        self.listener(self.n, self.total or 0)
        return True

    def close(self) -> None:
        """End the bar; a worker's leaves no line behind."""
        if self.listener is not None:
            self.leave = False
        super().close()
