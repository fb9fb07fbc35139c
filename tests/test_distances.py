"""Distances between point sets against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from bench.distances import energy_distance, sliced_wasserstein
from bench.errors import InputError


def points(n: int, d: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_sliced_wasserstein_of_a_shift_in_the_plane():
    # every projection shifts by <theta, c>: W1 averages |cos| to 2/pi, W2 averages cos^2 to 1/2
    x, shift = points(300), torch.tensor([3.0, 4.0])
    assert sliced_wasserstein(x, x + shift, projections=512, order=1) == pytest.approx(5 * 2 / math.pi, rel=1e-4)
    assert sliced_wasserstein(x, x + shift, order=2) == pytest.approx(5 / math.sqrt(2), rel=1e-5)


def test_sliced_wasserstein_of_a_shift_in_higher_dimension():
    # E<theta, c>^2 = |c|^2 / d for directions uniform on the sphere
    x, shift = points(50, 5), torch.tensor([1.0, -2.0, 2.0, 4.0, 0.0])
    found = sliced_wasserstein(x, x + shift, projections=20_000, order=2)
    assert found == pytest.approx(5 / math.sqrt(5), rel=0.02)
    assert found == sliced_wasserstein(x, x + shift, projections=20_000, order=2)
    assert found != sliced_wasserstein(x, x + shift, projections=20_000, order=2, seed=1)


def test_sliced_wasserstein_matches_points_not_order():
    x = points(400)
    assert sliced_wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-6)
    assert sliced_wasserstein(x, 2 * x, order=2) == pytest.approx(sliced_wasserstein(x, torch.zeros_like(x)), rel=1e-5)


def test_sliced_wasserstein_of_gaussians():
    # W2 between N(0, 1) and N(0, 4) is 1 along every direction; the bias at n = 20,000 is small against it
    assert sliced_wasserstein(points(20_000), 2 * points(20_000, seed=1)) == pytest.approx(1, rel=0.03)


def test_energy_distance_of_two_points_and_of_point_masses():
    x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert energy_distance(x, y) == 10.0
    assert energy_distance(x.repeat(7, 1), y.repeat(5, 1), chunk=3) == pytest.approx(10.0)


def test_energy_distance_by_hand():
    # between: (1 + 3 + 1 + 1) / 4, within: 2 and 2
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    assert energy_distance(x, y) == pytest.approx(2 * 1.5 - 2 - 2)


def test_energy_distance_does_not_depend_on_the_chunks():
    x, y = points(101), points(57, seed=1) + 0.5
    whole = energy_distance(x, y, chunk=1000)
    assert energy_distance(x, y, chunk=7) == pytest.approx(whole, rel=1e-6)
    assert energy_distance(y, x, chunk=50) == pytest.approx(whole, rel=1e-6)


def test_energy_distance_of_normals_is_the_closed_form():
    # one dimension: E|N(m, 2)| with m = 1 is 2/sqrt(pi) exp(-1/4) + erf(1/2); within terms 2/sqrt(pi) each
    truth = 2 * (2 / math.sqrt(math.pi) * math.exp(-0.25) + math.erf(0.5)) - 4 / math.sqrt(math.pi)
    assert energy_distance(points(3000, 1), points(3000, 1, seed=1) + 1) == pytest.approx(truth, rel=0.1)


def test_energy_distance_is_unbiased_where_the_distributions_agree():
    values = [energy_distance(points(60, seed=i), points(40, seed=1000 + i)) for i in range(60)]
    mean, spread = torch.tensor(values).mean(), torch.tensor(values).std()
    assert abs(mean) < 3 * spread / math.sqrt(len(values))
    assert min(values) < 0  # a biased (V-statistic) estimate never is


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sliced_wasserstein(points(3), points(4)), "one size, got 3 and 4"),
        (lambda: sliced_wasserstein(points(3), points(3), order=3), "order: 3"),
        (lambda: sliced_wasserstein(points(3), points(3), projections=0), "projections: 0"),
        (lambda: sliced_wasserstein(points(3), points(3, 4)), r"\(3, 2\) and \(3, 4\)"),
        (lambda: energy_distance(points(3), points(0)), "at least one point"),
        (lambda: energy_distance(points(3), torch.full((2, 2), math.nan)), "second sample .* not finite"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError, match=words):
        call()
