"""Probes of the divergence, and the study of every estimator's variance against its cost."""

import csv
import json
import math

import pytest
import torch
from flow_problems import radius

import models
from bench.estimators import problems, series, time_sampling, trace
from bench.estimators.command import measure_estimators
from bench.estimators.common import Budget, Measured, source
from bench.estimators.measured_runs import MEASURED_RUNS
from bench.estimators.problems import FlowProblem, fresh_flow, gaussian_problem, near_bound
from bench.estimators.study import SUBJECTS
from bench.estimators.tables import choose_options, ratio_of_work, relate
from models.flows.log_det import Roulette
from models.flows.log_det import series as log_det_series
from models.integrators import ProbeKind, hutchinson_probes
from models.noise import IndexedGenerator, rademacher

DOUBLE = torch.float64
KINDS = pytest.mark.parametrize("kind", ProbeKind.__args__)
TINY = Budget(
    images=2,
    times=(1, 16),
    repeats=4,
    probes=(1,),
    nodes=4,
    depths=(2,),
    series_repeats=4,
)


class NoBar:
    def update(self, n=1):
        pass


def network(dims=3, seed=0):
    torch.manual_seed(seed)
    score = {"name": "mlp", "width": 16, "depth": 1}
    model = models.build(
        {"name": "indm", "shape": [dims], "sde": {"name": "vp"}, "score": score, "flow": {"name": "identity"}}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval().requires_grad_(False)


# --- probes -----------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("count", [1, 3, 5])
def test_probes_have_unit_covariance_and_the_stated_variance(kind, count):
    """E[v v'] = I; the variance of the averaged v'Mv is the closed form that the study uses (5 > D: two blocks)."""
    probes = hutchinson_probes(count, (60_000, 4), torch.Generator().manual_seed(0), dtype=DOUBLE, kind=kind)
    assert probes.shape == (count, 60_000, 4)
    covariance = torch.einsum("kni,knj->kij", probes, probes) / 60_000
    assert torch.allclose(covariance, torch.eye(4, dtype=DOUBLE).expand(count, 4, 4), atol=0.04)
    matrix = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    drawn = torch.einsum("kni,ij,knj->n", probes, matrix[0], probes) / count
    error = float(drawn.std()) / math.sqrt(60_000)
    assert abs(float(drawn.mean() - matrix[0].trace())) < 4 * error
    if count <= 4:
        assert float(drawn.var()) == pytest.approx(float(trace.probe_variance(matrix, kind, count)), rel=0.05)


@pytest.mark.parametrize("count", [4, 8])
def test_orthogonal_probes_that_span_the_space_give_the_trace_itself(count):
    probes = hutchinson_probes(count, (50, 2, 2), torch.Generator().manual_seed(0), dtype=DOUBLE, kind="orthogonal")
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    flat = probes.flatten(2)
    estimate = torch.einsum("kni,ij,knj->n", flat, matrix, flat) / count
    assert torch.allclose(estimate, matrix.trace().expand(50), atol=1e-12)
    blocks = flat.unflatten(0, (-1, 4)).transpose(1, 2)
    assert torch.allclose(blocks @ blocks.mT, 4 * torch.eye(4, dtype=DOUBLE).expand(count // 4, 50, 4, 4), atol=1e-12)
    assert float(trace.probe_variance(matrix[None], "orthogonal", 4)) == pytest.approx(0, abs=1e-12)


def test_default_probes_are_what_they_were_bit_for_bit():
    def before(count, shape, generator):
        return torch.stack([rademacher(shape, generator) for _ in range(count)])

    for make in (lambda: IndexedGenerator(0, "p", torch.arange(5)), lambda: torch.Generator().manual_seed(0)):
        assert torch.equal(hutchinson_probes(3, (5, 1, 2, 2), make()), before(3, (5, 1, 2, 2), make()))
    model, x = network(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    one, two = (IndexedGenerator(0, "p", torch.arange(5)) for _ in range(2))
    named = model.nll(x, 1e-3, 1e-3, generator=two, probes=1, probe_kind="rademacher")
    assert torch.equal(model.nll(x, 1e-3, 1e-3, generator=one), named)


@KINDS
def test_probes_do_not_depend_on_the_batch(kind):
    def probes(rows):
        index = torch.arange(7)[rows]
        return hutchinson_probes(4, (len(index), 1, 3, 2), IndexedGenerator(0, "p", index), dtype=DOUBLE, kind=kind)

    assert torch.equal(probes(slice(0, 7)), torch.cat([probes(slice(0, 2)), probes(slice(2, 7))], 1))
    model, x = network(), torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)

    def nll(rows):
        return model.nll(x[rows], 1e-4, 1e-4, probes=2, generator=source("b", 7), probe_kind=kind)

    def part(rows):
        own = IndexedGenerator(0, "estimators b", torch.arange(7)[rows])
        return model.nll(x[rows], 1e-4, 1e-4, probes=2, generator=own, probe_kind=kind)

    assert torch.allclose(nll(slice(0, 7)), torch.cat([part(slice(0, 3)), part(slice(3, 7))]), atol=1e-10)


def test_unknown_kind_of_probe_is_refused():
    with pytest.raises(ValueError, match="kind = 'sparse': accepted are rademacher, gaussian, orthogonal"):
        hutchinson_probes(1, (2, 3), None, kind="sparse")


def test_as_many_orthogonal_probes_as_dimensions_are_the_exact_divergence():
    model, x = network(), torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    options = {"rtol": 1e-8, "atol": 1e-8, "corrected": False}
    exact = model.nll(x, probes="exact", **options)
    spanning = model.nll(x, probes=3, generator=source("q", 6), probe_kind="orthogonal", **options)
    assert torch.allclose(spanning, exact, atol=1e-6)
    assert (model.nll(x, probes=3, generator=source("q", 6), **options) - exact).abs().max() > 1e-3


# --- what the study measures ------------------------------------------------------------------------------------------


@KINDS
def test_integrated_jacobian_gives_the_spread_of_the_likelihood(kind):
    """sd of the NLL over 1500 draws of the probes agrees with that from M, the trajectory's integrated Jacobian."""
    model, x = network(), torch.tensor([[0.4, -0.8, 0.3]], dtype=DOUBLE)
    matrix = trace.integrated_jacobian(model, x, 24, 1e-7)
    many = x.expand(1500, 3)
    exact = model.nll(x, 1e-5, 1e-5, probes="exact", corrected=False)
    drawn = model.nll(many, 1e-5, 1e-5, probes=2, corrected=False, generator=source("m", 1500), probe_kind=kind)
    assert float(drawn.var()) == pytest.approx(float(trace.probe_variance(matrix, kind, 2)), rel=0.15)
    assert abs(float(drawn.mean() - exact)) < 4 * float(drawn.std()) / math.sqrt(1500)


def test_integrated_jacobian_of_a_gaussian_is_its_closed_form():
    """With a linear score M has the data's eigenvectors and int b sigma s / (alpha^2 c + sigma^2) d lambda in them."""
    problem = gaussian_problem("vp", 2, 1)
    sde, score = problem.model.sde, problem.model.score
    found = trace.integrated_jacobian(problem.model, problem.x, 40, 1e-4)[0]
    levels = torch.linspace(*(float(v) for v in sde.log_ratio_range(problem.x)), 20_001, dtype=DOUBLE)
    alpha, sigma = (v[:, None] for v in sde.marginal(sde.time(levels)))
    # b s = sigma, so that b times the Jacobian in the unit-variance state is sigma^2 / (alpha^2 c + sigma^2)
    values = torch.trapezoid(sigma**2 / (alpha**2 * score.values + sigma**2), levels, dim=0)
    assert torch.allclose(found, score.vectors @ values.diag() @ score.vectors.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("regular", [False, True])
def test_group_variance_of_draws_with_a_known_law(regular):
    """Independent draws of variance 3: 3 / size. A shifted grid's mean of u: 1 / (12 size^2)."""
    generator = torch.Generator().manual_seed(0)
    if regular:
        values = (torch.arange(16, dtype=DOUBLE) + torch.rand(3, 4000, 1, generator=generator, dtype=DOUBLE)) / 16
        law = {size: 1 / (12 * size**2) for size in (1, 4, 16)}
    else:
        values = 5 + math.sqrt(3) * torch.randn(3, 4000, 16, generator=generator, dtype=DOUBLE)
        law = {size: 3 / size for size in (1, 4, 16)}
    for size, expected in law.items():
        found = time_sampling.group_variance(values, size, regular)
        assert found.shape == (3,) and torch.allclose(found, torch.full((3,), expected, dtype=DOUBLE), rtol=0.1)


def test_group_variance_allows_for_the_few_repeats_of_the_mean():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, 2, 4, generator=generator, dtype=DOUBLE)
    for size in (1, 2, 4):
        assert float(time_sampling.group_variance(values, size, False).mean()) == pytest.approx(1 / size, rel=0.03)


def test_time_sampling_finds_the_closed_form_and_the_draws_of_nelbo_parts():
    problem = gaussian_problem("vp", 2, 4)
    rows = time_sampling.measure_time_sampling(problem, Budget(images=4, times=(1, 4), repeats=200), NoBar())
    assert len(rows) == 3 * 2 * 2 * 2
    for row in rows:
        assert abs(row.values["bias"]) < 4 * row.values["bias_se"], row.values
    # the groups of the longest estimate have the variance of calls of their own
    many = problem.x.repeat_interleave(1500, 0)
    for row in rows:
        # the other proposals have rare, huge draws, and so no steady sample variance
        if row.values["times"] == 1 and (row.options["proposal"], row.options["draws"]) == (
            "importance",
            "independent",
        ):
            drawn = problem.model.nelbo_parts(many, 1, source("own", len(many)), **row.options)["diffusion"]
            variance = float(drawn.reshape(4, 1500).var(1).mean()) / 4
            assert row.values["se_integral"] ** 2 == pytest.approx(variance, rel=0.15)


def test_flow_near_its_bound_is_near_it_and_the_fresh_one_is_not():
    x = torch.zeros(2, 16)
    assert 0.85 < radius(near_bound(fresh_flow()), x) < 0.98**3
    assert radius(fresh_flow(), x) < 0.1


def test_series_finds_the_exact_value_and_its_work():
    problem = FlowProblem("near", near_bound(fresh_flow()), 0.05 * torch.rand(4, 16) - 0.025)
    budget = Budget(depths=(0, 2), series_repeats=320)
    rows = {
        tuple(row.values.get(name) for name in ("roulette", "terms", "probes")): row
        for row in series.measure_series(problem, budget, NoBar())
    }
    assert len(rows) == 1 + 4 * 2 * 2 + 2
    for (roulette, terms, _), row in rows.items():
        values = row.values
        if roulette == "exact":
            continue
        if roulette == "none":
            assert abs(values["bias"]) > 5 * values["bias_se"]
            assert values["products"] == pytest.approx(terms, rel=0.01)
        elif row.candidate:
            assert abs(values["bias"]) < 4 * values["bias_se"], values
        if roulette == "geometric 0.25":
            # 0.25 / 0.1 terms in the mean; rows still in the sum are rounded up to eighths of the batch
            assert terms + 2 < values["products"] < terms + 2.5 + 6
    assert not rows["poisson 2", 0, "gaussian"].candidate and rows["geometric 1", 0, "gaussian"].candidate


def test_truncated_series_pairs_each_probe_with_its_own_sample():
    """Where no sample draws a random term, the estimate with one term is e' J e, in a batch of any size."""
    flow = near_bound(fresh_flow())
    x = torch.rand(64, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    chain, a = next(flow.chains())[0], flow.enter(x)
    with torch.no_grad():
        _, jacobian = chain.linearise(a)
        probe = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
        value = log_det_series(jacobian, probe, torch.zeros(64, dtype=torch.long), 1, Roulette())
        assert torch.allclose(value, (probe * (jacobian @ probe)).sum(1), atol=1e-4)


# --- efficiencies and the choice --------------------------------------------------------------------------------------


def measured(options, variance, cost, trained=False, candidate=True, problem="p", probes=1):
    variance = torch.tensor(variance, dtype=DOUBLE)
    values = {"problem": problem, "probes": probes, "status": "ok"}
    return Measured(values, variance, cost, trained, candidate, {"probe_kind": options})


def test_efficiency_is_variance_times_cost_over_the_default():
    rows = [
        measured("rademacher", [2.0, 4.0], 10),
        measured("gaussian", [1.0, 3.0], 15),
        measured("gaussian", [1.0, 1.0], 1, probes=8),
    ]
    relate(SUBJECTS["trace"], rows)
    assert [row.values["efficiency"] for row in rows] == [1.0, pytest.approx(4 * 15 / (6 * 10)), None]
    left = torch.tensor([3 * 15 / (4 * 10), 1 * 15 / (2 * 10)])  # one image left out at a time
    expected = math.sqrt(float((left - left.mean()).square().sum()) / 2)
    assert ratio_of_work(rows[1], rows[0]) == (pytest.approx(1.0), pytest.approx(expected))


def choice(rows):
    relate(SUBJECTS["trace"], rows)
    return choose_options(SUBJECTS["trace"], rows)


def test_choice_takes_the_least_work_of_the_candidates_beyond_chance():
    default, better = measured("rademacher", [1.0, 1.1, 0.9], 2), measured("orthogonal", [0.5, 0.6, 0.4], 2)
    chosen = choice([default, better])
    assert chosen["options"] == {"probe_kind": "orthogonal"} and chosen["same"] is False
    assert chosen["sentence"].startswith("chosen: probe_kind orthogonal, because its variance x cost is 0.5")
    assert chosen["sentence"].endswith("the code's default differs: probe_kind rademacher.")
    # cheaper variance at a higher price, a biased setting, and a difference within chance do not replace the default
    for other in (
        measured("orthogonal", [0.5, 0.6, 0.4], 5),
        measured("orthogonal", [0.1, 0.1, 0.1], 2, candidate=False),
        measured("orthogonal", [3.0, 0.1, 0.1], 1.8),
    ):
        kept = choice([default, other])
        assert kept["options"] == {"probe_kind": "rademacher"} and kept["same"] is True
        assert "is the same" in kept["sentence"]


def test_choice_is_made_on_trained_networks_where_there_are_any():
    rows = [
        measured("rademacher", [1.0, 1.1], 2),
        measured("orthogonal", [0.5, 0.55], 2),
        measured("rademacher", [1.0, 1.1], 2, trained=True, problem="net"),
        measured("orthogonal", [4.0, 4.4], 2, trained=True, problem="net"),
    ]
    chosen = choice(rows)
    assert chosen["same"] and chosen["problems"] == ["net"]
    assert choice(rows[:2])["problems"] == ["p"] and not choice(rows[:2])["same"]


# --- the whole --------------------------------------------------------------------------------------------------------


def test_measure_estimators_writes_every_table_without_trained_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("INDM_BENCH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(problems, "DIMS", (16,))
    monkeypatch.delitem(problems.SDES, "subvp")
    out = tmp_path / "out"
    measure_estimators(out, TINY)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["schema"] == 1 and set(summary["chosen"]) == {"time_sampling", "trace", "series"}
    assert summary["seconds"] > 0 and "packages" in summary["provenance"]
    for name, subject in SUBJECTS.items():
        assert summary["chosen"][name]["sentence"].startswith("chosen: ")
        assert summary["chosen"][name]["default"] == subject.defaults
        with open(out / f"{name}.csv", newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert tuple(rows[0]) == subject.columns
        missing = [row for row in rows if row["status"] != "ok"]
        names = [" ".join(run) for run in MEASURED_RUNS]
        assert [row["problem"] for row in missing] == names[name == "series" :]
        assert all(row["status"].startswith("not defined: ") for row in missing)
        defaults = [row for row in rows if row["efficiency"] == "1"]
        names = {row["problem"] for row in rows if row["status"] == "ok"}
        assert {row["problem"] for row in defaults} == names
        text = (out / f"{name}.md").read_text()
        assert summary["chosen"][name]["sentence"][1:] in text and all(problem in text for problem in names)
        assert 1000 < (out / "figures" / f"{name}.png").stat().st_size < 150_000


def test_defaults_are_read_from_the_code():
    assert SUBJECTS["time_sampling"].defaults == {
        "proposal": "importance",
        "draws": "stratified",
        "control_variate": True,
    }
    assert SUBJECTS["trace"].defaults == {"probe_kind": "rademacher"}
    assert SUBJECTS["series"].defaults == {"terms_eval": 2, "roulette": "geometric 0.25", "probes": "rademacher"}
    assert SUBJECTS["series"].defaults["roulette"] in series.ROULETTES
