"""Conventions of published code between model and pixels, on problems where their difference is known."""

import math

import numpy as np
import pytest
import torch
from analytic import gaussian_model, gaussian_nll
from convention_problems import (
    ImageScore,
    assert_agrees,
    case_of,
    flow_model,
    gaussian_images,
    gaussian_points,
    rows_of,
    settings,
)
from flow_problems import VECTOR, make, strong
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from bench.conventions.distance import energy_influence, frechet
from bench.conventions.pixels import truncate, truncation_shift
from bench.conventions.samples import loose_inverse
from bench.data import dequantise, make_dataset
from bench.distances import energy_distance
from bench.features import train_classifier
from models.indm import INDM
from models.sde import VESDE, VPSDE


def test_loose_inverse_errs_by_the_root_of_its_tolerance(monkeypatch):
    flow = strong(VECTOR, share=0.95)
    x = 2 * torch.rand(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    z = flow.latent(x).detach()
    error = float((loose_inverse(flow, z) - x).abs().max())
    assert 1e-4 < error < 0.3
    monkeypatch.setattr("bench.conventions.samples.TOLERANCE", 1e-22)
    assert float((loose_inverse(flow, z) - x).abs().max()) < 1e-8 < error
    case = case_of(flow_model(flow), gaussian_points(100, dims=2))
    monkeypatch.undo()
    rows = rows_of("inverse-tolerance", case)
    assert rows["sample error, largest"]["right"] < 1e-9 < 1e-5 < rows["sample error, largest"]["official"]
    assert rows["sample error, mean"]["difference"] > 3 * rows["sample error, mean"]["se"]
    assert rows["sample distance"]["units"] == "energy distance" and rows["sample distance"]["se"] > 0


def test_loose_inverse_stops_where_the_rule_says():
    """One block, the rule written out in data units."""
    flow = strong(VECTOR | {"blocks": 1}, share=0.95)
    y = flow.latent(2 * torch.rand(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1).detach()
    before, x = y, 2 * y - flow.latent(y).detach()  # y - g(y)
    while not ((x - before) ** 2 / (1e-5 + 1e-5 * y.abs()) < 1).all():
        before, x = x, y - (flow.latent(x).detach() - x)
    assert torch.allclose(loose_inverse(flow, y), x, atol=1e-12)


def test_inverse_of_a_squeezed_image_flow():
    flow = make({"shape": [1, 4, 4], "blocks": (2, 1), "hidden": 8, "squeeze_first": False})
    first = make({"shape": [2, 4, 4], "blocks": (1, 1), "hidden": 8, "squeeze_first": True})
    for one in (flow, first):
        x = torch.rand(5, *one.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert (loose_inverse(one, one.latent(x).detach()) - x).abs().max() < 5e-3


# Pixels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_truncation_loses_a_level_with_probability_k_over_levels_minus_one(levels):
    count = 3000
    k = torch.arange(levels, dtype=torch.uint8)[:, None].expand(-1, count)
    u = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).expand(levels, -1)
    lost = k.long() - truncate(dequantise(k, u, levels), levels).long()
    assert set(lost.unique().tolist()) <= {0, 1}
    shift = -truncation_shift(k[:, 0], levels)
    assert torch.allclose(lost.double().mean(1), shift, atol=1 / count)
    assert shift[0] == 0 and shift[-1] == 1
    if levels == 256:  # as the official code writes it, with data in [0, 1]
        x = dequantise(k, u, levels)
        assert torch.equal(truncate(x, 256), ((x + 1) / 2 * 255).clamp(0, 255).to(torch.uint8))


def test_un_dequantised_likelihood_of_a_gaussian():
    data, sde = gaussian_images(), VPSDE()
    model = INDM(sde, ImageScore(sde, 0.3), shape=(1, 2, 2))
    case = case_of(model, data, images=400)
    rows = rows_of("un-dequantised", case)
    grey = 2 * data.test.float() / 16 - 1
    expected = (
        (gaussian_nll(grey.flatten(1), 0, 0.3) - gaussian_nll(case.x.flatten(1), 0, 0.3)).mean() / 4 / math.log(2)
    )
    for row in rows.values():
        assert row["units"] == "bits/dim"
        assert_agrees(row, float(expected), least=1e-3)
    offset = math.log2(17 / 2)
    truth = float(gaussian_nll(case.x.flatten(1), 0, 0.3).mean()) / 4 / math.log(2) + offset
    assert rows["NLL"]["right"] == pytest.approx(truth, abs=0.01)
    points = rows_of("un-dequantised", case_of(gaussian_model(sde), gaussian_points()))
    assert all(row["status"] == "not defined: the data are points without grey levels" for row in points.values())


def test_truncation_of_data_and_samples(tmp_path):
    data, sde = gaussian_images(), VPSDE()
    labels = (data.train.float().mean((1, 2, 3)) > 8).long()
    data = make_dataset("images", 17, data.train, data.test, train_labels=labels, test_labels=labels)
    train_classifier(data, tmp_path / "classifier.safetensors", epochs=1, features=8)
    model = INDM(sde, ImageScore(sde, 0.3), shape=(1, 2, 2))
    evaluate = settings(features="classifier")
    case = case_of(model, data, None, tmp_path / "classifier.safetensors", evaluate, images=400, samples=200)
    rows = rows_of("uint8-truncation", case)
    known = rows["mean level of data"]
    assert known["closed_form"] == pytest.approx(-float(data.test.double().mean()) / 16, rel=1e-9)
    assert_agrees(known)
    # the samples follow nearly the data's law, so their shift is nearly theirs
    assert rows["mean level of samples"]["difference"] == pytest.approx(known["closed_form"], abs=0.05)
    distance = rows["sample distance"]
    assert distance["units"] == "Frechet distance" and distance["se"] > 0
    assert distance["difference"] > 3 * distance["se"]


def test_ve_denoising_hardly_moves():
    sde = VESDE()
    case = case_of(gaussian_model(sde, 2, 0.0, 0.02), gaussian_points(400, 0.02, dims=2), samples=400, tolerance=1e-6)
    rows = rows_of("ve-denoising", case)
    step = rows["denoising step, rms"]
    # sigma^2 |score| of N(0, s^2 + sigma^2): rms sigma^2 / sqrt(s^2 + sigma^2)
    assert step["right"] == pytest.approx(1e-4 / math.sqrt(5e-4), rel=0.1)
    assert step["official"] == pytest.approx(step["right"] * 2 * math.log(5000) * 1e-5, rel=1e-3)
    assert step["difference"] == pytest.approx(step["closed_form"], rel=1e-6)
    # Tweedie's mean has variance s^4 / v = 0.8 s^2, the noisy sample 1.25 s^2
    spread = [float(x.std()) for x in (case.right_samples, case.latents.noisy)]
    assert spread == pytest.approx([0.02 * math.sqrt(0.8), 0.02 * math.sqrt(1.25)], rel=0.08)
    assert rows["sample distance"]["se"] > 0
    other = rows_of("ve-denoising", case_of(gaussian_model(VPSDE(), 2), gaussian_points(dims=2)))
    assert all(row["status"].startswith("not defined") for row in other.values())


def test_frechet_distance_is_torch_fidelitys_and_its_influence_is_a_jackknife():
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(6, 6))
    a, b = generator.normal(size=(300, 6)) @ mix, generator.normal(0.3, 1.2, size=(500, 6)) @ mix
    value, influence = frechet(a, b)
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(torch.tensor(x)) for x in (a, b)),
        verbose=False,
    )["frechet_inception_distance"]
    assert value == pytest.approx(theirs, rel=1e-6)
    left_out = np.array([frechet(np.delete(a, i, 0), b)[0] for i in range(40)])
    jackknife = (value - left_out) * (len(a) - 1)
    # the bias of a finite sample shifts all alike
    difference = (jackknife - jackknife.mean()) - (influence[:40] - influence[:40].mean())
    assert np.abs(difference).max() < 0.05 * np.abs(influence).max()


def test_energy_influence_is_a_jackknife():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    y = 0.5 + 1.5 * torch.randn(300, 2, generator=generator, dtype=torch.float64)
    value, influence = energy_distance(x, y), energy_influence(x, y)
    keep = ~torch.eye(200, dtype=torch.bool)
    left_out = np.array([energy_distance(x[keep[i]], y) for i in range(30)])
    jackknife = (value - left_out) * 199
    assert np.abs(jackknife - influence[:30]).max() < 0.03 * np.abs(influence).max()
