"""Seconds of a case beside those of one plain convolution, taken in turn, so that both see the machine in one mood.

On a CPU the seconds are those this process spent computing: another process on the same core does not lengthen them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# the reference of the specification: one forward and backward of this convolution is "c"
REFERENCE = "forward and backward of Conv2d(64, 64, 3, padding=1) on (16, 64, 32, 32), mean square, one thread"


class Reference:
    """The specification's unit of work, c."""

    def __init__(self, device: torch.device | str = "cpu"):
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(64, 64, 3, padding=1).to(device)
        self.x = torch.randn(16, 64, 32, 32, generator=generator).to(device)

    def __call__(self) -> None:
        self.conv.zero_grad()
        self.conv(self.x).square().mean().backward()


@dataclass
class Timing:
    """Seconds of each round, computing (``work``) and on the clock (``wall``), and of the reference beside it."""

    work: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.work)

    @property
    def c(self) -> float:
        """Median of the reference's rounds, seconds."""
        return statistics.median(self.reference)

    @property
    def multiple(self) -> float:
        """The case's seconds in units of the reference's."""
        return self.seconds / self.c

    def record(self) -> dict[str, Any]:
        """Plain data for a result file."""
        low, high = min(self.work), max(self.work)
        return {
            "seconds": self.seconds,
            "wall_seconds": statistics.median(self.wall),
            "range": [low, high],
            "rounds": len(self.work),
            "c": self.c,
            "multiple": self.multiple,
        }


def clocked(function: Callable[[], Any], device: torch.device | str = "cpu") -> tuple[float, float]:
    """(seconds of computing, seconds on the clock) of one call; on a GPU both are on the clock, to its end."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    work, wall = time.process_time(), time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    wall = time.perf_counter() - wall
    return (wall if cuda else time.process_time() - work), wall


def in_turn(
    function: Callable[[], Any], rounds: int, reference: Callable[[], Any] | None = None, warmup: int = 2
) -> Timing:
    """Time ``function`` and the ``reference`` (default: c) on the CPU in turn, ``rounds`` times."""
    reference, timing = reference or Reference(), Timing()
    for _ in range(warmup):
        function()
        reference()
    for _ in range(rounds):
        # one call before and one after: both ends of the case's round
        before = clocked(reference)[0]
        work, wall = clocked(function)
        timing.work.append(work)
        timing.wall.append(wall)
        timing.reference += [before, clocked(reference)[0]]
    return timing


def side_by_side(
    functions: dict[str, Callable[[], Any]], rounds: int, device: torch.device | str = "cpu", warmup: int = 1
) -> dict[str, Timing]:
    """Time several ways of doing one thing in turn; their ratios are what can be compared."""
    timings = {name: Timing() for name in functions}
    for _ in range(warmup):
        for function in functions.values():
            function()
    for _ in range(rounds):
        for name, function in functions.items():
            work, wall = clocked(function, device)
            timings[name].work.append(work)
            timings[name].wall.append(wall)
    return timings
