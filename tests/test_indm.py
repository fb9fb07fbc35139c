"""INDM as a model: DDPM++ is its special case, phases, losses, the forward process in data space."""

import math

import pytest
import torch

import models
from models.flows import Identity
from models.indm import INDM
from models.noise import IndexedGenerator, StepRandom
from models.registry import component
from models.score.adapter import NetworkScore
from models.score.mlp import ScoreMLP
from models.sde import VESDE, VPSDE, SubVPSDE
from models.time_sampling import soft_truncation, soft_truncation_share

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
    """Averaged over steps, D loss + constants equals the mean NELBO without the residual (const = -Z/2 - log alpha)."""
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
    with pytest.raises(ValueError, match="model.name = 'indn': accepted are .*indm"):
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


# Options of training -------------------------------------------------------------------------------------------------


class Known(torch.nn.Module):
    """noise(z, t) = z: at x = 0 the error is (1 - sigma)^2 |n|^2, so that every training loss is an integral."""

    def noise(self, z, t):
        return z


def known(sde, **options):
    return INDM(sde, Known(), Identity(), shape=(2,), **options)


def integral(sde, weight, points=20_001):
    """int weight(t) (1 - sigma)^2 d lambda on [eps, 1], nats/dim: trapezoids in lambda, float64."""
    low, high = sde.log_ratio_range(torch.zeros((), dtype=torch.float64))
    nodes = torch.linspace(float(low), float(high), points, dtype=torch.float64)
    t = sde.time(nodes).clamp(sde.eps, 1.0)
    return float(torch.trapezoid(weight(t) * (1 - sde.marginal(t)[1]).square(), nodes))


def mean_loss(loss, steps=300, batch=256):
    x = torch.zeros(batch, 2, dtype=torch.float64)
    values = torch.stack([loss(x, StepRandom(0, k, batch))[1]["score"] for k in range(steps)])
    return float(values.mean()), float(values.std()) / math.sqrt(steps)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(sigma_max=2.0)])
@pytest.mark.parametrize("proposal", ["importance", "debiased", "uniform", None])
def test_the_nll_setting_keeps_the_weights_of_every_law_of_time(sde, proposal):
    model = known(sde, proposal=proposal)
    mean, error = mean_loss(model.bound_loss)
    assert mean == pytest.approx(integral(sde, torch.ones_like), abs=4 * error)
    assert error < 0.1 * mean
    if proposal is None:
        x, random = torch.randn(16, 2), StepRandom(0, 0, 16)
        assert torch.equal(model.bound_loss(x, random)[0], known(sde, proposal="importance").bound_loss(x, random)[0])


def test_the_fid_setting_drops_them():
    """Debiased times without weights: 1/2 E_q e with q proportional to g^2 / sigma^2 above 1e-3, r(1e-3) below.

    Huang, Lim and Courville's constants for VP (0.1, 20) from eps = 0: r = 1090.56, Z = 20.256 (baselines.md 4.3).
    """
    sde = VPSDE(eps=1e-8)
    for proposal, density in (
        (
            "debiased",
            lambda t: (sde.diffusion(t.clamp_min(1e-3)) / sde.marginal(t.clamp_min(1e-3))[1]).square() / 20.256,
        ),
        ("uniform", torch.ones_like),
        (None, torch.ones_like),
    ):
        mean, error = mean_loss(known(sde, setting="fid", proposal=proposal).variance_weighted_loss, 100)

        # dt = (2 sigma^2 / g^2) d lambda
        def weight(t, density=density):
            return density(t) * (sde.marginal(t)[1] / sde.diffusion(t)).square()

        assert mean == pytest.approx(integral(sde, weight), abs=4 * error + 1e-4)


def test_debiased_gradient_is_the_bounds_above_the_floor():
    """The two losses of one network differ by the factor Z where no time falls below 1e-3."""
    sde = VPSDE(eps=1e-3)
    bound, dropped = (build(sde={"name": "vp", "eps": 1e-3}, proposal="debiased", setting=s) for s in ("nll", "fid"))
    torch.manual_seed(1)
    x = torch.randn(64, 2)
    gradients = []
    for model, loss in ((bound, bound.bound_loss), (dropped, dropped.variance_weighted_loss)):
        # the two settings name their noise differently; give both the same draws
        random = StepRandom(0, 0, 64)
        random.normal = lambda purpose, shape, dtype=None: StepRandom(0, 0, 64).normal("n", shape, dtype)
        weights = list(model.score.parameters())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss(x, random)[0], weights)]))
    low, high = sde.log_ratio_range(x)
    assert torch.allclose(gradients[0], 2 * (high - low) * gradients[1], rtol=1e-4, atol=1e-4)
    assert gradients[0].norm() > 1


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.2, 2.0])
def test_soft_truncations_follow_the_prior(exponent):
    """Inverse and distribution function agree, and the density is proportional to tau^-k."""
    eps = 1e-3
    uniforms = torch.linspace(0, 1, 101, dtype=torch.float64)
    taus = torch.tensor([soft_truncation(float(u), eps, exponent) for u in uniforms], dtype=torch.float64)
    assert float(taus[0]) == pytest.approx(eps) and float(taus[-1]) == pytest.approx(1)
    assert torch.allclose(soft_truncation_share(taus, eps, exponent), uniforms, atol=1e-9)
    t = torch.tensor([0.02, 0.2], dtype=torch.float64, requires_grad=True)
    (density,) = torch.autograd.grad(soft_truncation_share(t, eps, exponent).sum(), t)
    assert float(density[0] / density[1]) == pytest.approx(10**exponent, rel=1e-9)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(sigma_max=2.0)])
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_soft_truncation_weights_the_bound_by_the_share_of_truncations_below(sde, exponent):
    """E over tau of the likelihood-weighted integral on [tau, 1] = integral of P(tau <= t) e d lambda."""
    model = known(sde, soft_truncation=exponent)
    mean, error = mean_loss(model.likelihood_weighted_loss)
    expected = integral(sde, lambda t: soft_truncation_share(t, sde.eps, exponent))
    assert mean == pytest.approx(expected, abs=4 * error)
    assert expected < integral(sde, torch.ones_like) - 4 * error


def test_soft_truncation_is_one_for_the_batch_and_leaves_the_flow_the_whole_bound():
    model, plain = build(FLOW, soft_truncation=1.2, proposal="uniform"), build(FLOW, proposal="uniform")
    assert [(p.name, sorted(p.parameters)) for p in model.phases()] == [("flow", ["flow"]), ("score", ["score"])]
    assert [p.name for p in build(soft_truncation=1.2).phases()] == ["score"]
    x, random = torch.randn(64, 2), StepRandom(0, 5, 64)
    assert torch.equal(model.phases()[0].loss_fn(x, random)[0], plain.bound_loss(x, random)[0])
    seen = []
    model.score.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model.score.noise = lambda z, t: seen.append(t) or z
    model.phases()[1].loss_fn(x, random)[0]
    u = torch.rand((), generator=StepRandom(0, 5, 64).generator("truncation", "cpu"), dtype=torch.float64)
    tau = soft_truncation(float(u), model.sde.eps, 1.2)
    assert torch.allclose(seen[0], tau + (1 - tau) * random.stratified("time"))
    # another process's rows see the same truncation
    model.phases()[1].loss_fn(x[:32], StepRandom(0, 5, 64, rows=(0, 32)))
    assert torch.equal(seen[1], seen[0][:32])


@pytest.mark.parametrize("options", [{}, {"setting": "fid"}, {"soft_truncation": 1.2}], ids=["nll", "fid", "st"])
def test_pretraining_is_the_linear_diffusion_and_leaves_the_flow_alone(options):
    model, linear = build(FLOW, pretrain=3, scale=2.0, **options), build(scale=2.0, **options)
    linear.score.load_state_dict(model.score.state_dict())
    groups = {name: ps for phase in model.phases() for name, ps in phase.parameters.items()}
    optimizers = {name: torch.optim.AdamW(ps, lr=1e-2) for name, ps in groups.items()}
    start = [p.detach().clone() for p in model.flow.parameters()]
    x, (reference,) = torch.randn(32, 2), linear.phases()
    for step in range(5):
        due = [phase for phase in model.phases() if phase.due(step)]
        assert [p.name for p in due] == (
            ["pretrain"] if step < 3 else [p.name for p in build(FLOW, **options).phases()]
        )
        random = StepRandom(0, step, 32)
        if step < 3:
            linear.score.load_state_dict(model.score.state_dict())
            assert torch.equal(due[0].loss_fn(x, random)[0], reference.loss_fn(x, random)[0])
        for phase in due:
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            phase.loss_fn(x, random)[0].backward()
            for name in phase.parameters:
                optimizers[name].step()
        same = all(torch.equal(p, q) for p, q in zip(model.flow.parameters(), start, strict=True))
        assert same is (step < 3)


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="pretrain = 5: this flow has no weights"):
        build(pretrain=5)
    with pytest.raises(ValueError, match="soft_truncation: not with proposal = debiased"):
        build(soft_truncation=1.0, proposal="debiased")
