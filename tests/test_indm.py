"""INDM as a model: DDPM++ is its special case, phases, losses, the forward process in data space."""

import math

import pytest
import torch

import models
from models.flows import Identity
from models.indm import INDM
from models.noise import IndexedGenerator, StepRandom
from models.registry import MODELS, component
from models.score.adapter import NetworkScore
from models.score.mlp import ScoreMLP
from models.sde import VESDE, VPSDE

MLP = {"name": "mlp", "width": 16, "depth": 1}
FLOW = {"name": "residual", "blocks": 2, "hidden": 8}


def build(flow=None, seed=0, **options):
    torch.manual_seed(seed)
    config = {"name": "indm", "shape": [2], "sde": {"name": "vp"}, "score": MLP, "flow": flow or {"name": "identity"}}
    model = models.build(config | options)
    with torch.no_grad():  # the head starts at zero; move it so that outputs are not trivial
        for parameter in model.score.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()])
@pytest.mark.parametrize("preconditioning", ["none", "gaussian"])
def test_identity_flow_is_ddpmpp_bit_for_bit(sde, preconditioning):
    """An independent formulation of the linear diffusion (no flow in sight) gives the same loss, bound and samples."""
    torch.manual_seed(0)
    net = ScoreMLP([2], width=16, depth=1)
    torch.nn.init.normal_(net.head.weight)
    score = NetworkScore(net, sde, preconditioning)
    indm, plain = INDM(sde, score, Identity(), shape=(2,)), INDM(sde, score, None, shape=(2,))
    x = torch.randn(64, 2)
    random = StepRandom(0, 3, 64)

    # score_sde's likelihood-weighted loss (Song et al. 2021, arXiv 2101.09258, eq. 13), importance-sampled
    t, z = sde.importance_time(random.stratified("time"))
    alpha, sigma = (v[:, None] for v in sde.marginal(t))
    noise = random.normal("noise", (2,))
    loss = (0.5 * z * (score.noise(alpha * x + sigma * noise, t) - noise).square().sum(1)).mean() / 2
    indm_loss, terms = indm.bound_loss(x, random)
    assert torch.equal(loss, terms["score"])
    assert torch.equal(indm_loss, plain.bound_loss(x, random)[0])

    def source():
        return IndexedGenerator(0, "x", torch.arange(64))

    assert torch.equal(indm.nelbo(x, 2, source()), plain.nelbo(x, 2, source()))
    assert torch.equal(indm.nll(x, generator=source()), plain.nll(x, generator=source()))
    samples = [m.sample(64, steps=5, sampler="euler_maruyama", generator=source()) for m in (indm, plain)]
    assert torch.equal(*samples)
    assert torch.equal(indm.encode(x)[0], x)


def test_a_residual_flow_with_zero_weights_equals_the_identity():
    """The other road to the special case: an INDM whose flow happens to be the identity map."""
    indm, plain = build(FLOW), build()
    plain.score.load_state_dict(indm.score.state_dict())
    with torch.no_grad():
        for parameter in indm.flow.parameters():
            parameter.zero_()
    x = torch.randn(32, 2)

    def source():
        return IndexedGenerator(0, "x", torch.arange(32))

    assert torch.allclose(indm.nelbo(x, 4, source()), plain.nelbo(x, 4, source()), atol=1e-5)
    assert torch.allclose(indm.nll(x, generator=source()), plain.nll(x, generator=source()), atol=1e-4)


def test_phases_of_the_two_settings():
    nll, fid, linear = build(FLOW), build(FLOW, setting="fid"), build(setting="fid")
    assert [(p.name, sorted(p.parameters)) for p in nll.phases()] == [("joint", ["flow", "score"])]
    assert [(p.name, sorted(p.parameters)) for p in fid.phases()] == [("flow", ["flow"]), ("score", ["score"])]
    assert [(p.name, sorted(p.parameters)) for p in linear.phases()] == [("score", ["score"])]


def test_fid_score_phase_leaves_the_flow_alone():
    model = build(FLOW, setting="fid")
    loss, _ = model.phases()[1].loss_fn(torch.randn(16, 2), StepRandom(0, 0, 16))
    loss.backward()
    assert all(p.grad is None for p in model.flow.parameters())
    assert all(p.grad is not None for p in model.score.parameters())


def test_training_loss_is_the_bound_without_its_constants():
    """Averaged over steps, D loss + constants equals the mean NELBO without the residual (spec: const = -Z/2 - log alpha)."""
    model = build(FLOW)
    x = torch.randn(256, 2)
    with torch.no_grad():
        losses = torch.stack([model.bound_loss(x, StepRandom(0, k, 256))[0] for k in range(400)])
    sde = model.sde
    low, high = sde.log_ratio_range(x)
    constant = -(high - low) - (sde.log_alpha(1.0) - sde.log_alpha(sde.eps))
    totals = []
    for repeat in range(20):
        parts = model.nelbo_parts(x, 16, IndexedGenerator(repeat, "bound", torch.arange(256)))
        totals.append(float(sum(v.mean() for k, v in parts.items() if k != "reconstruction")))
    totals = torch.tensor(totals)
    error = math.hypot(float(losses.std()) / math.sqrt(400), float(totals.std()) / math.sqrt(20) / 2)
    assert float(losses.mean() + constant) == pytest.approx(float(totals.mean()) / 2, abs=4 * error)


def test_constants_of_the_published_configurations():
    """-Z/2 + (B(1) - B(eps))/2 = -6.907237 for VP, -Z/2 = -8.517108 for VE (specification, part II, section 4)."""
    for sde, expected in ((VPSDE(), -6.907237), (VESDE(), -8.517108)):
        low, high = sde.log_ratio_range(torch.zeros((), dtype=torch.float64))
        constant = -(high - low) - (sde.log_alpha(1.0) - sde.log_alpha(sde.eps))
        assert float(constant) == pytest.approx(expected, abs=1e-6)


def test_trajectory_is_the_forward_process_in_data_space():
    model = build(FLOW)
    x = torch.randn(2000, 2)
    times = [0.0, 0.3, 1.0]
    path = model.trajectory(x, times, torch.Generator().manual_seed(0))
    assert path.shape == (3, 2000, 2)
    assert torch.allclose(path[0], x, atol=1e-3)
    z = model.encode(path[1])[0] - model.sde.marginal(torch.tensor([0.3]))[0] * model.encode(x)[0]
    assert float(z.std()) == pytest.approx(float(model.sde.marginal(torch.tensor([0.3]))[1]), rel=0.05)
    assert float(model.encode(path[2])[0].std()) == pytest.approx(1.0, rel=0.05)


def test_samples_pass_through_the_inverse_flow():
    model = build(FLOW)
    x = model.sample(16, steps=4, sampler="ddim", generator=torch.Generator().manual_seed(0))
    model.flow, flow = Identity(), model.flow
    z = model.sample(16, steps=4, sampler="ddim", generator=torch.Generator().manual_seed(0))
    assert torch.allclose(flow(x)[0], z, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_honours_the_contract(name):
    model = build(FLOW) if name == "indm" else None
    assert model is not None, f"give {name} a tiny configuration here"
    x = torch.randn(5, 2)
    assert model.nelbo(x).shape == model.nll(x, rtol=1e-3, atol=1e-3).shape == (5,)
    assert model.sample(3, steps=2, sampler="ddim").shape == (3, 2)
    assert model.trajectory(x, [0.0, 1.0]).shape == (2, 5, 2)
    for phase in model.phases():
        loss, terms = phase.loss_fn(x, StepRandom(0, 0, 5))
        assert loss.ndim == 0 and all(v.ndim == 0 for v in terms.values())


def test_save_and_load_give_the_same_model(tmp_path):
    from safetensors.torch import load_file, save_file

    model, other = build(FLOW), build(FLOW, seed=1)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    other.load_state_dict(load_file(tmp_path / "m.safetensors"))
    x = torch.randn(7, 2)
    sources = [IndexedGenerator(0, "x", torch.arange(7)) for _ in range(2)]
    assert torch.equal(model.nelbo(x, 2, sources[0]), other.nelbo(x, 2, sources[1]))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="sde.name = 'vpp': accepted are vp, subvp, ve"):
        component("sde", {"name": "vpp"})
    with pytest.raises(ValueError, match="model.name = 'indn': accepted are indm"):
        models.build({"name": "indn", "shape": [2]})


def test_stochastic_log_determinants_belong_to_the_image_not_to_the_batch():
    """The series' probe and length of image i are its own: 3 and 4 images equal 7, and a second call the first."""
    model = build(FLOW | {"log_det": "series", "terms_eval": 2}).eval()
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.mul_(3)
    x = torch.randn(7, 2)

    def flow_part(rows):
        return model.nelbo_parts(x[rows], 1, IndexedGenerator(0, "x", torch.arange(7)[rows]))["flow"]

    whole = flow_part(slice(0, 7))
    assert torch.equal(whole, flow_part(slice(0, 7)))
    assert torch.allclose(whole, torch.cat([flow_part(slice(0, 3)), flow_part(slice(3, 7))]), atol=1e-6)


def test_a_flow_needs_no_more_than_its_contract():
    """forward(x) -> (z, log_det) and inverse(z): a generator is passed only to a flow that takes one."""

    class Shift(torch.nn.Module):
        def forward(self, x):
            return x + 1, x.new_zeros(len(x))

        def inverse(self, z):
            return z - 1

    plain = build()
    model = INDM(plain.sde, plain.score, Shift(), shape=(2,))
    x = torch.randn(6, 2)
    source = IndexedGenerator(0, "x", torch.arange(6))
    other = IndexedGenerator(0, "x", torch.arange(6))
    assert torch.allclose(model.nelbo(x - 1, 2, source), plain.nelbo(x, 2, other), atol=1e-4)
    with pytest.raises(ValueError, match="shape: missing"):
        INDM(plain.sde, plain.score).sample(2)
