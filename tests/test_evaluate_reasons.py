"""Each quantity of a model stands alone: what is not defined or failed is null with a reason, the rest is measured."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from toy_model import LEVELS, SETTINGS, SIDE, Toy

from bench.config import load_suite
from bench.data import make_dataset, quantise
from bench.errors import InputError
from bench.evaluate import curve_point, evaluate, extractor_name, protocol, robustness
from bench.likelihood import QUANTITIES, USUAL_NFE, bound_kind, expected_costs, measure
from bench.sampling import draw
from models.base import NotDefined
from models.diffflow import DiffFlow
from models.integrators import IntegrationError

IMAGES, DIMS = 12, SIDE * SIDE


@pytest.fixture
def images():
    pixels = torch.randint(0, LEVELS, (2 * IMAGES, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    return make_dataset("small", LEVELS, pixels[:IMAGES], pixels[IMAGES:])


@pytest.fixture
def points():
    drawn = torch.randn(2 * IMAGES, 2, generator=torch.Generator().manual_seed(0))
    density = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    return make_dataset("plane", None, drawn[:IMAGES], drawn[IMAGES:], log_prob=density.log_prob)


def test_all_quantities_in_their_units(images):
    record, arrays = measure(Toy(), images, SETTINGS, seed=3)
    assert record["status"] == "ok" and record["reasons"] == {}
    nats = arrays["nll"].mean()
    scale, offset = DIMS * math.log(2), math.log2(LEVELS / 2)
    assert record["nll"]["corrected"]["total"] == pytest.approx(nats / scale + offset, rel=1e-6)
    assert record["gap"]["corrected"]["total"] == pytest.approx(0.5 / scale, rel=1e-5)
    # a probability of grey levels has no offset: the uniform law takes log2(17) bits a pixel
    assert record["discrete"]["total"] == pytest.approx(math.log2(LEVELS), rel=1e-6)
    assert "dequantisation" not in record["discrete"]["parts"]
    chain = record["chain"]
    assert sum(chain["parts"].values()) == pytest.approx(chain["total"]) and chain["parts"]["dequantisation"] == offset
    assert chain["total"] == pytest.approx((nats + 1) / scale + offset, abs=4 / math.sqrt(3 * IMAGES) / scale)
    assert (chain["steps"], chain["repeats"]) == (7, 3)
    assert set(arrays) == {
        *("nelbo", "nelbo_uncorrected", "nll", "nll_uncorrected", "nfe", "chain", "discrete", "index")
    }


def test_chain_is_the_mean_of_as_many_paths_as_repeats(images):
    model = Toy()
    record, arrays = measure(model, images, SETTINGS, seed=3)
    assert model.calls.count("chain") == SETTINGS.nelbo_repeats * math.ceil(IMAGES / SETTINGS.batch_size)
    noise = arrays["chain"] - arrays["nll"] - 1
    assert noise.std() == pytest.approx(1 / math.sqrt(3), rel=0.6)  # three paths averaged, by image
    again, _ = measure(Toy(), images, SETTINGS.model_copy(update={"batch_size": 12}), seed=3)
    assert again["chain"]["total"] == pytest.approx(record["chain"]["total"], rel=1e-6)


@pytest.mark.parametrize("error", [NotDefined("not defined: because"), IntegrationError("the step  became\ntoo small")])
@pytest.mark.parametrize("lost", ["nelbo", "nll", "chain", "discrete"])
def test_a_quantity_that_fails_takes_no_other_with_it(images, lost, error):
    whole, _ = measure(Toy(), images, SETTINGS, seed=3)
    record, arrays = measure(Toy(lacking={lost: error}), images, SETTINGS, seed=3)
    reason = " ".join(str(error).split())
    gone = {lost, "gap"} if lost in ("nelbo", "nll") else {lost}
    assert record["reasons"] == dict.fromkeys(gone, reason)
    for name in QUANTITIES:
        assert record[name] == (None if name in gone else whole[name])
    assert record["status"] == "ok"
    assert lost not in arrays and all(np.isfinite(values).all() for values in arrays.values())


def test_failure_of_everything_is_the_status(points):
    lacking = {name: NotDefined(f"not defined: no {name}") for name in QUANTITIES}
    record, arrays = measure(Toy((2,), lacking), points, SETTINGS, seed=0)
    assert record["status"] == "not defined: no nelbo; not defined: no nll"
    assert record["reasons"]["discrete"] == "not defined for 2-D data"
    assert all(record[name] is None for name in QUANTITIES) and set(arrays) == {"index"}
    assert record["truth"]["nll"] == pytest.approx(Toy()._energy(points.test).mean().item(), rel=1e-6)


def test_number_that_is_not_finite_is_a_reason(points):
    model = Toy((2,))
    model.nelbo_parts = lambda x, times, generator: {"prior": torch.where(x[:, 0] > 0, math.nan, 1.0)}
    record, arrays = measure(model, points, SETTINGS, seed=0)
    wrong = int((points.test[:, 0] > 0).sum())
    assert record["reasons"]["nelbo"] == f"not finite for {wrong} of {IMAGES} test samples"
    assert record["nll"] is not None and "nelbo" not in arrays


def test_tolerance_check_that_fails_keeps_the_likelihood(points):
    model = Toy((2,))
    model.nll_parts = lambda x, rtol, **_: (
        Toy.nll_parts(model, x) if rtol == SETTINGS.rtol else (_ for _ in ()).throw(IntegrationError("too many steps"))
    )
    record, _ = measure(model, points, SETTINGS, seed=0)
    assert record["nll"]["tolerance_check"] == {"n": IMAGES, "change": None}
    assert "nll" not in record["reasons"]


class Drift(nn.Module):
    """A linear field of (x, t)."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x, t):
        return self.slope * x


def test_bound_of_a_chain_model_is_computed_once(points):
    model = DiffFlow(Drift(-1.0), Drift(-0.5), (2,), steps=4, start=0.01, end=1.0, g=1.0).requires_grad_(False)
    calls = []
    model.chain_parts = lambda *args, **options: calls.append(1) or DiffFlow.chain_parts(model, *args, **options)
    record, arrays = measure(model, points, SETTINGS, seed=0)
    assert len(calls) == SETTINGS.nelbo_repeats * math.ceil(IMAGES / SETTINGS.batch_size)
    assert record["chain"]["total"] == record["nelbo"]["corrected"]["total"] and record["chain"]["steps"] == 4
    assert (arrays["chain"] == arrays["nelbo"]).all()
    assert (bound_kind(model), model.chain_steps) == ("chain of 4 steps", 4)


def test_protocol_says_what_kind_of_bound_and_whose_truncation():
    run = SimpleNamespace(evaluate=SETTINGS)
    toy = Toy((2,), chain=None)
    assert protocol(run, toy) | {"bound": "continuous", "curve_sampler": "toy", "eps": None} == protocol(run, toy)
    toy.eps = 1e-5
    assert (protocol(run, toy)["eps"], protocol(run, toy)["chain_start"]) == (1e-5, None)
    toy.chain = range(7)  # discrete by construction: where its first level lies is no choice of the evaluation
    assert (protocol(run, toy)["eps"], protocol(run, toy)["chain_start"]) == (None, 1e-5)


@pytest.mark.parametrize("lost", ["nelbo", "nll", "sample toy"])
def test_learning_curve_tries_each_number_alone(points, lost):
    train = SimpleNamespace(curve_images=IMAGES, curve_samples=8, curve_steps=3)
    run = SimpleNamespace(train=train, evaluate=SETTINGS, seed=0)
    model = Toy((2,), {lost: NotDefined("not defined: because")})
    row = curve_point(model, run, points, "cpu")
    columns = {"nelbo": "nelbo_nats", "nll": "nll_nats", "sample toy": "energy"}
    assert list(row) == list(columns.values())
    assert [name for name, value in row.items() if value is None] == [columns[lost]]
    assert "sample toy" in model.calls  # the model's own sampler, not DDIM
    if lost != "nll":
        assert row["nll_nats"] == pytest.approx(model._energy(points.test).mean().item(), rel=1e-6)


def test_sampler_that_a_model_lacks_is_a_reason_at_each_number_of_steps(points):
    samplers = [{"name": "ddim", "steps": [4, 8]}, {"name": "toy", "steps": [4]}]
    settings = SETTINGS.model_copy(update={"samplers": samplers, "quality": ["energy"]})
    rows, kept = robustness(Toy((2,)), SimpleNamespace(evaluate=settings, seed=0), points)
    assert [(row["sampler"], row["steps"], row["status"]) for row in rows] == [
        ("ddim", 4, "not defined: no ddim here"),
        ("ddim", 8, "not defined: no ddim here"),
        ("toy", 4, "ok"),
    ]
    assert rows[0]["energy"] is None and math.isfinite(rows[2]["energy"]) and set(kept) == {"toy"}


def test_likelihoods_have_a_batch_size_of_their_own(images):
    model, settings = Toy(), SETTINGS.model_copy(update={"likelihood_batch_size": 4})
    record, _ = measure(model, images, settings, seed=3)
    assert model.calls.count("nelbo") == model.calls.count("chain") == 3 * 3  # repeats, and batches of 12 images
    assert record["nll"] == measure(Toy(), images, SETTINGS, seed=3)[0]["nll"]
    run = SimpleNamespace(evaluate=settings.model_copy(update={"samplers": [{"name": "toy", "steps": [1]}]}), seed=0)
    model.calls.clear()
    robustness(model, run, images)
    assert model.calls == ["sample toy"] * 2  # 8 samples in batches of 5
    assert expected_costs(model, settings, 12) == {
        "nelbo": (12 * 3, 4),
        "nll": (2 * 12 + 12, pytest.approx(USUAL_NFE * (1 + 2 * DIMS))),
        "chain": (12 * 3, 7),
        "discrete": (12 * 3, 7),
    }


@pytest.mark.parametrize("kind", ["points", "images"])
def test_samples_that_are_not_finite_are_counted_and_not_shown(kind, request):
    data = request.getfixturevalue(kind)
    samplers = [{"name": "toy", "steps": [3, 4]}]
    settings = SETTINGS.model_copy(update={"samplers": samplers, "samples": 7, "quality": []})
    model, whole = Toy(data.shape), Toy(data.shape)
    clean = model.sample

    def spoilt(n, steps, sampler, generator=None, **options):
        x = clean(n, steps, sampler, generator)
        return torch.where((generator.index % 3 == 1).view(-1, *[1] * len(data.shape)), math.inf, x)

    run = SimpleNamespace(evaluate=settings, seed=0)
    _, shown = robustness(whole, run, data)
    x = draw(whole, 7, "toy", 4, 0, 5)[0]
    if data.levels is None:
        assert torch.equal(shown["toy"], x)
    else:  # of images the grey levels are kept
        assert torch.equal(quantise(shown["toy"], data.levels), quantise(x, data.levels))
    model.sample = spoilt
    rows, shown = robustness(model, run, data)
    assert [row["status"] for row in rows] == ["2 of 7 samples not finite"] * 2 and not shown
    assert [(row["nfe"], row["n"]) for row in rows] == [(3.0, 7), (4.0, 7)]


def test_evaluation_of_a_model_without_a_bound_is_finished(points, tmp_path, monkeypatch):
    import json

    from bench import evaluate as module

    model = Toy((2,), {"nelbo": NotDefined("not defined: no bound")})
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"weights")
    settings = SETTINGS.model_copy(update={"samplers": [{"name": "toy", "steps": [4]}], "quality": ["energy"]})
    identity = {"suite": "s", "dataset": "plane", "variant": "toy", "seed": 0, "hash": "h"}
    run = SimpleNamespace(folder=tmp_path, evaluate=settings, **identity)
    for name, value in (("load_model", model), ("load", points), ("is_trained", True), ("is_evaluated", False)):
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    evaluate(run)
    record = json.loads((tmp_path / "likelihood.json").read_text())
    assert record["status"] == "ok" and record["nelbo"] is None and record["nll"]["corrected"]["total"] > 0
    assert record["reasons"]["gap"] == "not defined: no bound"
    with np.load(tmp_path / "per_image.npz", allow_pickle=False) as arrays:
        assert "nll" in arrays and "nelbo" not in arrays
    assert (tmp_path / "robustness.csv").is_file() and (tmp_path / "samples.png").is_file()


def test_inception_weights_that_are_not_there_are_refused_before_anything_is_computed(monkeypatch):
    run = load_suite("cifar10").runs("ddpmpp-vp", 0)[0]
    monkeypatch.setenv("INDM_BENCH_INCEPTION", "/no/such/file")
    with pytest.raises(InputError, match="INDM_BENCH_INCEPTION: no file /no/such/file; accepted: the path of"):
        extractor_name(run)
    monkeypatch.delenv("INDM_BENCH_INCEPTION")
    assert extractor_name(run) == "inception"
