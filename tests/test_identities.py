"""The study of the mathematical claims: exact scores must pass it, and what is wrong must fail it."""

import math
from types import SimpleNamespace

import pytest
import torch
from analytic import AffineFlow, GaussianScore, gaussian_nll
from torch import nn

from bench.data import make_dataset
from bench.distances import energy_distance
from bench.options import signature_schema
from bench.studies import Context, equivalence, identities, matching, special_case, time_variance
from models.flows import Identity
from models.indm import INDM
from models.noise import IndexedGenerator
from models.score.adapter import NetworkScore
from models.score.mlp import ScoreMLP
from models.sde import VESDE, VPSDE, SubVPSDE, expand
from models.time_sampling import PROPOSALS
from models.variational import negative_elbo, sample_member

SDES = {"vp": VPSDE, "subvp": SubVPSDE, "ve": VESDE}
MEAN, STD = 0.3, 0.5


class Scaled(nn.Module):
    """A score times a factor, as a wrong one."""

    def __init__(self, score, factor):
        super().__init__()
        self.score, self.factor = score, factor

    def forward(self, z, t):
        return self.factor * self.score(z, t)


def source(n, purpose="test", seed=0):
    return IndexedGenerator(seed, purpose, torch.arange(n))


def gaussian_points(n=64, dims=2):
    return MEAN + STD * source(n, "data").normal((n, dims), dtype=torch.float64)


def context(model, x):
    run = SimpleNamespace(seed=0, evaluate=SimpleNamespace(images=None, probes="exact"))
    return Context(model, run, make_dataset("problem", None, x, x), torch.device("cpu"))


def network(sde, flow=None, scale=1.0, dims=2):
    """A small untrained network whose last layer is not zero."""
    torch.manual_seed(0)
    net = ScoreMLP([dims], width=16, depth=1, input_frequencies=1)
    nn.init.normal_(net.head.weight, std=0.3)
    return INDM(sde, NetworkScore(net, sde, "gaussian"), flow, shape=(dims,), scale=scale).requires_grad_(False)


def exact(sde, flow=None, factor=1.0, mean=MEAN, std=STD):
    score = GaussianScore(sde, mean, std)
    return INDM(sde, score if factor == 1 else Scaled(score, factor), flow, shape=(2,))


# The special case -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", SDES)
def test_identity_flow_is_the_linear_diffusion_bit_for_bit(name, scale):
    found = special_case.compare(context(network(SDES[name](), scale=scale), gaussian_points().float()), 16)
    assert tuple(found) == special_case.QUANTITIES
    assert {name: value for name, (value, _) in found.items()} == dict.fromkeys(found, 0.0)
    assert found["likelihood_loss_gradient"][1] > 500 and found["nelbo"][1] == 16


def test_every_quantity_sees_a_flow_that_is_almost_the_identity():
    class Almost(Identity):
        def forward(self, x, generator=None):
            return 1.001 * x, x.new_full((len(x),), x[0].numel() * math.log(1.001))

        def latent(self, x):
            return 1.001 * x

        def inverse(self, z):
            return z / 1.001

    found = special_case.compare(context(network(VPSDE(), Almost()), gaussian_points().float()), 16)
    assert all(value > 1e-6 for value, _ in found.values()), found


def test_two_failures_are_no_agreement(monkeypatch):
    def lost(self, x, *args, **options):
        return torch.full((len(x),), math.nan)

    monkeypatch.setattr(INDM, "nelbo_parts", lambda *args, **options: {"prior": lost(*args)})
    monkeypatch.setattr(special_case.LinearDiffusion, "nelbo", lost)
    run = context(network(VPSDE()), gaussian_points().float())
    rows = {row["quantity"]: row for row in identities._special_case(run, 4)}
    assert rows["nelbo"]["status"].startswith("not defined: not finite") and rows["nelbo"]["value"] is None
    assert rows["nll"]["status"] == "ok" and rows["nll"]["value"] == 0
    infinite = torch.full((2,), math.inf)
    assert math.isnan(special_case._largest(infinite, infinite))
    assert math.isnan(special_case._largest(torch.zeros(2), infinite))
    assert special_case._largest(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])) == 0.5


def test_another_flow_is_no_special_case():
    rows = identities._special_case(context(exact(VPSDE(), AffineFlow()), gaussian_points()), 8)
    assert len(rows) == len(special_case.QUANTITIES)
    assert {row["status"] for row in rows} == {"not defined: the flow is not the identity"}


# The family of plug-in reverse SDEs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9, 1.0])
def test_bound_of_each_member_is_the_density_for_an_exact_score(weight):
    """N(0.7, 0.5^2) at 1.1: log p = -0.5458, and 0.004 below it the prior's mismatch at time 1."""
    sde, n = VPSDE(), 1 if weight == 1 else 4000
    model = INDM(sde, GaussianScore(sde, 0.7, 0.5), shape=(1,))
    bound = negative_elbo(model.noise, sde, torch.full((n, 1), 1.1).double(), weight, 96, source(n))
    assert float(gaussian_nll(torch.full((1, 1), 1.1), 0.7, 0.5)) == pytest.approx(0.5458, abs=1e-4)
    if weight == 1:
        assert float(bound) == pytest.approx(0.5495, abs=1e-4)
    else:
        assert abs(float(bound.mean()) - 0.5495) < 3.5 * float(bound.std()) / math.sqrt(n) + 4e-3


@pytest.mark.parametrize("weight, known", [(0.0, 0.93), (0.5, 1.48), (1.0, 8.40)])
def test_bounds_of_a_wrong_score_are_those_of_different_models(weight, known):
    sde, n = VPSDE(), 1 if weight == 1 else 2000
    score = Scaled(GaussianScore(sde, 0.7, 0.5), 1.3)
    noise = INDM(sde, score, shape=(1,)).noise
    bound = negative_elbo(noise, sde, torch.full((n, 1), 1.1).double(), weight, 96, source(n))
    error = 0.0 if weight == 1 else float(bound.std()) / math.sqrt(n)
    assert abs(float(bound.mean()) - known) < 3.5 * error + 0.03


@pytest.mark.parametrize("name", SDES)
def test_last_member_by_fixed_steps_is_the_ode_likelihood(name):
    """Fourth order, and the model's own adaptive solver in other variables."""
    sde = SDES[name]()
    model, x = exact(sde), gaussian_points(20)
    parts = model.nll_parts(x, 1e-8, 1e-8, "exact", corrected=False)
    truth = parts["prior"] + parts["ode"]
    errors = [float((negative_elbo(model.noise, sde, x, 1.0, steps) - truth).abs().max()) for steps in (32, 64)]
    assert errors[1] < 2e-3
    assert errors[1] < errors[0] / 10


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_a_step_is_exact_for_a_point_mass(weight):
    """With all data at c the predicted clean sample is c for ever: any number of steps gives the same law."""
    sde, n, start = VPSDE(eps=0.05), 20_000, 0.4
    model = INDM(sde, GaussianScore(sde, 0.7, 0.0), shape=(1,))
    ends = torch.tensor([sde.eps, 1.0], dtype=torch.float64)
    alpha, sigma = sde.marginal(ends)
    low, high = sigma / alpha
    mean = 0.7 + (low / high) ** (2 - weight) * (start / alpha[1] - 0.7)
    std = low * (1 - (low / high) ** (2 - 2 * weight)).clamp_min(0).sqrt()
    for steps in (1, 7):
        z, _ = sample_member(model.noise, sde, torch.full((n, 1), start).double(), weight, steps, source(n))
        y = z / alpha[0]
        assert abs(float(y.mean() - mean)) < 4 * float(std) / math.sqrt(n) + 1e-6
        assert float(y.std()) == pytest.approx(float(std), rel=0.02, abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_members_follow_their_definition(weight):
    """Against Euler and Maruyama on drift f z - (1 - weight / 2) g^2 score and noise sqrt(1 - weight) g."""
    sde, n, steps = VPSDE(eps=0.2, beta_max=4.0), 4000, 250
    score = Scaled(GaussianScore(sde, 0.7, 0.4), 1.2)  # wrong, so that the members differ
    noise = INDM(sde, score, shape=(1,)).noise
    start = 0.5 + source(n, "start").normal((n, 1), dtype=torch.float64)
    z, generator, h = start, source(n, "euler"), (1 - sde.eps) / steps
    for k in range(steps):
        t = torch.full((n,), 1 - k * h, dtype=torch.float64)
        f, g = expand(sde.drift(t), z), expand(sde.diffusion(t), z)
        z = z - h * (f * z - (1 - weight / 2) * g**2 * score(z, t))
        z = z + math.sqrt((1 - weight) * h) * g * generator.normal(z.shape, dtype=torch.float64)
    ours, _ = sample_member(noise, sde, start, weight, 100, source(n, "ours"))
    error = float(z.std()) / math.sqrt(n)
    assert abs(float(ours.mean() - z.mean())) < 5 * error + 0.01
    assert abs(float(ours.std() - z.std())) < 4 * error + 0.01


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_few_steps_reach_the_data(weight):
    sde, n = VPSDE(), 20_000
    model = INDM(sde, GaussianScore(sde, 0.7, 0.5), shape=(1,))
    start = source(n, "prior").normal((n, 1), dtype=torch.float64)
    errors = [float(sample_member(model.noise, sde, start, weight, k, source(n))[0].std()) / 0.5 - 1 for k in (32, 128)]
    assert abs(errors[0]) < 0.035  # a first-order step: -0.09 to -0.16
    assert abs(errors[1]) < 0.015


def test_marginals_agree_for_an_exact_score_and_not_for_a_wrong_one():
    settings = equivalence.Settings(samples=600, steps=48, images=8, likelihood_steps=16)
    right = equivalence.marginals(context(exact(VPSDE()), gaussian_points()), settings)
    assert set(right) == set(equivalence.MARGINALS)
    for value, expected, se, n in right.values():
        assert abs(value - expected) < 4 * se and 0 < se < 0.02 and n == 600
    wrong = equivalence.marginals(context(exact(VPSDE(), factor=1.5), gaussian_points()), settings)
    value, expected, se, _ = wrong["energy_sde_1"]
    assert value - expected > 5 * se


def test_energy_distance_by_groups_is_the_energy_distance():
    x, y = source(60, "x").normal((60, 3)), source(60, "y").normal((60, 3)) + 0.5
    distance = equivalence.EnergyDistance(x, y, 5)
    assert distance.value() == pytest.approx(energy_distance(x, y), rel=1e-5)
    kept = torch.arange(60) // 12 != 2
    assert float(distance.without()[2]) == pytest.approx(energy_distance(x[kept], y[kept]), rel=1e-5)


# The denoising loss and the ELBO --------------------------------------------------------------------------------------


def matched(sde, dims=2, points=64, probes=1):
    model = network(sde, dims=dims).double().requires_grad_(True)
    z0, weights = gaussian_points(6, dims), list(model.score.parameters())
    return (
        matching.gradient_difference(model.noise, weights, sde, z0, points, 12, 0, probes),
        matching.bound_difference(model.noise, sde, z0, points, 12, 0, probes),
    )


@pytest.mark.parametrize("name", SDES)
def test_both_losses_agree_in_gradient_and_value(name):
    gradient, bound = matched(SDES[name]())
    assert abs(gradient[0]) < 4 * gradient[1] and gradient[1] < 0.01
    assert abs(bound[0]) < 4 * bound[1] and bound[1] < 0.2


def test_both_losses_agree_with_hutchinson_probes():
    gradient, bound = matched(VPSDE(), dims=6, points=128, probes=2)
    assert abs(gradient[0]) < 4 * gradient[1] and gradient[1] < 0.05
    assert abs(bound[0]) < 4 * bound[1] and bound[1] < 0.5


def test_a_wrong_divergence_is_noticed(monkeypatch):
    right = matching.divergence
    monkeypatch.setattr(matching, "divergence", lambda *args, **options: 0.8 * right(*args, **options))
    for value, se in matched(VPSDE()):
        assert abs(value) > 6 * se


def test_norm_of_the_noise_is_taken_out_without_bias():
    """A prediction linear in the noise leaves a gap that is all norm; any trace at all leaves the mean."""
    excess = source(4000, "excess").normal((4000, 3), dtype=torch.float64).square() - 1
    trace = torch.full_like(excess, 0.4)
    assert float(matching.without_norm(-0.6 * excess, excess, trace).abs().max()) < 1e-9
    wild = matching.without_norm(-0.6 * excess, excess, source(4000, "trace").normal((4000, 3), dtype=torch.float64))
    assert abs(float(wild.mean())) < 4 * float(wild.std()) / math.sqrt(12_000)


def test_relative_square_is_unbiased_and_its_error_right():
    """d ~ N(m, I) with |m|^2 = 0.5 and g of length 2: 0.125 on average, over many repetitions."""
    generator, dims, found = torch.Generator().manual_seed(0), 50, []
    for _ in range(200):
        d = torch.randn(12, dims, generator=generator, dtype=torch.float64) + math.sqrt(0.5 / dims)
        g = 0.01 * torch.randn(12, dims, generator=generator, dtype=torch.float64) + 2 / math.sqrt(dims)
        found.append(matching.relative_square(d, g))
    values, errors = torch.tensor(found).T
    assert float(values.mean()) == pytest.approx(0.125, abs=4 * float(values.std()) / math.sqrt(200))
    # the jackknife errs on the safe side for such products, by up to a root of two
    assert 0.9 < float(errors.square().mean().sqrt()) / float(values.std()) < 1.6
    lost = torch.randn(12, dims, generator=generator, dtype=torch.float64)
    assert matching.relative_square(lost, lost.flip(0)) is None


# Time sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [False, True], ids=["mean", "paired"])
@pytest.mark.parametrize("proposal", time_variance.PROPOSALS)
def test_variances_are_those_of_drawing_from_the_proposal(proposal, paired):
    sde, draws = VPSDE(eps=3e-4), 200_000
    model, z0 = exact(sde), gaussian_points(2)
    found = time_variance.variances(model.noise, sde, z0, 40_000, 0)[proposal + ("_paired" if paired else "")]
    for k in range(2):
        generator = source(draws, f"direct {proposal} {k}")
        t, weight = PROPOSALS[proposal](sde, generator.uniform((draws, 1), dtype=torch.float64)[:, 0])
        drawn = generator.normal((draws, 2), dtype=torch.float64)
        error = (model.noise(model.perturb(z0[k : k + 1].expand(draws, -1), t, drawn), t) - drawn).square().sum(1)
        terms = weight * (error - (drawn.square().sum(1) if paired else 2))
        square = (terms - terms.mean()).square()
        se = float(square.std()) / math.sqrt(draws)
        assert abs(float(found[k]) - float(square.mean())) < 4 * se + 0.02 * float(found[k])


def test_uniform_time_is_worse_for_vp():
    z0 = gaussian_points(32)
    found = time_variance.log_variance_ratios(exact(VPSDE()).noise, VPSDE(), z0, 64, 0)
    assert tuple(found) == time_variance.QUANTITIES
    for name in time_variance.QUANTITIES[:2]:
        value, se = found[name]
        assert value > 2 and se < 0.5


def test_for_ve_every_proposal_is_uniform_time():
    z0 = gaussian_points(4)
    found = time_variance.variances(exact(VESDE()).noise, VESDE(), z0, 8, 0)
    for name in ("debiased", "importance"):
        torch.testing.assert_close(found[name], found["uniform"])
    with pytest.raises(ValueError, match="is constant"):
        time_variance.log_variance_ratios(exact(VESDE()).noise, VESDE(), z0, 8, 0)


# The whole study ------------------------------------------------------------------------------------------------------


def test_study_of_an_exact_score():
    model = exact(VPSDE(), AffineFlow(1.25, 0.1), mean=1.25 * MEAN + 0.1, std=1.25 * STD)
    rows = identities.measure(
        context(model, gaussian_points()),
        samples=400,
        sampler_steps=32,
        likelihood_images=40,
        repeats=16,
        behind_flow=True,
    )
    left_out = identities.measure(context(model, gaussian_points()))
    assert {row["status"][:35] for row in left_out} == {"not defined: checked on linear diff"}
    assert all(tuple(row) == identities.COLUMNS for row in rows)
    assert [row["claim"] for row in rows] == [claim for claim, names in identities.CLAIMS.items() for _ in names]
    assert [row["quantity"] for row in rows] == [name for names in identities.CLAIMS.values() for name in names]
    by_name = {row["quantity"]: row for row in rows}
    for name in ("bound_difference", *equivalence.QUANTITIES):
        row = by_name[name]
        assert row["status"] == "ok"
        assert abs(row["value"] - (row["expected"] or 0.0)) < 4 * row["se"]
    assert by_name["cnf_likelihood"]["se"] < 2e-3
    again = identities.measure(
        context(model, gaussian_points()),
        samples=400,
        sampler_steps=32,
        likelihood_images=40,
        repeats=16,
        behind_flow=True,
    )
    assert rows == again


def test_study_of_a_network_with_the_identity_flow():
    model = network(VPSDE())
    rows = identities.measure(
        context(model, gaussian_points().float()),
        compared=4,
        draws=4,
        gradient_points=8,
        bound_points=8,
        samples=40,
        sampler_steps=4,
        likelihood_images=4,
        likelihood_steps=16,
        repeats=4,
    )
    by_name = {row["quantity"]: row for row in rows}
    for name in special_case.QUANTITIES:
        assert (by_name[name]["value"], by_name[name]["expected"], by_name[name]["status"]) == (0.0, 0.0, "ok")
    assert not any(p.requires_grad for p in model.parameters()) and next(model.parameters()).dtype == torch.float32


def test_what_cannot_be_computed_is_a_row_with_a_reason():
    class Broken(nn.Module):
        def forward(self, z, t):
            return z * math.nan

    rows = identities.measure(
        context(INDM(VPSDE(), Broken(), AffineFlow(), shape=(2,)), gaussian_points()), behind_flow=True
    )
    assert all(row["status"].startswith("not defined: ") and row["value"] is None for row in rows)
    by_name = {row["quantity"]: row for row in rows}
    assert by_name["bound_difference"]["status"] == "not defined: the score has no weights"
    other = Context(nn.Identity(), None, make_dataset("p", None, torch.ones(3, 2), torch.ones(3, 2)), None)
    assert {row["status"] for row in identities.measure(other)} == {
        "not defined: the model is not a linear diffusion behind a flow"
    }


def test_settings_are_a_schema():
    schema = signature_schema(identities.measure, skip=("context",))
    assert schema(samples=100).samples == 100 and schema().samples is None
    for wrong in ({"draws": 2}, {"samples": 5}, {"unknown": 1}):
        with pytest.raises(ValueError):
            schema(**wrong)
