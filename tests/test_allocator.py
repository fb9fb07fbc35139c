"""Freed memory is used again without page faults."""

import resource

import torch

from bench.allocator import keep_freed_memory


def test_large_tensors_are_not_faulted_in_again():
    if not keep_freed_memory():
        return  # another C library
    size, repeats = 2**20, 16  # floats: 4 MiB, 1024 pages

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    for _ in range(repeats):  # the heap grows to where blocks fit
        torch.ones(size)
    before = faults()
    for _ in range(repeats):
        torch.ones(size)
    assert faults() - before < repeats * 1024 / 4
