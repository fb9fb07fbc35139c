"""The study of the flow's role against closed forms and quadrature, in float64."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from analytic import AffineFlow, GaussianScore
from torch import nn

from bench.data import make_dataset
from bench.options import signature_schema
from bench.studies import Context, conduct, identities, latents
from bench.studies.entropy import gaussian_entropy, neighbour_entropy, smoothed_negentropy
from bench.studies.resampling import jackknife, kept_rows, mean_and_error
from models.indm import INDM
from models.sde import VPSDE

N = 4000
MILD = VPSDE(beta_min=0.1, beta_max=1.0)  # so little noise at time 1 that the data still show
ALPHA, SIGMA = (float(v) for v in MILD.marginal(torch.ones((), dtype=torch.float64)))


class SinhFlow(nn.Module):
    """z = sinh x in every coordinate."""

    def forward(self, x, generator=None):
        return x.sinh(), x.cosh().log().flatten(1).sum(1)


class Stretch(nn.Module):
    """z = 1.7 x, for data of any shape."""

    def forward(self, x, generator=None):
        return 1.7 * x, x.new_full((len(x),), x[0].numel() * math.log(1.7))


def normals(n=N, dims=2, seed=0):
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(n=N, seed=0, dims=2, offset=1.0, std=0.4):
    """Coordinates of two equal Gaussians at offset +- 1.5 times std 0.4, all independent; and their log-density."""
    sign = (torch.rand(n, dims, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) < 0.3) * 2.0 - 1

    def log_prob(x):
        parts = [
            torch.distributions.Normal(offset + s, std).log_prob(x) + math.log(w) for s, w in ((1, 0.3), (-1, 0.7))
        ]
        return torch.logsumexp(torch.stack(parts), 0).sum(1)

    return offset + sign + std * normals(n, dims, seed), log_prob


def context(x, flow=None, log_prob=None, sde=MILD, shape=None, train=None):
    data = make_dataset("problem", None, x[:1] if train is None else train, x, log_prob=log_prob)
    model = INDM(sde, GaussianScore(sde), flow, shape=shape or x.shape[1:])
    run = SimpleNamespace(seed=0, evaluate=SimpleNamespace(images=None, probes="exact"))
    return Context(model, run, data, torch.device("cpu"))


def measured(*args, **options):
    rows = latents.measure(context(*args, **options))
    assert all(tuple(row) == latents.COLUMNS for row in rows)
    return {(row["time"], row["quantity"]): row for row in rows}


def close(row, truth, errors=4, slack=0.0):
    assert row["status"] == "ok"
    assert abs(row["value"] - truth) < errors * row["se"] + slack, (row, truth)


def integrate(function, low=-14.0, high=14.0, nodes=400_001):
    x = torch.linspace(low, high, nodes, dtype=torch.float64)
    return float(torch.trapezoid(function(x), x))


def test_gaussian_data_behind_an_affine_flow_are_gaussian():
    x = 0.3 + 0.5 * normals()
    found = measured(
        x, AffineFlow(1.7, -0.4), log_prob=lambda x: torch.distributions.Normal(0.3, 0.5).log_prob(x).sum(1)
    )
    mean, std = 1.7 * 0.3 - 0.4, 1.7 * 0.5
    close(found[0, "mean_norm"], abs(mean))
    close(found[0, "variance"], std**2)
    close(found[0, "kl_gaussian"], 0.0)
    assert found[0, "kl_gaussian"]["se"] < 0.03
    # an affine map changes nothing, whatever the sample
    assert abs(found[0, "kl_gaussian_change"]["value"]) < 1e-10
    variance = ALPHA**2 * std**2 + SIGMA**2
    close(found[1, "variance"], variance)
    close(found[1, "mean_norm"], ALPHA * abs(mean))
    close(found[1, "kl_prior"], variance - 1 - math.log(variance) + ALPHA**2 * mean**2)
    close(found[1, "kl_gaussian"], 0.0, slack=1e-3)


def test_identity_flow_changes_nothing_at_all():
    row = measured(mixture(500)[0])[0, "kl_gaussian_change"]
    assert (row["value"], row["se"]) == (0.0, 0.0)


def test_a_nonlinear_flow_moves_gaussian_data_away():
    std = 0.8
    found = measured(
        std * normals(), SinhFlow(), log_prob=lambda x: torch.distributions.Normal(0.0, std).log_prob(x).sum(1)
    )
    density = torch.distributions.Normal(0.0, std).log_prob
    stretch = integrate(lambda x: density(x).exp() * x.cosh().log())
    variance = 0.5 * (math.exp(2 * std**2) - 1)  # E sinh^2
    truth = 2 * (0.5 * math.log(variance) - math.log(std) - stretch)
    assert truth > 0.15
    close(found[0, "kl_gaussian"], truth)
    close(found[0, "kl_gaussian_change"], truth)
    assert found[0, "kl_gaussian_change"]["se"] < 0.02


@pytest.mark.parametrize("known", [True, False], ids=["density", "neighbours"])
def test_mixture_at_both_ends(known):
    x, log_prob = mixture()
    found = measured(x, log_prob=log_prob if known else None, train=mixture(seed=10)[0])

    def cumulants(scale, noise):
        """Variance, third and fourth cumulant and negentropy of one coordinate of scale x + noise n."""
        std = math.sqrt((0.4 * scale) ** 2 + noise**2)
        normal = [torch.distributions.Normal(scale * (1 + s), std) for s in (1, -1)]

        def log_density(z):
            return torch.logsumexp(
                torch.stack([normal[0].log_prob(z) + math.log(0.3), normal[1].log_prob(z) + math.log(0.7)]), 0
            )

        def expect(f):
            return integrate(lambda z: log_density(z).exp() * f(z))

        mean = expect(lambda z: z)
        second, third, fourth = (expect(lambda z, k=k: (z - mean) ** k) for k in (2, 3, 4))
        entropy = -expect(log_density)
        return second, third, fourth - 3 * second**2, 0.5 * math.log(2 * math.pi * math.e * second) - entropy

    for time, scale, noise in ((0, 1.0, 0.0), (1, ALPHA, SIGMA)):
        variance, third, fourth, negentropy = cumulants(scale, noise)
        close(found[time, "variance"], variance)
        close(found[time, "skewness"], abs(third) / variance**1.5)
        close(found[time, "excess_kurtosis"], abs(fourth) / variance**2)
        # at time 1 the mixture over a finite sample adds a little of its own
        close(found[time, "kl_gaussian"], 2 * negentropy, slack=0.01 * time)
    assert found[0, "kl_gaussian"]["value"] > 20 * found[0, "kl_gaussian"]["se"]


def test_eigenvalue_spread_of_a_known_covariance():
    x = normals(seed=3) * torch.tensor([0.5, 2.0])
    found = measured(x)
    close(found[0, "eigenvalue_spread"], math.log(4.0))  # logarithms +- log 4 about their mean
    spread = [ALPHA**2 * v + SIGMA**2 for v in (0.25, 4.0)]
    close(found[1, "eigenvalue_spread"], 0.5 * math.log(spread[1] / spread[0]))


def test_images_have_a_change_but_no_entropy():
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(400, 1, 3, 3, generator=generator, dtype=torch.float64) * 2 - 1) ** 3
    found = measured(x, Stretch(), shape=(1, 3, 3))
    assert found[0, "kl_gaussian"]["status"] == "not defined: the entropy of the data is not known"
    assert found[0, "kl_gaussian"]["value"] is None
    assert abs(found[0, "kl_gaussian_change"]["value"]) < 1e-9
    assert found[1, "kl_gaussian"]["status"] == "ok"


def test_fewer_images_than_dimensions_have_no_covariance():
    found = measured(normals(40, 50), shape=(50,))
    for place in ((0, "kl_gaussian"), (0, "kl_gaussian_change"), (0, "eigenvalue_spread"), (1, "kl_prior")):
        assert found[place]["status"].startswith("not defined: 40 images do not determine")
    assert found[0, "variance"]["status"] == "ok"
    assert all(row["status"].startswith("not defined") for row in measured(normals(10)).values())


def test_other_models_are_reported_as_such():
    with_other = context(normals(50))
    rows = latents.measure(Context(nn.Identity(), with_other.run, with_other.data, with_other.device))
    assert len(rows) == 14 and all(row["status"].startswith("not defined: the model") for row in rows)


def test_settings_are_a_schema():
    schema = signature_schema(latents.measure, skip=("context",))
    assert schema(images=30, groups=5).groups == 5
    with pytest.raises(ValueError):
        schema(groups=1)


# The tools ------------------------------------------------------------------------------------------------------------


def test_jackknife_of_a_mean_is_its_standard_error():
    x = normals(2000, 1)[:, 0]
    found = jackknife(lambda rows: {"mean": float(x[rows].mean())}, len(x), len(x))["mean"]
    mean, se = mean_and_error(x)
    assert found.value == mean and found.corrected == pytest.approx(mean, abs=1e-9)
    assert found.se == pytest.approx(se, rel=1e-6)
    assert [len(rows) for rows in kept_rows(7, 3)] == [4, 5, 5]


def test_jackknife_removes_the_bias_of_an_entropy():
    """64 dimensions from 300 images: the plain estimate is 4 nats too low."""
    dims, n = 64, 300
    truth = 0.5 * dims * math.log(2 * math.pi * math.e)
    x = normals(n, dims, seed=5)
    found = jackknife(lambda rows: {"h": gaussian_entropy(x[rows])}, n, 20)["h"]
    assert truth - found.value > 3
    assert abs(truth - found.corrected) < 4 * found.se


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_neighbour_entropy(dims):
    value, se = neighbour_entropy(3.0 * normals(4000, dims))
    truth = dims * (0.5 * math.log(2 * math.pi * math.e) + math.log(3.0))
    assert abs(value - truth) < 4 * se + 0.02 and se < 0.05
    with pytest.raises(ValueError, match="repeat"):
        neighbour_entropy(torch.zeros(20, dims, dtype=torch.float64))


def test_smoothed_negentropy_by_quadrature():
    centres = torch.tensor([[-1.0], [-0.2], [2.0]], dtype=torch.float64)
    sigma = 0.3
    index = torch.arange(6000) % 3
    noise = normals(6000, 1)
    # the mixture of many copies of the centres is that of the three
    terms = smoothed_negentropy(centres[index], sigma, noise, chunk=1000)

    def log_density(z):
        square = (z[:, None] - centres[:, 0]).square() / (2 * sigma**2)
        return torch.logsumexp(-square, 1) - math.log(3) - 0.5 * math.log(2 * math.pi * sigma**2)

    entropy = -integrate(lambda z: log_density(z).exp() * log_density(z), -6, 8)
    variance = float(centres.var(correction=0)) + sigma**2
    truth = 0.5 * math.log(2 * math.pi * math.e * variance) - entropy
    value, se = mean_and_error(terms)
    assert abs(value - truth) < 4 * se and se < 0.01


def test_a_number_that_is_not_finite_has_no_row():
    for value, se in ((math.nan, 0.1), (0.1, math.nan), (0.1, math.inf)):
        row = latents._row(0, "variance", 9, value=value, se=se)
        assert row["value"] is row["se"] is None and row["status"].startswith("not defined: not finite")
    assert latents._row(0, "variance", 9, value=0.1, se=0.0)["status"] == "ok"


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_study_with_a_number_that_is_not_finite_does_not_stop_the_others(number, tmp_path, monkeypatch):
    def broken(context, **options):
        return [{"time": 0, "quantity": "variance", "value": number, "se": 0.1, "n": 3, "status": "ok"}]

    def sound(context, **options):
        return [{"claim": "special-case", "value": 0.0, "status": "ok"}]

    monkeypatch.setattr(latents, "measure", broken)
    monkeypatch.setattr(identities, "measure", sound)
    run = SimpleNamespace(evaluate=SimpleNamespace(studies={"latents": {}, "identities": {}}))
    conduct(Context(None, run, None, torch.device("cpu")), tmp_path)
    (row,) = csv.DictReader((tmp_path / "latents.csv").open())
    assert row["status"].startswith("not measured: latents: value = ") and set(row) == set(latents.COLUMNS)
    assert not any(row[name] for name in row if name != "status")
    (row,) = csv.DictReader((tmp_path / "identities.csv").open())
    assert row["status"] == "ok"
    # a column that the study does not have is a mistake of the program
    monkeypatch.setattr(latents, "measure", lambda context: [{"mean": 1.0}])
    with pytest.raises(ValueError, match="'mean'"):
        conduct(Context(None, run, None, torch.device("cpu")), tmp_path)
