"""Noise as a function of its index."""

import math

import torch

from models.noise import IndexedGenerator, StepRandom, derive_seed, philox

WORD = 0xFFFFFFFF


def words(counter, key):
    return [int(v) for v in philox([torch.tensor([c]) for c in counter], key)]


def test_philox_agrees_with_the_published_vectors():
    """Known-answer tests of Philox4x32-10 (Salmon et al. 2011, Random123)."""
    assert words([0] * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words([WORD] * 4, (WORD, WORD)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_moments_and_independence():
    x = IndexedGenerator(0, "moments", torch.arange(4000)).normal((4000, 51), dtype=torch.float64)
    n = x.numel()
    assert abs(float(x.mean())) < 4 / math.sqrt(n)
    assert abs(float(x.square().mean()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float(x.pow(4).mean()) - 3) < 4 * math.sqrt(96 / n)
    correlation = torch.corrcoef(x.T) - torch.eye(51, dtype=torch.float64)
    assert float(correlation.abs().max()) < 6 / math.sqrt(4000)


def test_draws_depend_on_index_draw_purpose_and_seed_alone():
    index = torch.arange(8)
    whole = IndexedGenerator(1, "a", index).normal((8, 3))
    parts = [IndexedGenerator(1, "a", index[rows]).normal((len(index[rows]), 3)) for rows in (slice(0, 3), slice(3, 8))]
    assert torch.equal(whole, torch.cat(parts))
    source = IndexedGenerator(1, "a", index)
    assert torch.equal(source.normal((8, 3)), whole)
    assert not torch.equal(source.normal((8, 3)), whole)
    assert not torch.equal(IndexedGenerator(2, "a", index).normal((8, 3)), whole)
    assert not torch.equal(IndexedGenerator(1, "b", index).normal((8, 3)), whole)


def test_uniforms_and_signs():
    source = IndexedGenerator(0, "u", torch.arange(20_000))
    u = source.uniform((20_000,))
    assert 0 <= float(u.min()) and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 / math.sqrt(12 * 20_000)
    signs = source.rademacher((20_000,))
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / math.sqrt(20_000)


def test_step_random_is_one_global_batch_whatever_the_number_of_processes():
    whole = StepRandom(0, 5, 8)
    halves = [StepRandom(0, 5, 8, rows) for rows in ((0, 4), (4, 4))]
    assert torch.equal(whole.normal("noise", (3,)), torch.cat([h.normal("noise", (3,)) for h in halves]))
    assert torch.equal(whole.stratified("time"), torch.cat([h.stratified("time") for h in halves]))
    u = whole.stratified("time").sort().values
    assert torch.allclose(u.diff(), torch.full((7,), 1 / 8), atol=1e-6)
    assert not torch.equal(StepRandom(0, 6, 8).normal("noise", (3,)), whole.normal("noise", (3,)))


def test_seeds_do_not_collide_by_concatenation():
    assert derive_seed("a", 11) != derive_seed("a1", 1)
    assert 0 <= derive_seed(0) < 2**63
