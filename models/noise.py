"""Randomness as a function, not a state.

Evaluation and sampling draw the noise of sample i from (seed, purpose, i) by a counter-based generator, so neither
batch size nor process count changes a result. Training draws that of step k from (seed, purpose, k) for the whole
global batch and keeps this process's rows, so a resumed run needs no random state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def derive_seed(*parts) -> int:
    """A 63-bit seed from any mixture of strings and integers; stable across runs, machines and Python versions."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def philox(counter: Sequence[Tensor], key: tuple[int, int], rounds: int = 10) -> list[Tensor]:
    """Philox4x32 (Salmon et al. 2011, SC'11): four int64 tensors of 32-bit words -> four of the same shape."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # products wrap modulo 2^64 in int64; masking after the shift recovers the unsigned high word
        low, high = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (high >> 32 & _WORD) ^ x1 ^ k0, high & _WORD, (low >> 32 & _WORD) ^ x3 ^ k1, low & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [x0, x1, x2, x3]


class IndexedGenerator:
    """Noise for the samples ``index`` (B,): draw number d of sample i depends on (seed, purpose, i, d) alone."""

    def __init__(self, seed: int, purpose: str, index: Tensor):
        self.index = index.long()
        word = derive_seed(seed, purpose)
        self._key = (word & _WORD, word >> 32 & _WORD)
        self._draws = 0

    def _uniform_words(self, shape, device) -> Tensor:
        if shape[0] != len(self.index):
            raise ValueError(f"shape {tuple(shape)}: first dimension must be the number of samples, {len(self.index)}")
        size = math.prod(shape[1:])
        blocks = -(-size // 4)
        index = self.index.to(device)[:, None].expand(-1, blocks)
        block = torch.arange(blocks, device=device)[None].expand_as(index)
        draw = torch.full_like(block, self._draws)
        self._draws += 1
        return torch.stack(philox([index & _WORD, index >> 32 & _WORD, block, draw], self._key), -1)

    def uniform(self, shape, device=None, dtype=None) -> Tensor:
        """Uniforms in [0, 1) of ``shape`` (B, ...)."""
        words = self._uniform_words(shape, device)
        # 24 bits are exact in float32, so that no value rounds up to 1
        values = (words >> 8).to(dtype or torch.get_default_dtype()) * 2.0**-24
        return values.flatten(1)[:, : math.prod(shape[1:])].reshape(shape)

    def normal(self, shape, device=None, dtype=None) -> Tensor:
        """Standard normals of ``shape`` (B, ...), by Box and Muller."""
        dtype = dtype or torch.get_default_dtype()
        words = self._uniform_words(shape, device).to(dtype)
        radius = (-2 * ((words[..., :2] + 0.5) * 2.0**-32).log()).sqrt()
        angle = words[..., 2:] * (2 * math.pi * 2.0**-32)
        values = torch.cat([radius * angle.cos(), radius * angle.sin()], -1)
        return values.flatten(1)[:, : math.prod(shape[1:])].reshape(shape)

    def rademacher(self, shape, device=None, dtype=None) -> Tensor:
        """Random signs of ``shape`` (B, ...)."""
        return (self.uniform(shape, device, dtype) >= 0.5).to(dtype or torch.get_default_dtype()) * 2 - 1


class BatchGenerator:
    """A torch generator that draws for a training step's global batch, of which this process keeps its rows."""

    def __init__(
        self, source: torch.Generator, batch_size: int, rows: tuple[int, int], host: torch.Generator | None = None
    ):
        self.source, self.batch_size, self.rows = source, batch_size, rows
        self.host = host or source
        self.device = source.device

    def own(self, draw: Callable[[int, torch.Generator], Tensor], on_host: bool = False) -> Tensor:
        """This process's rows of ``draw(batch_size, source)`` (batch_size, ...).

        ``on_host``: drawn by ``host`` instead, a generator of the CPU, for what decides how much work there is.
        """
        first, count = self.rows
        return draw(self.batch_size, self.host if on_host else self.source)[first : first + count]


Generator = torch.Generator | IndexedGenerator | BatchGenerator | None


def normal(shape, generator: Generator = None, device=None, dtype=None) -> Tensor:
    """Standard normals from a torch generator, from per-sample indices, or from torch's global state."""
    if isinstance(generator, IndexedGenerator):
        return generator.normal(shape, device, dtype)
    if isinstance(generator, BatchGenerator):
        return generator.own(lambda size, source: normal((size, *shape[1:]), source, device, dtype))
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def uniform(shape, generator: Generator = None, device=None, dtype=None) -> Tensor:
    """Uniforms in [0, 1) from any of the three sources."""
    if isinstance(generator, IndexedGenerator):
        return generator.uniform(shape, device, dtype)
    if isinstance(generator, BatchGenerator):
        return generator.own(lambda size, source: uniform((size, *shape[1:]), source, device, dtype))
    return torch.rand(shape, generator=generator, device=device, dtype=dtype)


def rademacher(shape, generator: Generator = None, device=None, dtype=None) -> Tensor:
    """Random signs from any of the three sources."""
    return (uniform(shape, generator, device, dtype) >= 0.5).to(dtype or torch.get_default_dtype()) * 2 - 1


class StepRandom:
    """All randomness of one training step, a function of (seed, step) and of the global sample index.

    ``rows`` = (first, count) are this process's samples in the global batch of ``batch_size``.
    """

    def __init__(self, seed: int, step: int, batch_size: int, rows: tuple[int, int] | None = None, device="cpu"):
        self.seed, self.step, self.batch_size, self.device = seed, step, batch_size, torch.device(device)
        self.rows = rows or (0, batch_size)

    def generator(self, purpose: str, device=None) -> torch.Generator:
        """A torch generator for (seed, step, purpose), the same in every process."""
        return torch.Generator(device or self.device).manual_seed(derive_seed(self.seed, self.step, purpose))

    def _own(self, values: Tensor) -> Tensor:
        first, count = self.rows
        return values if count == self.batch_size else values[first : first + count]

    def normal(self, purpose: str, shape, dtype=None) -> Tensor:
        """Standard normals (count, *shape) of this process's samples."""
        source = self.generator(purpose)
        return self._own(torch.randn((self.batch_size, *shape), generator=source, device=self.device, dtype=dtype))

    def uniform(self, purpose: str, shape=(), dtype=None) -> Tensor:
        """Uniforms in [0, 1), (count, *shape), of this process's samples."""
        source = self.generator(purpose)
        return self._own(torch.rand((self.batch_size, *shape), generator=source, device=self.device, dtype=dtype))

    def source(self, purpose: str) -> RowGenerator:
        """A stream of draws for this process's samples, as functions of (seed, step, purpose) and the global index."""
        return RowGenerator(self, purpose)

    def whole(self, purpose: str) -> BatchGenerator:
        """A stream of draws for the global batch from one torch generator; each process keeps its rows of each."""
        source = self.generator(purpose)
        # a number that the host must know would make it wait for any other device
        host = None if source.device.type == "cpu" else self.generator(f"{purpose} on the host", "cpu")
        return BatchGenerator(source, self.batch_size, self.rows, host)

    def stratified(self, purpose: str, dtype=None) -> Tensor:
        """Uniforms (count,) that cover [0, 1) evenly over the global batch: one random shift of a regular grid."""
        source = self.generator(purpose)
        shift = torch.rand((), generator=source, device=self.device, dtype=dtype)
        grid = torch.arange(self.batch_size, device=self.device, dtype=shift.dtype) / self.batch_size
        return self._own((grid + shift) % 1.0)


class RowGenerator(IndexedGenerator):
    """The samples of one training step as a source of noise: draw d is that of the purpose "<purpose> d"."""

    def __init__(self, random: StepRandom, purpose: str):
        self.random, self.purpose, self._draws = random, purpose, 0
        first, count = random.rows
        self.index = torch.arange(first, first + count)

    def _next(self) -> str:
        self._draws += 1
        return f"{self.purpose} {self._draws}"

    def uniform(self, shape, device=None, dtype=None) -> Tensor:
        """Uniforms in [0, 1) of ``shape`` (count, ...)."""
        return self.random.uniform(self._next(), shape[1:], dtype)

    def normal(self, shape, device=None, dtype=None) -> Tensor:
        """Standard normals of ``shape`` (count, ...)."""
        return self.random.normal(self._next(), shape[1:], dtype)
