"""Log-determinants of flows: exact, and by the series with its roulette, unbiased in value and gradient."""

import math

import pytest
import torch
from flow_problems import DOUBLE, IMAGE, SHAPES, SQUEEZED, VECTOR, autograd_log_det, make, points, radius, strong
from torch import Tensor

from models.flows import ResidualFlow, log_det
from models.flows.log_det import Roulette, columns, log_det_from_columns

# --- exact log-determinant --------------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("build", [make, strong], ids=["capped", "strong"])
def test_exact_log_det_and_gradient_equal_autograd(config, build):
    flow, x = build(config, log_det="exact"), points(config, 3).requires_grad_()
    value, truth = flow(x)[1], autograd_log_det(flow, x)
    assert value.abs().max() > 1e-3
    assert torch.allclose(value, truth, atol=1e-11)
    leaves = [x, *flow.parameters()]
    ours = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad(truth.sum(), leaves, allow_unused=True)
    for leaf, a, b in zip(leaves, ours, theirs, strict=True):
        a, b = (torch.zeros_like(leaf) if g is None else g for g in (a, b))
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("dims", [1, 2, 3, 9])
def test_exact_log_det_of_vectors_of_any_length(dims):
    config = {"shape": [dims], "blocks": 2, "hidden": 12}
    flow, x = strong(config, log_det="exact"), points(config, 4)
    assert torch.allclose(flow(x)[1], autograd_log_det(flow, x), atol=1e-11)


def test_chunks_of_columns_change_nothing(monkeypatch):
    flow, x = strong(SQUEEZED, log_det="exact"), points(SQUEEZED, 5)
    whole = flow(x)[1]
    for budget in (1, 300, 9000):
        monkeypatch.setitem(log_det.COLUMN_BUDGET, "cpu", budget)
        assert torch.allclose(flow(x)[1], whole, atol=1e-13)


def test_auto_is_exact_where_dimensions_are_few():
    def is_exact(flow: ResidualFlow, x: Tensor) -> bool:
        return torch.equal(flow(x)[1], flow(x)[1])

    vector, image = strong(VECTOR), strong(IMAGE)
    assert is_exact(vector.train(), points(VECTOR, 4)) and is_exact(vector.eval(), points(VECTOR, 4))
    assert not is_exact(image.train(), points(IMAGE, 4)) and is_exact(image.eval(), points(IMAGE, 4))
    assert not is_exact(strong(IMAGE, log_det="series").eval(), points(IMAGE, 4))


# --- series -----------------------------------------------------------------------------------------------------------

SERIES = {"shape": [3], "blocks": 2, "hidden": 8}


@pytest.mark.parametrize(
    ("share", "options", "training"),
    [
        (1.0, {"roulette": "geometric", "probes": "rademacher"}, True),
        (1.0, {"roulette": "geometric", "probes": "gaussian", "terms_eval": 4}, False),
        (0.6, {"roulette": "poisson", "probes": "gaussian"}, True),
        (0.6, {"roulette": "poisson", "probes": "rademacher", "terms_eval": 1}, False),
    ],
    ids=["geometric-train", "geometric-eval", "poisson-train", "poisson-eval"],
)
@pytest.mark.parametrize("config", [SERIES, IMAGE | {"blocks": (1, 1), "hidden": 4}], ids=["vector", "image"])
def test_series_is_unbiased_in_value_and_gradient(config, share, options, training):
    """Mean over many draws within 4 standard errors of the exact value, and of the exact gradient along itself.

    The point's log-determinant is large against the standard error, so that a wrong sign or weight of one term fails.
    """
    flow = strong(config, share, seed=1, log_det="series", **options).train(training)
    exact = strong(config, share, seed=1, log_det="exact", **options)
    x = 0.05 * points(config, 1)
    assert radius(exact, x) > 0.25 * share
    x = x.requires_grad_()
    truth = exact(x)[1].sum()
    gradient = torch.autograd.grad(truth, [x, *exact.parameters()], materialize_grads=True)
    size = sum((g * g).sum() for g in gradient).item()

    generator = torch.Generator().manual_seed(5)
    values, slopes = [], []
    for _ in range(40):
        value = flow(x.expand(400, *x.shape[1:]), generator)[1]
        values.append(value.mean().item())
        found = torch.autograd.grad(value.mean(), [x, *flow.parameters()], materialize_grads=True)
        slopes.append(sum((f * g).sum() for f, g in zip(found, gradient, strict=True)).item() / size)
    for name, draws, target in (("value", values, truth.item()), ("gradient", slopes, 1.0)):
        draws = torch.tensor(draws, dtype=DOUBLE)
        error = draws.std().item() / math.sqrt(len(draws))
        assert error < 0.03 * abs(target), name
        assert abs(draws.mean().item() - target) < 4 * error, name


def test_series_value_is_the_log_determinant_not_the_surrogate():
    """The Neumann surrogate's value is tr(J (I + J)^-1); here that is far from log det(I + J)."""
    flow = strong(SERIES | {"blocks": 1}, log_det="series", terms_train=400).train()
    x = 0.05 * points(SERIES, 1)
    _, jacobian = next(flow.chains())[0].linearise(flow.enter(x))
    matrix = columns(jacobian, x)[0].detach().T
    eye = torch.eye(3, dtype=DOUBLE)
    surrogate = torch.trace(matrix @ torch.linalg.inv(eye + matrix)).item()
    truth = log_det_from_columns(matrix).item()
    value = flow(x.expand(4000, -1), torch.Generator().manual_seed(0))[1].mean().item()
    assert abs(surrogate - truth) > 0.3 * abs(truth)
    assert value == pytest.approx(truth, rel=0.05)


def test_series_with_gradient_off_equals_its_value_with_gradient():
    flow, x = strong(IMAGE, log_det="series"), points(IMAGE, 9)
    with torch.no_grad():
        off = flow(x, torch.Generator().manual_seed(3))[1]
    on = flow(x, torch.Generator().manual_seed(3))[1]
    assert on.requires_grad and torch.allclose(on, off, atol=1e-14)


def test_series_ends_early_only_below_rounding():
    """A fresh flow's powers of J vanish quickly; stopping there agrees with the exact value of a probe-free case."""
    config = {"shape": [1], "blocks": 1, "hidden": 4}  # with D = 1 a Rademacher probe has no variance
    flow = make(config, scale=0.3, log_det="series", terms_eval=200)
    x = points(config, 16)
    with torch.no_grad():
        value = flow(x, torch.Generator())[1]
        flow.log_det = "exact"
        assert torch.allclose(value, flow(x)[1], atol=1e-14, rtol=1e-12) and value.abs().max() > 1e-4


def test_generator_decides_the_series_and_leaves_the_global_state_alone():
    flow, x = strong(IMAGE).train(), points(IMAGE, 12)
    state = torch.get_rng_state()
    draws = [flow(x, torch.Generator().manual_seed(seed))[1] for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(flow(x, generator)[1], draws[0]) and not torch.equal(flow(x, generator)[1], draws[0])
    torch.manual_seed(4)
    first = flow(x)[1]
    torch.manual_seed(4)
    assert torch.equal(flow(x)[1], first)


# --- roulette ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("roulette", [Roulette(), Roulette(entry=1.0, stay=0.5), Roulette("poisson", rate=2.0)])
@pytest.mark.parametrize("groups", [1, 8, 40])
def test_roulette_lengths_have_the_stated_tail(roulette, groups):
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([roulette.draw(40, groups, generator) for _ in range(600)]).double()
    assert draws.shape == (600, 40)
    for k in (1, 2, 4, 8):
        expected = roulette.survival(k)
        for sample in (0, 17, 39):  # every place in the batch has the distribution, whatever its group
            error = math.sqrt(expected * (1 - expected) / 600)
            assert abs((draws[:, sample] >= k).double().mean().item() - expected) <= 4.5 * error
    assert roulette.survival(0) == 1.0


def test_roulette_survival_closed_forms():
    assert Roulette("poisson", rate=2.0).survival(1) == pytest.approx(1 - math.exp(-2), rel=1e-12)
    assert Roulette("poisson", rate=2.0).survival(3) == pytest.approx(1 - 5 * math.exp(-2), rel=1e-12)
    assert Roulette(entry=0.25, stay=0.9).survival(3) == pytest.approx(0.25 * 0.81)
    # The condition for a finite second moment at the Lipschitz bound, which the defaults are chosen for.
    assert Roulette().stay > 0.98**6
