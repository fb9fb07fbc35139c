"""Flows: invertible, their log-determinants exact or unbiased, and refused where they cannot be built."""

import copy
import inspect
import math

import pytest
import torch
from flow_problems import DOUBLE, IMAGE, SHAPES, VECTOR, make, points, strong
from pydantic import create_model
from torch import Tensor

import models
from models.flows import FlowInverseError, Identity, ResidualFlow
from models.flows.inverse import invert
from models.flows.lipschitz import Chain
from models.flows.log_det import columns
from models.flows.narrow import is_narrow, narrow_convolution
from models.noise import StepRandom

# --- identity ---------------------------------------------------------------------------------------------------------


def test_identity_is_the_very_same_tensor():
    x = points(VECTOR, 3)
    z, log_det = Identity()(x, generator=torch.Generator())
    assert z is x and Identity().inverse(x) is x and Identity().latent(x) is x
    assert torch.equal(log_det, torch.zeros(3, dtype=DOUBLE))
    assert not list(Identity().parameters())


# --- the map ----------------------------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("build", [lambda c: make(c, scale=1.0), make, strong], ids=["fresh", "capped", "strong"])
def test_round_trip(config, build):
    flow, x = build(config), points(config, 16)
    assert (flow.inverse(flow(x)[0]) - x).abs().max() < 1e-8
    flow, x = flow.float(), x.float()
    z, _ = flow(x)
    assert z.shape == x.shape and z.dtype == torch.float32
    assert (flow.inverse(z) - x).abs().max() < 1e-4
    # The other order: the inverse's image is the latent it was asked for.
    assert (flow.latent(flow.inverse(x)) - x).abs().max() < 1e-4


@SHAPES
def test_map_equals_its_formula(config):
    """y = x + g(x) written out plainly, with sin(2 pi u) / (2 pi) and each row capped by its own L1 norm."""
    flow, x = make(config, scale=2.0), points(config, 4)

    def sine(u: Tensor) -> Tensor:
        return torch.sin(2 * math.pi * u) / (2 * math.pi)

    def layer(module: torch.nn.Module, u: Tensor) -> Tensor:
        weight = torch.stack([w / max(1.0, w.abs().sum().item() / 0.98) for w in module.weight])
        if weight.ndim == 2:
            return u @ weight.T + module.bias
        return torch.nn.functional.conv2d(u, weight, module.bias, padding="same")

    def squeeze(u: Tensor) -> Tensor:
        batch, channels, height, width = u.shape
        out = u.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return out.reshape(batch, 4 * channels, height // 2, width // 2)

    y = squeeze(x) if flow.squeeze_first else x
    for level, blocks in enumerate(flow.levels):
        y = squeeze(y) if level else y
        for index, block in enumerate(blocks):
            u = layer(block.layers[0], sine(y) if level + index else y)
            y = y + layer(block.layers[2], sine(layer(block.layers[1], sine(u))))
    z = flow.latent(x)
    for _ in range(flow.squeezes):
        z = squeeze(z)
    assert torch.allclose(z, y, atol=1e-13) and (flow.latent(x) - x).abs().max() > 1e-2


@SHAPES
def test_latent_alone_equals_forward(config):
    flow, x = make(config), points(config, 5)
    assert torch.allclose(flow.latent(x), flow(x)[0], atol=1e-14)
    single, _ = flow.float()(x.float())
    assert torch.allclose(single.double(), flow.double().latent(x), atol=1e-5)


def test_scaling_capped_weights_changes_nothing():
    config = VECTOR | {"hidden": 32}
    a, b = make(config, scale=10.0), make(config, scale=10.0)
    with torch.no_grad():
        for name, parameter in b.named_parameters():
            if name.endswith("weight"):
                parameter *= 10
    x = points(config, 8)
    assert torch.allclose(a(x)[0], b(x)[0], atol=1e-13)
    fresh = make(config, scale=0.01)
    assert (a(x)[0] - fresh(x)[0]).abs().max() > 1e-2  # below the cap, weights do count


@SHAPES
def test_blocks_respect_the_lipschitz_bound_and_can_reach_it(config):
    bound = 0.98**3
    for flow in (make(config), strong(config)):
        x = flow.enter(points(config, 64))
        for chain in next(flow.chains()):
            for scale in (1e-3, 0.1, 1.0, 5.0):
                y = x + scale * torch.randn_like(x)
                ratio = (chain.value(y) - chain.value(x)).abs().flatten(1).amax(1) / (y - x).abs().flatten(1).amax(1)
                assert ratio.max() <= bound * (1 + 1e-9)
    if len(config["shape"]) == 3:
        config = config | {"shape": [1, 12, 12]}  # has an inner pixel that no padding reaches
    flow = make(config)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.abs_()
        for name, parameter in flow.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    x = torch.zeros(1, *config["shape"], dtype=DOUBLE)  # all slopes are 1 here, and all signs agree
    _, jacobian = next(flow.chains())[0].linearise(flow.enter(x))
    assert columns(jacobian, flow.enter(x)).sum(1).max().item() == pytest.approx(bound, rel=1e-9)


def test_squeeze_has_the_stated_channel_order():
    """A block behind the squeeze finds pixel (2h+i, 2w+j) of channel c in channel 4c+2i+j, and nothing else moves."""
    flow = ResidualFlow([2, 4, 6], (1, 1), hidden=4, squeeze_first=False).double()
    seen = []
    x = torch.arange(48, dtype=DOUBLE).reshape(1, 2, 4, 6)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
        # The second level's block passes one channel on, small enough to find by its sine.
        first, middle, last = flow.levels[1][0].layers
        for channel in range(8):
            for layer in (first, middle, last):
                layer.weight.zero_()
            first.weight[0, channel, 1, 1] = 0.5
            middle.weight[0, 0, 0, 0] = 0.5
            last.weight[0, 0, 1, 1] = 0.5
            inside = 1e-5 * x
            change = flow.latent(inside) - inside
            out = change[0, 0, 0::2, 0::2]  # what channel 0 of the squeezed image received
            c, i, j = channel // 4, channel // 2 % 2, channel % 2
            assert torch.allclose(out, 0.125 * inside[0, c, i::2, j::2], atol=1e-9)
            seen.append((c, i, j))
            change[0, 0, 0::2, 0::2] = 0
            assert change.abs().max() < 1e-12
    assert len(set(seen)) == 8


def test_only_the_very_first_block_lacks_the_leading_sine():
    flow = make(IMAGE, scale=1.0)
    x = points(IMAGE, 2)
    first, second, third = (block.preactivation for level in flow.levels for block in level)
    assert (first, second, third) == (False, True, True)
    chains = next(flow.chains())
    a, shifted = flow.enter(x), flow.enter(x + 1.0)  # one period of sin(2 pi x)
    assert torch.allclose(chains[1].value(a), chains[1].value(shifted), atol=1e-12)
    assert (chains[0].value(a) - chains[0].value(shifted)).abs().max() > 1e-3


# --- the inverse's failures -------------------------------------------------------------------------------------------


def test_inverse_says_which_block_did_not_converge():
    flow, x = strong(VECTOR), points(VECTOR, 7)
    with pytest.raises(
        FlowInverseError, match=r"residual block 2: 7 of 7 samples .* 1 iterations: largest residual 0\."
    ):
        flow.inverse(flow(x)[0], max_iterations=1)
    assert issubclass(FlowInverseError, RuntimeError)


def test_inverse_refuses_what_is_not_finite():
    flow, z = make(VECTOR), points(VECTOR, 5)
    z[3, 0] = math.nan
    with pytest.raises(FlowInverseError, match="residual block 2: 1 of 5 samples are not finite"):
        flow.inverse(z)


def test_inverse_is_as_good_as_rounding_allows_and_quick(monkeypatch):
    """Four blocks at the bound, each contracting up to 16 times: the float32 error is that of rounding z, no more."""
    config = VECTOR | {"blocks": 4, "hidden": 64}
    flow, x = strong(config), points(config, 200)
    evaluations = []
    value = Chain.value
    monkeypatch.setattr(Chain, "value", lambda self, a: evaluations.append(len(a)) or value(self, a))
    z = flow.latent(x)
    assert (flow.inverse(z) - x).abs().max() < 1e-10
    assert sum(evaluations) < 35 * 4 * len(x)  # plain steps: over 100 for the same tolerance
    unavoidable = (flow.inverse(z.float().double()) - x).abs().max()
    single = flow.float()
    assert (single.latent(single.inverse(z.float())) - z).abs().max() < 1e-5
    assert (single.inverse(z.float()) - x).abs().max() < 1e-5 + 20 * unavoidable


def test_acceleration_never_fails_where_plain_steps_converge():
    """A branch of steep slopes and sign changes, where secants mislead: within twice the plain iteration's bound."""

    class Zigzag(Chain):
        def value(self, a: Tensor) -> Tensor:
            return 0.3 * torch.asin(torch.sin(3 * a))  # slopes +0.9 and -0.9, a corner every third of a period

    goal = 20 * torch.rand(4000, 3, dtype=DOUBLE) - 10
    chain = Zigzag((), True)
    enough = 2 * math.ceil(math.log(1e-13) / math.log(0.9))
    a = invert(chain, goal, 1e-12, enough, number=0, bound=0.9)
    assert (a + chain.value(a) - goal).abs().max() < 1e-9


def test_inverse_treats_each_sample_on_its_own():
    flow, z = strong(IMAGE), points(IMAGE, 6)
    together = flow.inverse(z)
    alone = torch.cat([flow.inverse(sample[None]) for sample in z])
    assert torch.allclose(together, alone, atol=1e-12)


def test_inverse_tolerance_is_kept_and_capped_by_rounding():
    flow, x = strong(VECTOR), points(VECTOR, 32)
    z = flow(x)[0]
    errors = [(flow.inverse(z, tolerance=t) - x).abs().max().item() for t in (1e-2, 1e-5, 1e-8)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-6
    single = flow.float()
    assert (single.inverse(z.float(), tolerance=0.0) - x.float()).abs().max() < 1e-4


# --- weights, options, refusals ---------------------------------------------------------------------------------------


def test_parameter_count_at_published_size():
    flow = ResidualFlow([3, 8, 8], (1, 1))
    counts = [sum(p.numel() for p in block.parameters()) for level in flow.levels for block in level]
    width = 512
    assert counts == [9 * c * width + width + width * width + width + 9 * width * c + c for c in (3, 12)]


def test_weights_are_all_there_is_and_averages_are_valid():
    a, b = make(IMAGE, seed=1), make(IMAGE, seed=2)
    assert set(a.state_dict()) == {name for name, _ in a.named_parameters()}
    mean = {name: 0.5 * (value + b.state_dict()[name]) for name, value in a.state_dict().items()}
    flow = make(IMAGE, seed=3)
    flow.load_state_dict(mean)
    x = points(IMAGE, 4)
    assert (flow.inverse(flow(x)[0]) - x).abs().max() < 1e-8
    other = copy.deepcopy(flow)
    assert torch.equal(other(x)[0], flow(x)[0])


@SHAPES
def test_all_parameters_learn(config):
    flow = make(config, scale=1.0).train()
    z, log_det = flow(points(config, 8), torch.Generator().manual_seed(0))
    (z.square().sum() - log_det.sum()).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@SHAPES
def test_autocast_reaches_training_on_images_only(config):
    flow, x = strong(config).float(), points(config, 4).float()
    plain = flow(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = flow(x)
        assert torch.equal(same[0], plain[0]) and torch.equal(same[1], plain[1])
        assert (flow.inverse(same[0]) - x).abs().max() < 1e-4
        z, log_det = flow.train()(x, torch.Generator().manual_seed(0))
        assert z.dtype == log_det.dtype == torch.float32
        assert torch.equal(z, plain[0]) == (config is VECTOR) and (z - plain[0]).abs().max() < 0.1
        (z.square().sum() - log_det.sum()).backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())


def test_signature_is_a_schema():
    fields = {
        name: (p.annotation, ... if p.default is inspect.Parameter.empty else p.default)
        for name, p in inspect.signature(ResidualFlow).parameters.items()
    }
    schema = create_model("ResidualFlowConfig", **fields)
    config = schema(shape=[1, 8, 8], blocks=[2, 2], hidden=16).model_dump()
    assert ResidualFlow(**config).blocks == (2, 2)
    assert ResidualFlow(**schema(shape=[2], blocks=8, hidden=16).model_dump()).blocks == (8,)
    for wrong in ({"coefficient": 1.0}, {"hidden": 0}, {"log_det": "both"}, {"blocks": 0}, {"roulette_stay": 1.0}):
        with pytest.raises(ValueError):
            schema(**({"shape": [2], "blocks": 1} | wrong))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shape": [1, 7, 8], "blocks": (1, 1)}, r"shape = \[1, 7, 8\]: .* by 2, .* 1 times \(blocks = \[1, 1\]\)"),
        ({"shape": [1, 6, 6], "blocks": (1, 1), "squeeze_first": True}, r"shape = \[1, 6, 6\]: .* divisible by 4"),
        ({"shape": [2], "blocks": (1, 1)}, r"blocks = \[1, 1\]: accepted is a single count"),
        ({"shape": [2], "blocks": 1, "squeeze_first": True}, "squeeze_first = True: accepted is False"),
        ({"shape": [2, 2], "blocks": 1}, r"shape = \[2, 2\]: accepted is \[D\] or"),
        ({"shape": [2], "blocks": ()}, r"blocks = \[\]"),
        ({"shape": [2], "blocks": 0}, r"blocks = \[0\]"),
        ({"shape": [2], "blocks": 1, "coefficient": 1.0}, "coefficient = 1.0: accepted is a number above 0"),
        ({"shape": [2], "blocks": 1, "hidden": 0}, "hidden = 0: accepted is a positive integer"),
        ({"shape": [2], "blocks": 1, "log_det": "both"}, "log_det = 'both': accepted are auto, exact, series"),
        ({"shape": [2], "blocks": 1, "roulette": "uniform"}, "roulette = 'uniform': accepted are geometric, poisson"),
        ({"shape": [2], "blocks": 1, "roulette_entry": 0.0}, "roulette_entry = 0.0"),
        ({"shape": [2], "blocks": 1, "roulette_entry": 1.5}, "roulette_entry = 1.5"),
        ({"shape": [2], "blocks": 1, "roulette_stay": 1.0}, "roulette_stay = 1.0"),
        ({"shape": [2], "blocks": 1, "roulette_rate": 0.0}, "roulette_rate = 0.0"),
        ({"shape": [2], "blocks": 1, "terms_train": -1}, "terms_train = -1"),
        ({"shape": [2], "blocks": 1, "terms_eval": -1}, "terms_eval = -1"),
        ({"shape": [2], "blocks": 1, "probes": "uniform"}, "probes = 'uniform': accepted are rademacher, gaussian"),
    ],
)
def test_refusals_name_key_value_and_what_is_accepted(config, message):
    with pytest.raises(ValueError, match=message) as error:
        ResidualFlow(**({"hidden": 4} | config))
    assert "\n" not in str(error.value)


def test_input_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"x.shape = \[3, 4\]: accepted is \(B, 2\)"):
        make(VECTOR)(torch.zeros(3, 4))


@pytest.mark.parametrize("outputs, bias", [(3, True), (1, False), (4, True)])
def test_narrow_convolution_is_a_convolution(outputs, bias):
    """Against PyTorch's own, with gradients and gradients of gradients; H and W differ."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 16, 18, dtype=DOUBLE).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(outputs, 7, 3, 3, dtype=DOUBLE).requires_grad_()
    inputs = [x, weight] + [torch.randn(outputs, dtype=DOUBLE).requires_grad_()] * bias
    assert is_narrow(weight, x) and not is_narrow(weight, x[..., :8]) and not is_narrow(weight.transpose(0, 1), x)
    found = []
    for convolution in (
        lambda: narrow_convolution(weight, *inputs[:1], *inputs[2:]),
        lambda: torch.nn.functional.conv2d(x, weight, *inputs[2:], padding=1),
    ):
        y = convolution()
        once = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        found.append([y, *once, *torch.autograd.grad(sum(g.square().sum() for g in once), inputs)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_flow_phase_spares_the_score():
    """The FID setting's flow phase: the flow's gradient is the bound's, the score's weights get none and stay free."""
    torch.manual_seed(0)
    score, flow = {"name": "mlp", "width": 16, "depth": 1}, {"name": "residual", "blocks": 2, "hidden": 8}
    model = models.build(
        {"name": "indm", "shape": [2], "setting": "fid", "score": score, "flow": flow, "sde": {"name": "vp"}}
    )
    weights, x = list(model.flow.parameters()), torch.randn(16, 2)
    phase = model.phases()[0]
    phase.loss_fn(x, StepRandom(0, 0, 16))[0].backward()
    assert all(p.grad is None and p.requires_grad for p in model.score.parameters())
    expected = torch.autograd.grad(model.bound_loss(x, StepRandom(0, 0, 16))[0], weights)
    assert phase.name == "flow" and all(torch.equal(p.grad, g) for p, g in zip(weights, expected, strict=True))
