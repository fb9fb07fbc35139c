"""Conventions of published code in a likelihood, on problems where their difference from the right value is known."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from analytic import gaussian_model, gaussian_nll
from convention_problems import (
    DIMS,
    assert_agrees,
    case_of,
    flow_model,
    gaussian_points,
    rows_of,
    settings,
)
from flow_problems import VECTOR, make, strong

import models
from bench.conventions import CONVENTIONS
from bench.conventions.case import residuals, standard_error
from bench.conventions.flow import TRUNCATION, neumann, neumann_from_columns
from bench.conventions.path import expected_walk, walk
from bench.conventions.precision import Float32VP, in_float32
from bench.data import make_dataset
from bench.errors import InputError
from bench.options import signature_schema, validate
from bench.studies import Context, write_rows
from bench.studies.conventions import COLUMNS, conduct, measure
from models.flows.lipschitz import Jacobian
from models.indm import INDM
from models.noise import IndexedGenerator
from models.sde import VESDE, VPSDE

# The residual --------------------------------------------------------------------------------------------------------


def test_two_draws_turn_a_residual_of_minus_a_tenth_into_plus_a_tenth():
    """VE, data of standard deviation 0.02: sigma^2 E score^2 = 1e-4 / (4e-4 + 1e-4) = 0.2 a dimension."""
    model = gaussian_model(VESDE(), DIMS, 0.0, 0.02)
    case = case_of(model, gaussian_points(std=0.02), images=400)
    one, two = residuals(model, case.x, case.source("test", torch.arange(400)), 8)
    for value, expected in ((one, -0.1), (two, 0.1)):
        error = standard_error(value.numpy()) / DIMS
        assert abs(float(value.mean()) / DIMS - expected) < 4 * error and error < 5e-3
    rows = rows_of("two-draw-residual", case)
    truth = float(gaussian_nll(case.x, 0.0, 0.02).mean())
    for row in rows.values():
        assert_agrees(row)
        assert_agrees(row, 0.2 * DIMS)
        assert row["closed_form"] == pytest.approx(0.2 * DIMS, rel=1e-3)  # a linear score has a constant trace
        assert row["difference"] == pytest.approx(row["official"] - row["right"], abs=1e-12)
    assert rows["NLL"]["right"] == pytest.approx(truth, abs=0.02 * DIMS)
    # what the check is for: half the effect, or the other sign, would be seen
    assert abs(rows["NLL"]["difference"] - 0.1 * DIMS) > 10 * rows["NLL"]["se"]


def test_without_the_correction_both_likelihoods_change_as_the_gaussian_says():
    """Model of standard deviation 0.02, data of 0.03: v = s^2 + sigma^2, noise(z) = sigma z / v."""
    model = gaussian_model(VESDE(), DIMS, 0.0, 0.02)
    case = case_of(model, gaussian_points(std=0.03), images=400)
    rows = rows_of("no-correction", case)
    sigma2, v = 1e-4, 5e-4
    square = case.x.square().sum(1).numpy()
    residual = 0.5 * sigma2 * (square + sigma2 * DIMS) / v**2 - sigma2 * DIMS / v
    assert_agrees(rows["NELBO"])
    assert_agrees(rows["NELBO"], -residual.mean())
    # E[-log p_eps(z_eps)] is larger than -log p_eps(z_0) by sigma^2 D / (2 v)
    expected = -(sigma2 * DIMS / (2 * v) + residual).mean()
    assert_agrees(rows["NLL"], expected, least=1e-4)
    assert abs(rows["NLL"]["difference"]) > 10 * rows["NLL"]["se"]
    assert rows["NLL"]["closed_form"] is None


# The flow ------------------------------------------------------------------------------------------------------------


def test_surrogate_of_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    matrix = 0.6 * torch.eye(4, dtype=torch.float64) + 0.05 * noise
    values = torch.linalg.eigvals(matrix)
    expected = float((values / (1 + values)).real.sum())
    assert float(neumann_from_columns(matrix)) == pytest.approx(expected, rel=1e-10)
    norm = float(matrix.abs().sum(1).max())
    assert norm < 1
    like, draws = torch.zeros(400, 4, dtype=torch.float64), IndexedGenerator(0, "test", torch.arange(400))
    found = neumann(Jacobian([matrix], [None]), like, draws, norm, probes=4).numpy()
    assert abs(found.mean() - expected) < 4 * standard_error(found) + TRUNCATION
    assert 0 < standard_error(found) < 0.02
    # signs have no variance on a diagonal matrix: what is left is the truncation
    diagonal = torch.diag(torch.tensor([0.9, -0.9, 0.5, 0.0], dtype=torch.float64))
    found = neumann(Jacobian([diagonal], [None]), like, draws, 0.9, probes=1)
    expected_there = 0.9 / 1.9 - 0.9 / 0.1 + 0.5 / 1.5
    assert 0 < float((found - expected_there).abs().max()) < TRUNCATION
    # a sample's powers end by themselves, whatever the others need
    slopes = torch.tensor([0.1, 1.0], dtype=torch.float64)[:, None].expand(2, 4)
    both = neumann(Jacobian([diagonal], [slopes]), like[:2], IndexedGenerator(0, "pair", torch.arange(2)), 0.9)
    alone = neumann(Jacobian([diagonal], [slopes[:1]]), like[:1], IndexedGenerator(0, "pair", torch.arange(1)), 0.9)
    assert float(both[0]) == pytest.approx(float(alone), rel=1e-12)
    assert abs(float(both[1]) - expected_there) < TRUNCATION
    assert abs(float(torch.linalg.slogdet(torch.eye(4) + matrix).logabsdet) - expected) > 0.3


def test_training_surrogate_against_autograd():
    flow = strong(VECTOR | {"blocks": 1}, share=0.7)
    case = case_of(flow_model(flow, scale=2.0), gaussian_points(100, dims=2), images=100)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.latent(x).sum(0), case.x / 2).movedim(1, 0)
    inside = jacobian - torch.eye(2)
    surrogate = torch.stack([torch.trace(j @ torch.linalg.inv(torch.eye(2) + j)) for j in inside])
    expected = float((torch.linalg.slogdet(jacobian).logabsdet - surrogate).mean())
    rows = rows_of("training-surrogate", case)
    assert set(rows) == {"NELBO", "NLL"}
    for row in rows.values():
        assert row["closed_form"] == pytest.approx(expected, rel=1e-9)
        assert_agrees(row)
        assert abs(row["closed_form"]) > 3 * row["se"]


def test_raw_flow_is_paired_and_missing_weights_are_a_status():
    model, raw = flow_model(make(VECTOR, 0, 1.0)), flow_model(make(VECTOR, 1, 1.0))
    data = gaussian_points(100, dims=2)
    row = rows_of("raw-flow", case_of(model, data, raw))["NELBO"]
    case = case_of(model, data)
    mixed = case.nelbo(INDM(model.sde, model.score, raw.flow, shape=(2,)))
    assert row["difference"] == pytest.approx((mixed - case.right_nelbo).mean(), rel=1e-9)
    assert row["se"] == pytest.approx(standard_error(mixed - case.right_nelbo), rel=1e-9)
    assert rows_of("raw-flow", case_of(model, data, model))["NELBO"]["difference"] == 0
    assert rows_of("raw-flow", case)["NELBO"]["status"] == "not defined: raw weights were not kept"
    identity = case_of(gaussian_model(VPSDE(), 2), data, model)
    for name in ("raw-flow", "training-surrogate", "inverse-tolerance"):
        assert all(row["status"].startswith("not defined: the flow") for row in rows_of(name, identity).values())


# float32 -------------------------------------------------------------------------------------------------------------


def test_float32_gives_the_numbers_of_the_official_code():
    exact, wrong = VPSDE(), Float32VP()
    t = torch.tensor([1e-5])
    assert float(wrong.marginal(t)[1]) == pytest.approx(1.00662e-3, abs=1e-8)
    assert float(exact.marginal(t)[1]) == pytest.approx(1.00050e-3, abs=1e-8)
    u = torch.tensor([0.0, 5e-4])
    assert float(wrong.importance_time(u)[1]) == pytest.approx(23.852276, abs=5e-6)
    assert float(exact.importance_time(u.double())[1]) == pytest.approx(23.864472, abs=5e-7)
    assert wrong.importance_time(u)[0].tolist() == pytest.approx([1.0718e-5] * 2, abs=1e-9)
    # in double precision too: the cancellation is a property of the formula as written
    assert float(wrong.importance_time(u.double())[1]) == pytest.approx(23.852276, abs=5e-6)


def test_float32_lowers_the_loss_and_leaves_the_bound():
    model = gaussian_model(VPSDE(), DIMS, 0.0, 0.5)
    case = case_of(model, gaussian_points(), images=400, times=16)
    rows = rows_of("float32-near-eps", case)
    assert_agrees(rows["score loss"])
    assert rows["score loss"]["closed_form"] == pytest.approx(-0.0061 * DIMS, rel=2e-3)
    assert abs(rows["score loss"]["difference"]) > 50 * rows["score loss"]["se"]
    bound = rows["NELBO"]
    assert abs(bound["difference"]) < 4 * bound["se"] + 1e-5 and bound["se"] < 2e-4
    # the same from the two bounds themselves, at their larger noise
    direct = case.nelbo(in_float32(model)) - case.right_nelbo
    assert abs(direct.mean() - bound["difference"]) < 4 * standard_error(direct) + 1e-4
    assert rows_of("float32-near-eps", case_of(gaussian_model(VESDE()), gaussian_points()))["NELBO"]["right"] is None


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()])
def test_stochastic_path_of_a_gaussian(sde):
    """A linear score has a deterministic divergence: the mean is a sum over the grid and the chain's moments."""
    std, steps = 0.5, 60
    model = gaussian_model(sde, DIMS, 0.0, std)
    case = case_of(model, gaussian_points(), images=400, steps=steps)
    t = np.linspace(sde.eps, 1.0, steps)
    f, g2 = sde.drift(torch.tensor(t)).numpy(), sde.diffusion(torch.tensor(t)).numpy() ** 2
    alpha, sigma = (v.numpy() for v in sde.marginal(torch.tensor(t)))
    # v = f z - g^2 score / 2 and score = -z / (alpha^2 s^2 + sigma^2)
    divergence = DIMS * (f + 0.5 * g2 / ((alpha * std) ** 2 + sigma**2))
    mean, variance = 1.0, 0.0
    for k in range(steps - 1):
        h = t[k + 1] - t[k]
        mean, variance = (1 + f[k] * h) * mean, (1 + f[k] * h) ** 2 * variance + g2[k] * h
    prior = sde.prior_std**2
    square = mean**2 * case.x.square().sum(1).numpy() + DIMS * variance
    expected = 0.5 * (square / prior + DIMS * math.log(2 * math.pi * prior)) - (divergence[1:] * np.diff(t)).sum()
    rows = torch.arange(400)
    by_stein = expected_walk(case, case.x, case.source("one", rows)).numpy() - expected
    assert abs(by_stein.mean()) < 4 * standard_error(by_stein)
    found = walk(case, case.x, case.source("two", rows)).numpy() - expected
    assert abs(found.mean()) < 4 * standard_error(found)
    row = rows_of("sb-stochastic-path", case)["NLL"]
    assert_agrees(row)


# The study -----------------------------------------------------------------------------------------------------------


def perturbed_network(sde):
    """A small network away from its initialisation before a flow: no exact score, no special structure."""
    torch.manual_seed(0)
    config = {
        "name": "indm",
        "shape": [2],
        "sde": {"name": sde},
        "score": {"name": "mlp", "width": 16, "depth": 1},
        "flow": {"name": "residual", "blocks": 2, "hidden": 8},
        "preconditioning": "gaussian",
    }
    model = models.build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("sde", ["vp", "ve"])
def test_every_closed_form_agrees_on_a_network(sde, tmp_path):
    case = case_of(perturbed_network(sde), gaussian_points(100, dims=2), evaluate=settings(rtol=1e-4, atol=1e-4))
    x = case.context.data.test.float()
    context = Context(case.model, case.context.run, make_dataset("points", None, x, x), torch.device("cpu"))
    object.__setattr__(context, "raw_model", lambda: None)
    rows = measure(context, images=100, times=8, samples=64, steps=40)
    assert [(row["convention"], row["quantity"]) for row in rows if row["status"] == "ok"]
    checked = [row for row in rows if row["closed_form"] is not None]
    assert {row["convention"] for row in checked} >= {"two-draw-residual", "no-correction", "training-surrogate"}
    for row in checked:
        assert_agrees(row, least=1e-3 * abs(row["closed_form"]))
    expected = {(c.name, q) for c in CONVENTIONS.values() for q in c.quantities}
    assert {(row["convention"], row["quantity"]) for row in rows} == expected and len(rows) == len(expected)
    for row in rows:
        assert tuple(row) == COLUMNS
        assert row["status"] == "ok" or (row["status"].startswith("not defined: ") and row["right"] is None)
    write_rows(tmp_path / "conventions.csv", COLUMNS, rows)


def test_rows_do_not_depend_on_the_batch():
    model, data = gaussian_model(VPSDE(), DIMS, 0.0, 0.5), gaussian_points(60)
    found = []
    for batch in (7, 60):
        case = case_of(model, data, evaluate=settings(batch_size=batch), images=60, samples=20)
        found.append([row for name in ("two-draw-residual", "no-correction") for row in rows_of(name, case).values()])
    for one, other in zip(*found, strict=True):
        for key in ("right", "official", "difference", "se"):
            assert one[key] == pytest.approx(other[key], rel=1e-9, abs=1e-12)


def test_a_value_that_is_not_finite_becomes_a_status():
    class Broken(torch.nn.Module):
        def forward(self, z, t):
            return math.nan * z

    sde = VPSDE()
    case = case_of(INDM(sde, Broken(), shape=(2,)), gaussian_points(20, dims=2))
    rows = [row for convention in CONVENTIONS.values() for row in conduct(convention, case)]
    assert rows and all(row["status"].startswith("not defined: ") for row in rows)


def test_registry_has_texts_for_captions_and_needs_no_torch():
    for name, convention in CONVENTIONS.items():
        assert name == convention.name and convention.title and convention.quantities
        assert convention.meaning.endswith(".") and convention.source
        assert callable(convention.measure)
    code = "import sys, bench.conventions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_options_are_a_schema():
    schema = signature_schema(measure, skip=("context",))
    assert validate(schema, {"images": 50}).samples == 400
    for wrong in ({"images": 1}, {"tolerance": 0.0}, {"image": 50}):
        with pytest.raises(InputError):
            validate(schema, wrong)
