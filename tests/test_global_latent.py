"""The flow with a global latent: its map for fixed h, the bound it makes with the law of h, its part in INDM."""

import copy
import math

import pytest
import torch
from global_latent_problems import DOUBLE, PLAIN, POINT, SHAPES, SQUEEZED, latents, make, points, seeded
from torch import Tensor
from torch.nn import functional as F

import models.registry
from bench.options import Invalid, resolve_component
from models.flows import FlowInverseError, GlobalLatentFlow
from models.noise import IndexedGenerator, StepRandom


def by_hand(flow: GlobalLatentFlow, x: Tensor, h: Tensor) -> Tensor:
    """z from the published description of a block, in the unit of x: conv, + Linear(h), conv 1x1, conv, capped."""

    def sine(u: Tensor) -> Tensor:
        return torch.sin(2 * math.pi * u) / (2 * math.pi)

    def capped(weight: Tensor) -> Tensor:
        norms = weight.abs().sum((1, 2, 3), keepdim=True)
        return weight / (norms / 0.98).clamp(min=1.0)

    x = F.pixel_unshuffle(x, 2) if flow.squeeze_first else x
    for number, (level, conditions) in enumerate(zip(flow.residual.levels, flow.residual.conditions, strict=True)):
        x = F.pixel_unshuffle(x, 2) if number else x
        for index, (block, condition) in enumerate(zip(level, conditions, strict=True)):
            first, second, last = block.layers
            u = F.conv2d(sine(x) if number + index else x, capped(first.weight), first.bias, padding=1)
            u = F.conv2d(sine(u) + condition(h)[:, :, None, None], capped(second.weight), second.bias)
            x = x + F.conv2d(sine(u), capped(last.weight), last.bias, padding=1)
    for _ in range(len(flow.residual.levels) - 1 + flow.squeeze_first):
        x = F.pixel_shuffle(x, 2)
    return x


@SHAPES
def test_map_for_fixed_h_is_the_published_one(config):
    flow, x = make(config), points(config, 3)
    h = latents(flow, 3)
    z = flow.given(h).latent(x)
    assert torch.allclose(z, by_hand(flow, x, h), atol=1e-12)
    assert torch.equal(z, flow.given(h)(x)[0]) and z.shape == x.shape
    assert (z - flow.given(-h).latent(x)).abs().amax((1, 2, 3)).min() > 1e-3  # every sample's own h matters


@SHAPES
def test_log_det_for_fixed_h_equals_autograd_with_its_gradient(config):
    flow, x = make(config), points(config, 2)
    flow.residual.requires_grad_(True)
    h = latents(flow, 2).requires_grad_(True)
    dims = x[0].numel()

    def truth() -> Tensor:
        jacobian = torch.autograd.functional.jacobian(lambda x: by_hand(flow, x, h).sum(0), x, create_graph=True)
        return torch.linalg.slogdet(jacobian.movedim(3, 0).reshape(2, dims, dims)).logabsdet

    expected, found = truth(), flow.given(h)(x)[1]
    assert expected.abs().min() > 0.05 and torch.allclose(found, expected, atol=1e-10)
    wanted = [h, *flow.residual.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(found.sum(), wanted, allow_unused=True),
        torch.autograd.grad(expected.sum(), wanted, allow_unused=True),
        strict=True,
    ):
        mine, theirs = (h.new_zeros(()) if value is None else value for value in (mine, theirs))
        assert torch.allclose(mine, theirs, atol=1e-9)


def test_series_is_unbiased_for_fixed_h():
    flow, x = make(POINT, share=0.9), points(POINT, 1).expand(20000, -1, -1, -1)
    h = latents(flow, 1).expand(20000, -1)
    exact = flow.given(h[:1])(x[:1])[1]
    flow.residual.log_det = "series"
    estimates = flow.given(h)(x, torch.Generator().manual_seed(0))[1]
    error = estimates.std() / math.sqrt(20000)
    assert 0 < error < exact.abs() / 10 and (estimates.mean() - exact).abs() < 4 * error


@SHAPES
def test_forward_is_log_det_less_divergence_of_one_draw(config):
    flow, x = make(config), points(config, 5)
    z, value = flow(x, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    h, divergence = flow.posterior(x, generator)
    own_z, log_det = flow.given(h)(x, generator)
    assert torch.equal(z, own_z) and torch.equal(value, log_det - divergence)
    assert torch.equal(flow.latent(x, torch.Generator().manual_seed(3)), own_z)
    mean, log_var = flow.moments(x)
    q = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    assert torch.allclose(divergence, q.log_prob(h).sum(1) - flow.prior.log_prob(h), atol=1e-12)
    assert not torch.equal(flow(x)[0], flow(x)[0])  # h is drawn in evaluation too


def test_bound_holds_and_its_exponential_is_the_density():
    """p(x) = int p(h) N(z(x; h)) |det| dh by quadrature: E exp(log p(z) + l) is p(x), E (log p(z) + l) is below."""
    flow, count = make(POINT), 40000
    flow.head.bias[2:] += 1.5  # q as broad as the posterior: the ratios have a finite variance
    x = points(POINT, 1)

    def joint(h: Tensor) -> Tensor:
        z, log_det = flow.given(h)(x.expand(len(h), -1, -1, -1))
        return torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1) + log_det

    axis = torch.linspace(-12, 12, 161, dtype=DOUBLE)
    grid = torch.cartesian_prod(axis, axis)
    log_p = torch.logsumexp(flow.prior.log_prob(grid) + joint(grid), 0) + 2 * math.log(24 / 160)
    z, value = flow(x.expand(count, -1, -1, -1), torch.Generator().manual_seed(0))
    terms = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1) + value
    ratios = (terms - log_p).exp()
    error = ratios.std() / math.sqrt(count)
    assert error < 0.1 and (ratios.mean() - 1).abs() < 4 * error
    gap = log_p - terms.mean()
    assert gap > 10 * terms.std() / math.sqrt(count)
    mean, log_var = flow.moments(x)
    log_q = torch.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(grid).sum(1)
    posterior = flow.prior.log_prob(grid) + joint(grid) - log_p
    exact = (log_q.exp() * (log_q - posterior)).sum() * (24 / 160) ** 2
    assert torch.allclose(gap, exact, atol=float(4 * terms.std() / math.sqrt(count)))


@SHAPES
def test_round_trip_in_both_orders(config):
    flow, x = make(config), points(config, 16)
    for dtype, tolerance in ((DOUBLE, 1e-8), (torch.float32, 1e-3)):
        flow, x, h = flow.to(dtype), x.to(dtype), latents(flow, 16).to(dtype)
        given = flow.given(h)
        z = given.latent(x)
        back = given.inverse(z)
        assert back.dtype == dtype and (z - x).abs().max() > 0.05
        assert (back - x).abs().max() < tolerance
        assert (given.latent(given.inverse(x)) - x).abs().max() < tolerance


def test_inverse_of_a_sample_does_not_depend_on_its_batch():
    """Samples converge at different iterations: each keeps its own h when others leave."""
    flow = make(PLAIN)
    z = points(PLAIN, 9) * torch.logspace(-6, 1, 9, dtype=DOUBLE).view(-1, 1, 1, 1)
    h = latents(flow, 9)
    together = flow.given(h).inverse(z, tolerance=1e-9)
    alone = torch.cat([flow.given(h[i : i + 1]).inverse(z[i : i + 1], tolerance=1e-9) for i in range(9)])
    assert torch.allclose(together, alone, atol=1e-12)
    with pytest.raises(FlowInverseError, match="residual block 2: 9 of 9 samples not converged after 1 iterations"):
        flow.given(h).inverse(z, max_iterations=1)


def test_samples_are_functions_of_the_generator():
    flow, z = make(PLAIN), points(PLAIN, 8)
    first = flow.inverse(z, torch.Generator().manual_seed(5))
    assert torch.equal(first, flow.inverse(z, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, flow.inverse(z, torch.Generator().manual_seed(6)))
    h = flow.prior.sample(8, z, torch.Generator().manual_seed(5))
    assert (flow.given(h).latent(first) - z).abs().max() < 1e-8

    def parts(*cuts: slice) -> Tensor:
        sources = [IndexedGenerator(0, "sample", torch.arange(8)[cut]) for cut in cuts]
        return torch.cat([flow.inverse(z[cut], source) for cut, source in zip(cuts, sources, strict=True)])

    assert torch.allclose(parts(slice(8)), parts(slice(3), slice(3, 8)), atol=1e-9)
    assert flow(z, IndexedGenerator(0, "h", torch.arange(8)))[1].shape == (8,)


@SHAPES
def test_fresh_flow_is_close_to_the_identity(config):
    torch.manual_seed(0)
    flow, x = GlobalLatentFlow(**(config | {"hidden": 64, "latent_dims": 64, "prior_hidden": 256})), points(config, 64)
    z, _ = flow(x.float())
    h, divergence = flow.posterior(x.float())
    centred = (z - x).flatten(1) - (z - x).flatten(1).mean(0)  # biases shift everything alike
    assert centred.abs().max() < 0.05 and flow.given(h)(x.float())[1].abs().max() < 0.2
    assert 0 < divergence.mean() < 64  # under a nat for each entry of h


def test_gradient_reaches_every_parameter():
    def check(flow: GlobalLatentFlow) -> None:
        x = points(SQUEEZED, 32)
        z, value = flow.train()(x, torch.Generator().manual_seed(0))
        ((z - 0.3 * x.flip(-1)).square().sum() - value.sum()).backward()
        for name, parameter in flow.named_parameters():
            assert parameter.grad.isfinite().all() and (parameter.grad != 0).any(), name

    check(make(SQUEEZED).requires_grad_(True))
    torch.manual_seed(0)
    check(GlobalLatentFlow(**SQUEEZED).double())


def test_saved_state_is_the_whole_flow(tmp_path):
    from safetensors.torch import load_file, save_file

    flow, x = make(SQUEEZED), points(SQUEEZED, 4)
    save_file(flow.state_dict(), tmp_path / "flow.safetensors")
    torch.manual_seed(99)
    other = GlobalLatentFlow(**SQUEEZED).double().eval()
    other.load_state_dict(load_file(tmp_path / "flow.safetensors"))
    for third in (other, copy.deepcopy(flow)):
        for mine, theirs in zip(flow(x, seeded()), third(x, seeded()), strict=True):
            assert torch.equal(mine, theirs)


@torch.no_grad()
def test_autocast_reaches_training_and_leaves_the_law_of_h_alone():
    flow, x = make(PLAIN).float(), points(PLAIN, 4, dtype=torch.float32)
    plain = flow(x, seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(flow(x, seeded()), plain, strict=True))
        z, value = flow.train()(x, seeded())
        h, divergence = flow.posterior(x, seeded())
    assert value.dtype == h.dtype == divergence.dtype == torch.float32
    exact, _ = flow(x, seeded())
    assert not torch.equal(z, exact) and (z - exact).abs().max() < 0.3


@pytest.mark.parametrize("setting", ["nll", "fid"])
def test_indm_trains_with_it(setting):
    torch.manual_seed(0)
    score = {"name": "mlp", "width": 16, "depth": 2}
    flow = {"name": "residual_global", **{k: v for k, v in PLAIN.items() if k != "shape"}}
    options = {"name": "indm", "shape": [1, 4, 4], "sde": {"name": "vp"}, "score": score, "flow": flow}
    model = models.build(options | {"setting": setting})
    assert isinstance(model.flow, GlobalLatentFlow) and model.family == "fully nonlinear, continuous"
    random, x = StepRandom(0, 0, 16), points(PLAIN, 16, dtype=torch.float32)
    for phase in model.phases():
        loss, _ = phase.loss_fn(x, random)
        loss.backward()
        assert loss.isfinite() and {"joint": 2, "flow": 1, "score": 1}[phase.name] == len(phase.parameters)
    for parameter in model.flow.parameters():
        assert parameter.grad.isfinite().all()
    parts = model.eval().nelbo_parts(x, generator=IndexedGenerator(0, "nelbo", torch.arange(16)))
    again = model.nelbo_parts(x[:5], generator=IndexedGenerator(0, "nelbo", torch.arange(5)))
    assert torch.allclose(parts["flow"][:5], again["flow"], atol=1e-4)
    assert model.sample(5, 3, generator=torch.Generator().manual_seed(0)).shape == (5, 1, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [4]}, r"shape = \[4\]: accepted is \[C, H, W\]; for vectors use the flow 'residual'"),
        ({"latent_dims": 3}, "latent_dims = 3: accepted is an even number"),
        ({"latent_dims": 0}, "latent_dims = 0: accepted is a positive integer"),
        ({"encoder_widths": ()}, r"encoder_widths = \[\]: accepted is one or more positive integers"),
        ({"prior_steps": -1}, "prior_steps = -1: accepted is 0 or a positive integer"),
        ({"shape": [1, 6, 6], "blocks": (1, 1, 1)}, r"shape = \[1, 6, 6\]: .* divisible by 4"),
    ],
)
def test_what_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GlobalLatentFlow(**(PLAIN | {"blocks": 1} | change))


def test_wrong_shapes_and_a_missing_h_are_refused():
    flow = make(PLAIN)
    with pytest.raises(ValueError, match=r"x.shape = \[2, 1, 4, 2\]: accepted is \(B, 1, 4, 4\)"):
        flow(torch.zeros(2, 1, 4, 2, dtype=DOUBLE))
    with pytest.raises(ValueError, match=r"h = None: accepted is a tensor \(B, latent_dims\), by flow.given"):
        flow.residual(points(PLAIN, 2))


def test_signature_is_the_schema_of_its_settings():
    def resolve(**options) -> dict:
        return resolve_component(models.registry.COMPONENTS, "flow", {"name": "residual_global"} | options, ())

    resolved = resolve()
    assert (
        resolved["blocks"] == [16, 16] and resolved["latent_dims"] == 64 and resolved["encoder_widths"] == [48, 96, 96]
    )
    assert resolve(blocks=3, squeeze_first=True)["blocks"] == 3
    for wrong in ({"blocks": 0}, {"latent_dims": 0}, {"encoder_widths": [0]}, {"steps": 1}, {"coefficient": 1.0}):
        with pytest.raises(Invalid):
            resolve(**wrong)
