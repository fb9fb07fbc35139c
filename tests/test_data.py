"""Data sets that need no files: densities against their integrals, digits, exact dequantisation, bits per dimension."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.data import bits_per_dim, content_hash, dequantise, load, quantise
from bench.errors import InputError

TOYS = ("checkerboard", "gaussians", "swissroll")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- two-dimensional densities


def density_on_a_grid(name: str, edge: float, cells: int) -> tuple[torch.Tensor, float]:
    """Log-density at the midpoints of a square grid, and the area of a cell."""
    middle = (torch.arange(cells, dtype=torch.float64) + 0.5) * (2 * edge / cells) - edge
    grid = torch.cartesian_prod(middle, middle)
    return load(name).log_prob(grid), (2 * edge / cells) ** 2


@pytest.mark.parametrize(("name", "entropy"), [("checkerboard", math.log(8)), ("gaussians", 2.8316)])
def test_densities_integrate_to_one_and_have_their_entropy(name, entropy):
    # the gaussians' 2.838 of eight separate components, less what their slight overlap takes away
    log_prob, area = density_on_a_grid(name, 6.0, 480)
    prob = log_prob.exp()
    assert float(prob.sum() * area) == pytest.approx(1, abs=1e-6)
    assert float(-torch.special.xlogy(prob, prob).sum() * area) == pytest.approx(entropy, abs=1e-4)


@pytest.mark.parametrize("name", ["checkerboard", "gaussians"])
def test_draws_follow_the_density(name):
    # counts of a coarse grid against the integral of the density over its cells
    data, n = load(name), 200_000
    x = data.draw(n, generator())
    log_prob, area = density_on_a_grid(name, 4.0, 320)
    expected = n * (log_prob.exp() * area).reshape(16, 20, 16, 20).sum(dim=(1, 3))
    found = torch.histogramdd(x.double(), bins=[16, 16], range=[-4.0, 4.0, -4.0, 4.0]).hist
    error = (found - expected) / expected.clamp(min=1).sqrt()
    assert error.abs().max() < 5


def test_checkerboard_draws_never_leave_the_filled_squares():
    data = load("checkerboard")
    x = data.draw(2_000_000, generator(3))
    assert torch.equal(data.log_prob(x), torch.full((len(x),), -math.log(8)))
    outside = torch.tensor([[-1.5, -0.5], [2.0, 0.5], [-2.1, -1.5], [0.5, 3.0], [math.inf, 0.0], [1e9, 1e9]])
    assert torch.equal(data.log_prob(outside), torch.full((6,), -math.inf))


def test_swissroll_has_its_second_moment():
    # E|x|^2 = E angle^2 / 25 + 2 * 0.2^2 with the angle uniform on [1.5 pi, 4.5 pi]
    low, high = 1.5 * math.pi, 4.5 * math.pi
    expected = (high**3 - low**3) / (3 * (high - low)) / 25 + 2 * 0.2**2
    data = load("swissroll")
    assert data.log_prob is None
    assert float(data.draw(100_000, generator()).square().sum(1).mean()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", TOYS)
def test_toy_sets_are_fixed_and_draws_follow_their_generator(name):
    torch.manual_seed(1)
    one, state = load(name), torch.get_rng_state()
    torch.manual_seed(2)
    two = load(name)
    assert one.hash == two.hash and torch.equal(one.test, two.test)
    assert (one.shape, one.levels, len(one.train), len(one.test)) == ((2,), None, 10_000, 5_000)
    assert one.train.dtype == one.draw(3, generator()).dtype == torch.float32
    assert not torch.equal(one.train[:5000], one.test)
    assert one.std == pytest.approx(float(one.train.std(correction=0)), rel=1e-4)
    assert torch.equal(one.draw(7, generator(5)), one.draw(7, generator(5)))
    assert not torch.equal(one.draw(7, generator(5)), one.draw(7, generator(6)))
    torch.set_rng_state(state)


# --- digits


def test_digits_split_is_fixed_stratified_and_complete():
    from sklearn.datasets import load_digits

    data = load("digits")
    assert data.describe() == {
        "name": "digits",
        "train": 1500,
        "test": 297,
        "shape": [1, 8, 8],
        "levels": 17,
        "hash": "8d2680cb08290422c7d80c781f9fab0a8d5b0cdfc74e97044373209c715b06e3",
    }
    json.dumps(data.describe(), allow_nan=False)
    assert data.train.dtype == torch.uint8 and data.train.max() == 16 and data.train.min() == 0
    bunch = load_digits()
    whole = sorted((*image.astype(int).ravel(), label) for image, label in zip(bunch.images, bunch.target, strict=True))
    images, labels = torch.cat([data.train, data.test]), torch.cat([data.train_labels, data.test_labels])
    ours = sorted((*image.flatten().tolist(), int(label)) for image, label in zip(images, labels, strict=True))
    assert ours == whole
    share = torch.bincount(data.test_labels) / torch.bincount(labels)
    assert (share - 297 / 1797).abs().max() < 1 / 170
    scaled = dequantise(data.train, torch.full(data.train.shape, 0.5), 17)
    assert data.std == pytest.approx(float(scaled.std(correction=0)), rel=1e-5)


def test_hash_depends_on_names_shapes_types_and_contents():
    a, b = torch.arange(6, dtype=torch.uint8).reshape(2, 3), torch.ones(2)
    hashes = {
        content_hash(tensors)
        for tensors in (
            {"train": a, "test": b},
            {"train": b, "test": a},
            {"train": a.reshape(3, 2), "test": b},
            {"train": a.to(torch.int8), "test": b},
            {"train": a + 1, "test": b},
        )
    }
    assert len(hashes) == 5
    assert content_hash({"x": a.T}) == content_hash({"x": a.T.contiguous()})


# --- dequantisation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 3, 16, 17, 200, 256])
def test_every_level_comes_back_at_the_edges_of_its_interval(levels, dtype):
    eps = torch.finfo(dtype).eps
    edges = torch.tensor([0.0, torch.finfo(dtype).tiny, 1e-30, eps / 2, eps, 0.5, 1 - eps, 1 - eps / 2], dtype=dtype)
    images = torch.arange(levels, dtype=torch.uint8)[:, None].repeat(1, len(edges))
    x = dequantise(images, edges.repeat(levels, 1), levels)
    assert x.dtype == dtype
    assert torch.equal(quantise(x, levels), images)
    assert x.min() >= -1 and x.max() < 1
    assert (x.diff(dim=1) >= 0).all() and (x[1:, 0] > x[:-1, -1]).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 256), st.data())
def test_quantise_inverts_dequantise(levels, data):
    k = data.draw(st.integers(0, levels - 1))
    u = data.draw(st.floats(0, 1, exclude_max=True, width=32))
    x = dequantise(torch.tensor([k], dtype=torch.uint8), torch.tensor([u]), levels)
    assert quantise(x, levels).item() == k
    assert x.item() == pytest.approx(2 * (k + u) / levels - 1, abs=2e-7 * levels)


def test_quantise_clips_and_refuses_nan():
    x = torch.tensor([-math.inf, -5.0, -1.0, 0.0, 0.999, 1.0, 7.0, math.inf])
    assert quantise(x, 256).tolist() == [0, 0, 0, 128, 255, 255, 255, 255]
    assert quantise(x.to(torch.bfloat16), 17).tolist() == [0, 0, 0, 8, 16, 16, 16, 16]
    with pytest.raises(InputError, match="1 of 2 values are NaN"):
        quantise(torch.tensor([0.0, math.nan]), 256)


def test_dequantise_refuses_what_it_cannot_use():
    k, u = torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3)
    with pytest.raises(InputError, match=r"shape \(3,\) differs"):
        dequantise(k, u[0], 17)
    with pytest.raises(InputError, match="levels: 300"):
        dequantise(k, u, 300)
    with pytest.raises(InputError, match="float16"):
        dequantise(k, u.half(), 17)


def test_bits_per_dim_has_the_known_offsets():
    assert bits_per_dim(0.0, 3072, 256) == 7
    assert bits_per_dim(0.0, 3072, 256, data_range=1.0) == 8
    assert bits_per_dim(0.0, 64, 17) == pytest.approx(3.087, abs=5e-4)
    # the uniform density on [-1, 1]^D costs log2(levels) whatever the dimension
    assert bits_per_dim(64 * math.log(2), 64, 17) == pytest.approx(math.log2(17))
    nats = torch.tensor([64 * math.log(2), 0.0])
    assert torch.allclose(bits_per_dim(nats, 64, 17), torch.tensor([math.log2(17), math.log2(8.5)]))


@pytest.mark.parametrize("name", ["imagenet", "folder:", ""])
def test_unknown_names_list_the_accepted_ones(name):
    with pytest.raises(
        InputError, match=f"unknown name '{name}'; accepted: checkerboard, .*cifar10-jpeg, folder:<path>"
    ):
        load(name)
