"""Glow: fresh it is the identity, trained it is invertible, its log-determinant autograd's, every pixel takes part."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import models.registry
from bench.options import Invalid, resolve_component
from models.flows import FlowInverseError, Glow
from models.flows.glow import shuffle_order, squeeze, unsqueeze
from models.noise import StepRandom

DOUBLE = torch.float64
PLANE = {"shape": [2], "steps": 4, "hidden": 16}
SPACE = {"shape": [3], "steps": 3, "hidden": 8}
GREY = {"shape": [1, 8, 8], "steps": [4, 4], "hidden": 8}
COLOUR = {"shape": [3, 8, 8], "steps": [2, 1, 2], "hidden": 8}
SHAPES = pytest.mark.parametrize("config", [PLANE, SPACE, GREY, COLOUR], ids=["plane", "space", "grey", "colour"])


def points(config: dict, count: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    draw = torch.rand(count, *config["shape"], generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return (2 * draw - 1).to(dtype)


def trained(config: dict, seed: int = 0, size: float = 0.15) -> Glow:
    """A float64 flow in evaluation mode with every weight moved at random, far from the identity."""
    torch.manual_seed(seed)
    flow = Glow(**config).double().eval()
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            # triangles of random entries soon have a condition number that no training reaches
            share = 0.2 if name.endswith(("lower", "upper")) else 1.0
            parameter += share * size * torch.randn_like(parameter)
    return flow


def jacobian(flow: Glow, x: Tensor) -> Tensor:
    """(B, D, D), [b, o, i] = d z_o / d x_i by differentiating the whole map."""
    dims = x[0].numel()
    columns = torch.autograd.functional.jacobian(lambda x: flow.latent(x).sum(0), x)
    return columns.movedim(x.ndim - 1, 0).reshape(len(x), dims, dims)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_fresh_flow_is_the_identity_bit_for_bit(config, dtype):
    flow, x = Glow(**config).to(dtype), points(config, 8, dtype=dtype)
    z, log_det = flow(x)
    assert torch.equal(z, x) and torch.equal(flow.inverse(x), x)
    assert log_det.shape == (8,) and torch.equal(log_det, torch.zeros(8, dtype=dtype))


@SHAPES
def test_log_det_equals_autograd(config):
    flow, x = trained(config), points(config, 2)
    truth = torch.linalg.slogdet(jacobian(flow, x)).logabsdet
    assert truth.abs().max() > 0.1 and (truth[0] - truth[1]).abs() > 1e-3
    assert torch.allclose(flow(x)[1], truth, atol=1e-10)


@SHAPES
def test_round_trip_in_both_orders(config):
    flow, x = trained(config), points(config, 16)
    z = flow.latent(x)
    assert z.shape == x.shape and (z - x).abs().max() > 0.1
    assert torch.equal(z, flow(x)[0])
    assert (flow.inverse(z) - x).abs().max() < 1e-10
    flow, x = flow.float(), x.float()
    z = flow.latent(x)
    assert z.dtype == torch.float32 and z.is_contiguous() and flow.inverse(z).is_contiguous()
    assert (flow.inverse(z) - x).abs().max() < 1e-4
    assert (flow.latent(flow.inverse(x)) - x).abs().max() < 1e-4


@SHAPES
def test_weights_that_are_averages_of_others_make_a_flow(config):
    """An average of two flows' weights inverts and has its own exact log-determinant: nothing else is state."""
    a, b, x = trained(config, 0), trained(config, 1), points(config, 2)
    with torch.no_grad():
        torch._foreach_lerp_(list(a.parameters()), list(b.parameters()), 0.5)
    assert (a.inverse(a.latent(x)) - x).abs().max() < 1e-10
    assert torch.allclose(a(x)[1], torch.linalg.slogdet(jacobian(a, x)).logabsdet, atol=1e-10)
    assert [name for name, _ in a.named_parameters()] == list(a.state_dict())


def step_matrices(flow: Glow) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, L, U and actnorm's scale of the first step, put together entry by entry."""
    level, channels = flow.levels[0], flow.levels[0].shift.shape[1]
    lower, upper = torch.eye(channels, dtype=DOUBLE), torch.diag(level.log_diagonal[0].exp())
    entry = 0
    for i in range(channels):
        for j in range(i):
            lower[i, j], upper[j, i] = level.lower[0, entry], level.upper[0, entry]
            entry += 1
    shuffle = torch.zeros(channels, channels, dtype=DOUBLE)
    for place, channel in enumerate(shuffle_order(channels)):
        shuffle[place, channel] = 1.0
    return shuffle, lower, upper, level.log_scale[0].exp()


@torch.no_grad()
def test_one_step_equals_its_formula():
    flow, x = trained(SPACE | {"steps": 1}), points(SPACE, 6)
    shuffle, lower, upper, scale = step_matrices(flow)
    y = ((x + flow.levels[0].shift[0]) * scale) @ (shuffle @ lower @ upper).T
    first, second, last = (lambda u, m=m: u @ m.weight.T + m.bias for m in flow.levels[0].couplings[0].layers)
    raw, shift = last(second(first(y[:, :1]).clamp(min=0)).clamp(min=0)).chunk(2, 1)
    moved = y[:, 1:] * (2 * torch.tanh(raw / 2)).exp() + shift
    expected = torch.cat((y[:, :1], moved), 1) @ shuffle  # the inverse of a permutation is its transpose
    assert torch.allclose(flow.latent(x), expected, atol=1e-13)


@torch.no_grad()
def test_one_step_on_images_equals_convolutions():
    """The same in PyTorch's own layout: pixel_unshuffle, a 1x1 and three zero-padded convolutions."""
    flow, x = trained(COLOUR | {"steps": [1]}), points(COLOUR, 3)
    shuffle, lower, upper, scale = step_matrices(flow)
    by_position = torch.tensor([4 * c + p for p in range(4) for c in range(3)])  # ours are sorted by pixel, then colour
    h = F.pixel_unshuffle(x, 2)[:, by_position]
    h = (h + flow.levels[0].shift[0].view(-1, 1, 1)) * scale.view(-1, 1, 1)
    h = F.conv2d(h, (shuffle @ lower @ upper)[:, :, None, None])
    kept, moved = h.chunk(2, 1)
    first, second, last = flow.levels[0].couplings[0].layers
    raw, shift = last(second(first(kept).relu()).relu()).chunk(2, 1)
    h = F.conv2d(torch.cat((kept, moved * (2 * torch.tanh(raw / 2)).exp() + shift), 1), shuffle.T[:, :, None, None])
    expected = F.pixel_shuffle(h[:, by_position.argsort()], 2)
    assert torch.allclose(flow.latent(x), expected, atol=1e-12)
    pixels = torch.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    assert torch.equal(squeeze(pixels)[0, 1, 2], torch.cat((pixels[0, 2, 4:6], pixels[0, 3, 4:6])).flatten())
    assert torch.equal(unsqueeze(squeeze(pixels)), pixels)


@torch.no_grad()
def test_what_a_level_splits_off_returns_to_its_pixels():
    """The second level works on the lower rows of the squares, the third on the lower rows of those, on no others."""
    flow, x = trained(COLOUR), points(COLOUR, 2)
    whole = flow.latent(x)
    for number, rows in ((1, [1, 3, 5, 7]), (2, [3, 7])):
        for parameter in flow.levels[number].parameters():
            parameter += 0.2
        now = flow.latent(x)
        moved = [row for row in range(8) if not torch.equal(now[:, :, row], whole[:, :, row])]
        assert moved == rows
        whole = now


@SHAPES
def test_every_output_depends_on_every_input(config):
    """By couplings and shuffles alone, with fresh triangles: a step mixes halves, the shuffle makes new ones."""
    flow, x = trained(config | {"steps": [8]}, size=0.3), points(config, 1)
    with torch.no_grad():
        flow.levels[0].lower.zero_()
        flow.levels[0].upper.zero_()
    assert (jacobian(flow, x) != 0).all()
    with torch.no_grad():  # where nothing is shuffled, what decides in the first step decides in all
        flow.levels[0].order.copy_(torch.arange(len(flow.levels[0].order)))
        flow.levels[0].restored.copy_(flow.levels[0].order)
    assert (jacobian(flow, x) == 0).any()


@pytest.mark.parametrize("channels", range(2, 50))
def test_shuffle_gives_every_channel_both_roles(channels):
    order = shuffle_order(channels)
    assert sorted(order) == list(range(channels))
    place, roles = list(range(channels)), [set() for _ in range(channels)]
    for _ in range(max(2, channels)):
        place = [place[i] for i in order]
        for position, channel in enumerate(place):
            roles[channel].add(position < channels // 2)
    assert all(len(role) == 2 for role in roles)
    if channels % 2 == 0 and channels > 2:  # and the two sets are new ones at the next step
        assert {i < channels // 2 for i in order[: channels // 2]} == {True, False}


@SHAPES
def test_gradient_reaches_every_parameter(config):
    def gradients(flow: Glow) -> dict[str, Tensor]:
        x = points(config, 32)
        z, log_det = flow(x)
        ((z - 0.3 * x.flip(-1)).pow(2).sum() - log_det.sum()).backward()
        return {name: parameter.grad for name, parameter in flow.named_parameters()}

    for name, gradient in gradients(trained(config)).items():
        assert gradient.isfinite().all() and (gradient != 0).any(), name
    # fresh, the zero weights hold back what lies behind them in the same network, and nothing else
    for name, gradient in gradients(Glow(**config).double()).items():
        behind_zeros = ".layers.0." in name or ".layers.1." in name
        assert (gradient == 0).all() if behind_zeros else (gradient != 0).any(), name


def test_parameters_of_the_published_size():
    """CIFAR-10: K = 32, L = 3, 512 hidden; per step C^2 of PLU, 2C of actnorm, and three convolutions with biases."""
    with torch.device("meta"):  # as configurations are checked
        flow = Glow([3, 32, 32])
    count = 0
    for channels in (12, 24, 48):
        network = 9 * (channels // 2) * 512 + 512 + 512**2 + 512 + 9 * 512 * channels + channels
        count += 32 * (channels**2 + 2 * channels + network)
    assert sum(parameter.numel() for parameter in flow.parameters()) == count == 43_948_416
    small = Glow(**PLANE)
    assert sum(p.numel() for p in small.parameters()) == 4 * (4 + 4 + (16 + 16) + (16 * 16 + 16) + (16 * 2 + 2))


@SHAPES
def test_saved_state_is_the_whole_flow(config, tmp_path):
    from safetensors.torch import load_file, save_file

    flow, x = trained(config), points(config, 4)
    save_file(flow.state_dict(), tmp_path / "flow.safetensors")
    torch.manual_seed(99)
    other = Glow(**config).double()
    other.load_state_dict(load_file(tmp_path / "flow.safetensors"))
    for mine, theirs in zip(flow(x), other(x), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(flow.inverse(x), other.inverse(x))


@SHAPES
def test_a_row_does_not_depend_on_its_batch(config):
    """No statistics of a batch: a share of it, on another process, gives the same latents."""
    flow, x = trained(config).train(), points(config, 8)
    z, log_det = flow(x)
    part_z, part_log_det = flow(x[5:])
    assert torch.allclose(z[5:], part_z, atol=1e-13) and torch.allclose(log_det[5:], part_log_det, atol=1e-12)


def test_scale_of_a_coupling_is_bounded():
    flow, x = Glow([2], 1, 8, log_scale_bound=0.7).double(), points(PLANE, 64)
    with torch.no_grad():
        for sign in (1.0, -1.0):
            flow.levels[0].couplings[0].layers[-1].bias.copy_(torch.tensor([1e4 * sign, 0.0]))
            assert torch.allclose(flow(x)[1], torch.full((64,), 0.7 * sign, dtype=DOUBLE), atol=1e-12)
            assert (flow.inverse(flow.latent(x)) - x).abs().max() < 1e-12


@pytest.mark.parametrize("config", [PLANE, GREY], ids=["plane", "grey"])
def test_inverse_refuses_what_is_not_finite(config):
    flow, z = trained(config).float(), points(config, 3, dtype=torch.float32)
    z[1].view(-1)[0] = math.nan
    with pytest.raises(FlowInverseError, match="1 of 3 latents are not finite"):
        flow.inverse(z)
    with torch.no_grad():
        flow.levels[0].log_diagonal[0, 0] = -200.0  # its exponential is zero: no inverse
    with pytest.raises(FlowInverseError, match="2 of 2 samples are not finite"):
        flow.inverse(z[[0, 2]])


@torch.no_grad()
def test_autocast_reaches_only_the_networks_of_couplings_in_training():
    flow, x = trained(GREY).float(), points(GREY, 4, dtype=torch.float32)
    plain = flow(x)

    def cast() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return flow(x)

    assert all(torch.equal(a, b) for a, b in zip(cast(), plain, strict=True))
    flow.train()
    z, log_det = cast()
    assert z.dtype == log_det.dtype == torch.float32
    assert not torch.equal(z, plain[0]) and (z - plain[0]).abs().max() < 0.2
    for level in flow.levels:
        for coupling in level.couplings:
            coupling.layers[-1].weight.zero_()
            coupling.layers[-1].bias.zero_()
    assert torch.equal(cast()[0], flow(x)[0])  # what remains is linear, and in full precision


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shape": [1, 6, 8], "steps": [1, 1]}, r"shape = \[1, 6, 8\]: .* by 4, .* 2 times \(steps = \[1, 1\]\)"),
        ({"shape": [2], "steps": [1, 1]}, r"steps = \[1, 1\]: accepted is a single count for vectors"),
        ({"shape": [1], "steps": 1}, r"shape = \[1\]: accepted is \[D\] with D >= 2"),
        ({"shape": [2, 2], "steps": 1}, r"shape = \[2, 2\]: accepted is \[D\] or \[C, H, W\]"),
        ({"shape": [2], "steps": 0}, r"steps = \[0\]: accepted is one or more positive integers"),
        ({"shape": [2], "steps": 1, "hidden": 0}, "hidden = 0: accepted is a positive integer"),
        ({"shape": [2], "steps": 1, "log_scale_bound": 0.0}, "log_scale_bound = 0.0: accepted is a finite number"),
    ],
)
def test_what_cannot_be_built_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Glow(**config)
    with pytest.raises(ValueError, match=r"x.shape = \[4, 3\]: accepted is \(B, 2\)"):
        Glow(**PLANE)(torch.zeros(4, 3))


def test_signature_is_the_schema_of_its_settings():
    def resolve(**options) -> dict:
        return resolve_component(models.registry.COMPONENTS, "flow", {"name": "glow"} | options, ())

    resolved = resolve(steps=[4, 2], hidden=32)
    assert resolved == {"name": "glow", "steps": [4, 2], "hidden": 32, "log_scale_bound": 2.0}
    assert resolve()["steps"] == [32, 32, 32] and resolve(steps=8)["steps"] == 8
    for wrong in ({"steps": 0}, {"steps": [4, 0]}, {"hidden": 0}, {"log_scale_bound": 0}, {"blocks": 4}):
        with pytest.raises(Invalid):
            resolve(**wrong)


def test_indm_with_it_begins_as_the_linear_diffusion_and_learns():
    """The same first loss as with the identity, bit for bit; the flow's weights then move."""
    options = {"name": "indm", "shape": [2], "sde": {"name": "vp"}, "score": {"name": "mlp", "width": 16, "depth": 2}}
    losses, built = [], {}
    for name, flow in (("identity", {}), ("glow", {"steps": 2, "hidden": 8})):
        torch.manual_seed(0)
        built[name] = models.build(options | {"flow": {"name": name, **flow}})
        (phase,) = built[name].phases()
        loss, terms = phase.loss_fn(points(PLANE, 16, dtype=torch.float32), StepRandom(0, 0, 16))
        losses.append(loss)
    assert torch.equal(*losses) and terms["flow"] == 0
    losses[1].backward()
    model = built["glow"]
    assert isinstance(model.flow, Glow) and len(phase.parameters["flow"]) == len(list(model.flow.parameters()))
    assert model.flow.levels[0].log_scale.grad.abs().min() > 0
    assert model.sample(5, 3, generator=torch.Generator().manual_seed(0)).shape == (5, 2)
