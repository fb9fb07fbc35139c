"""Dropout whose masks, on a CPU, are functions of the global batch, however many processes share it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (first, count, total): which rows of the global batch this process has, None for all
_share: tuple[int, int, int] | None = None


@contextmanager
def share_of_batch(rows: tuple[int, int], total: int) -> Iterator[None]:
    """A block in which inputs are the ``rows`` (first, count) of a global batch of ``total``, or several such batches.

    Masks are then drawn for the global batch, by a generator that all processes have seeded alike, and the others'
    rows are dropped. Only on a CPU: on other devices each process draws its own masks.
    """
    global _share
    before, _share = _share, (*rows, total) if rows[1] < total else None
    try:
        yield
    finally:
        _share = before


def _own_rows(draw, rows: int, entries: int) -> Tensor:
    """``draw(n)``, n numbers in the order of the global batch -> those (rows * entries,) of this process."""
    if _share is None:
        return draw(rows * entries)
    first, count, total = _share
    batches, rest = divmod(rows, count)
    if rest:
        raise ValueError(f"x: {rows} rows, accepted: a multiple of the {count} that this process has of the batch")
    return draw(batches * total * entries).view(batches, total, entries)[:, first : first + count].flatten()


class Dropout(nn.Module):
    """Dropout whose mask costs a third of PyTorch's on a CPU: 16 random bits an element: p is a multiple of 1/65536."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.dropped = round(p * 65536)

    @property
    def gain(self) -> float:
        """What makes up for the entries that are dropped."""
        return 65536 / (65536 - self.dropped) if self.training else 1.0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.dropped:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        kept = _own_rows(self._kept, len(x), x[0].numel()).view(x.shape)
        return x * (kept * self.gain).to(x.dtype)

    def unscaled(self, x: Tensor) -> Tensor:
        """x, in any dense layout, with entries dropped on a CPU; those that stay are not multiplied by `gain`."""
        if not self.training or not self.dropped:
            return x
        return x * _own_rows(self._kept, len(x), x[0].numel()).to(x.dtype).as_strided(x.shape, x.stride())

    def _kept(self, count: int) -> Tensor:
        words = torch.randint(-(2**63), 2**63 - 1, ((count + 3) // 4,))
        return words.view(torch.int16)[:count] >= self.dropped - 32768


class LibraryDropout(nn.Dropout):
    """PyTorch's dropout of dense inputs, for networks of a library, with a process's rows of the batch's mask."""

    def forward(self, x: Tensor) -> Tensor:
        if _share is None or not self.training or x.device.type != "cpu":
            return super().forward(x)
        kept = _own_rows(lambda count: torch.empty(count).bernoulli_(1 - self.p), len(x), x[0].numel())
        return x * kept.div_(1 - self.p).to(x.dtype).as_strided(x.shape, x.stride())
