"""What one training step costs in arithmetic and memory, counted operation by operation, the same on every device.

A dispatch mode sees every operation, those inside a nested ``torch.autograd.grad`` too (a loss that differentiates a
network on the way, as DiffFlow's and the bridges' do, breaks PyTorch's own counter, which hooks modules).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class StepCosts:
    """``flops``: of matrix products and convolutions, a multiply-add counts as two; ``peak_bytes``: of live tensors."""

    flops: int
    peak_bytes: int


class _Counter(TorchDispatchMode):
    """Counts while active. Tensors that existed before do not count as live: weights and data are the same for all."""

    def __init__(self):
        super().__init__()
        self.flops, self.live, self.peak = 0, 0, 0
        self._known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        # what an operation writes in place, or returns a view of, is its input's memory
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self._known.setdefault(value.untyped_storage(), 0)
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def step_costs(step: Callable[[], Any]) -> StepCosts:
    """Costs of one call of ``step``, backward passes included where it makes them."""
    with _Counter() as counter:
        step()
    return StepCosts(counter.flops, counter.peak)


def count_flops(step: Callable[[], Any]) -> int:
    """Floating-point operations of one call."""
    return step_costs(step).flops


def peak_bytes(step: Callable[[], Any]) -> int:
    """Largest number of bytes that tensors made during one call held at once."""
    return step_costs(step).peak_bytes
