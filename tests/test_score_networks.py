"""Score networks: published sizes, structure by algebra, options that cannot work, saving, compiling."""

import math

import pytest
import torch
from diffusers import ModelMixin

from models.score import NCSNpp, ScoreMLP
from models.score.layers import (
    AttentionBlock,
    Dropout,
    FIRDownsample,
    FIRUpsample,
    MeanDownsample,
    NearestUpsample,
    ResidualBlock,
)
from models.score.mlp import Waves

TINY = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
SHAPE = (2, 8, 8)


def build(name: str, **options) -> ModelMixin:
    torch.manual_seed(0)
    if name == "mlp":
        return ScoreMLP((2,), width=16, depth=2, **options)
    return getattr(NCSNpp, name)(SHAPE, **{**TINY, **options})


def inputs(net: ModelMixin, batch: int = 3, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, *net.config.shape, generator=generator)
    u = torch.rand(batch, generator=generator)
    return z, {"time999": 999 * u, "sigma": 0.01 * 5000**u, "log_ratio": 12 * u - 7}[net.time_input]


def visible(net: ModelMixin) -> ModelMixin:
    """Redraw every weight, those that start at zero included, so that all of them matter."""
    torch.manual_seed(2)
    for name, p in net.named_parameters():
        if p.requires_grad:
            with torch.no_grad():
                p.normal_(std=1 / math.sqrt(p[0].numel()) if p.dim() > 1 else 0.3)
                p.add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return net.eval()


names = pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "mlp"])
image_names = pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp"])


@pytest.mark.parametrize(
    ("name", "deep", "trainable", "frozen"),
    [
        ("ddpmpp", False, 61_804_419, 0),
        ("ddpmpp", True, 106_632_579, 0),
        ("ncsnpp", False, 62_758_787, 128),
        ("ncsnpp", True, 107_586_947, 128),
    ],
)
def test_published_parameter_counts(name, deep, trainable, frozen):
    with torch.device("meta"):
        net = getattr(NCSNpp, name)(deep=deep)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == trainable
    assert sum(p.numel() for p in net.parameters() if not p.requires_grad) == frozen


def reference_layout(net: NCSNpp):
    """The parameters as views of the shapes, and in the order, of the reference implementation."""
    held = []
    for name, p in net.named_parameters():
        if name.endswith("qkv.weight"):
            held = [part.T for part in p.chunk(3)]
        elif name.endswith("qkv.bias"):
            for pair in zip(held, p.chunk(3), strict=True):
                yield from pair
        else:
            yield p.T if name.endswith("attention.out.weight") else p


@pytest.mark.parametrize(
    ("name", "condition", "expected"),
    [
        ("ddpmpp", [30.0, 700.0], [-1.70545, -2.17498, 0.09688, -1.04764, -1.86137, -1.47842, -1.82825]),
        ("ncsnpp", [0.3, 2.0], [-0.13209, -0.12786, 1.67572, 1.23027, 0.43819, 0.52686, 1.63577]),
    ],
)
def test_output_equals_the_reference_implementation(name, condition, expected):
    """Expected numbers: github.com/yang-song/score_sde_pytorch at cb1f359 on a CPU, with these weights and inputs."""
    net = build(name).eval()
    with torch.no_grad():
        for k, p in enumerate(reference_layout(net)):
            wave = (torch.arange(p.numel(), dtype=torch.float64) + k).cos().view(p.shape)
            p.copy_(wave * math.sqrt(2 / p[0].numel()))
    z = torch.arange(2 * math.prod(SHAPE), dtype=torch.float64).sin().float().view(2, *SHAPE)
    output = net(z, torch.tensor(condition)).flatten()[::37]
    torch.testing.assert_close(output, torch.tensor(expected), rtol=0, atol=2e-4)


def test_conventions_of_time_and_output():
    assert (build("ddpmpp").time_input, build("ddpmpp").output) == ("time999", "noise")
    assert (build("ncsnpp").time_input, build("ncsnpp").output) == ("sigma", "score_times_sigma")
    assert (build("mlp").time_input, build("mlp").output) == ("log_ratio", "noise")


@names
def test_untrained_output_is_zero_up_to_the_tiny_initialisation(name):
    net = build(name)
    output = net(*inputs(net))
    assert output.abs().max() < 1e-3
    assert visible(net)(*inputs(net)).abs().max() > 1e-2  # and not because the input never arrives


@names
def test_saved_and_loaded_network_gives_identical_output(name, tmp_path):
    net = visible(build(name))
    net.save_pretrained(tmp_path)
    loaded = type(net).from_pretrained(tmp_path).eval()
    arguments = inputs(net)
    assert torch.equal(net(*arguments), loaded(*arguments))
    assert (loaded.time_input, loaded.output) == (net.time_input, net.output)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in net.named_parameters()
    }


@names
def test_gradient_reaches_every_trainable_parameter(name):
    net = visible(build(name))
    net(*inputs(net)).square().sum().backward()
    missing = [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().max())]
    assert not missing


@names
def test_samples_of_a_batch_do_not_mix(name):
    net = visible(build(name))
    z, condition = inputs(net, batch=5)
    parts = torch.cat([net(z[:3], condition[:3]), net(z[3:], condition[3:])])
    torch.testing.assert_close(net(z, condition), parts, rtol=1e-4, atol=1e-5)


@names
def test_output_depends_on_the_condition(name):
    net = visible(build(name))
    z, condition = inputs(net)
    assert (net(z, condition) - net(z, 0.5 * condition)).abs().max() > 1e-3


@image_names
def test_dropout_acts_in_training_only(name):
    net = visible(build(name))
    arguments = inputs(net)
    assert torch.equal(net(*arguments), net(*arguments))
    net.train()
    assert not torch.equal(net(*arguments), net(*arguments))
    torch.manual_seed(3)
    first = net(*arguments)
    torch.manual_seed(3)
    assert torch.equal(first, net(*arguments))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_drops_at_its_rate(p):
    torch.manual_seed(0)
    n = 400_003  # not a multiple of four: the mask is drawn in groups of four
    y = Dropout(p).train()(torch.ones(n))
    kept = y != 0
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    torch.testing.assert_close(y[kept], torch.full((int(kept.sum()),), 1 / (1 - p)), rtol=1e-4, atol=0)
    for lag in (1, 2, 3, 4):  # neighbours share a random word: they must be independent all the same
        both = (kept[lag:] & kept[:-lag]).float().mean().item()
        assert abs(both - (1 - p) ** 2) < 5 / math.sqrt(n)


@image_names
def test_uncentred_data_are_mapped_to_the_centred_network(name):
    centred, uncentred = visible(build(name, centered=True)), visible(build(name, centered=False))
    uncentred.load_state_dict(centred.state_dict())
    z, condition = inputs(centred)
    torch.testing.assert_close(uncentred((z + 1) / 2, condition), centred(z, condition), rtol=1e-4, atol=1e-5)


def test_fourier_network_takes_sigma_and_uses_its_logarithm():
    net = visible(build("ncsnpp"))
    log_sigma = torch.tensor([-3.0, 0.0, 2.0])
    angle = 2 * math.pi * log_sigma[:, None] * net.encode.weight
    torch.testing.assert_close(net.encode(log_sigma.exp()), torch.cat((angle.sin(), angle.cos()), 1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("skip_rescale", [True, False])
def test_block_with_silent_branch_is_the_identity_over_root_two(skip_rescale):
    rescale = 1 / math.sqrt(2) if skip_rescale else 1.0
    block = ResidualBlock(8, 8, 16, 0.0, 0.0, "none", False, rescale)
    attention = AttentionBlock(8, 0.0, rescale)
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(block(x, torch.randn(2, 16)), x * rescale, rtol=0, atol=1e-3)
    torch.testing.assert_close(attention(x), x * rescale, rtol=0, atol=1e-3)


def test_skip_rescale_option_reaches_every_sum():
    net = build("ncsnpp", skip_rescale=False)
    assert {m.rescale for m in net.modules() if hasattr(m, "rescale")} == {1.0}
    assert {m.rescale for m in build("ncsnpp").modules() if hasattr(m, "rescale")} == {1 / math.sqrt(2)}


def test_attention_equals_its_formula():
    torch.manual_seed(0)
    block = AttentionBlock(8, 1.0, 1.0).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    tokens = block.norm(x).flatten(2).mT
    q, k, v = (tokens @ w.T for w in block.qkv.weight.chunk(3))
    h = block.out((q @ k.mT / math.sqrt(8)).softmax(-1) @ v)
    torch.testing.assert_close(block(x), x + h.mT.reshape(x.shape))


def test_fir_resampling_preserves_constants_inside_the_border():
    x = torch.full((1, 3, 8, 8), 0.7)
    torch.testing.assert_close(FIRDownsample(3)(x)[..., 1:-1, 1:-1], x[..., :2, :2])
    torch.testing.assert_close(FIRUpsample(3)(x)[..., 1:-1, 1:-1], x.repeat(1, 1, 2, 2)[..., 1:-1, 1:-1])


@pytest.mark.parametrize(("down", "up"), [(FIRDownsample(3), FIRUpsample(3)), (MeanDownsample(), NearestUpsample())])
def test_upsampling_is_four_times_the_adjoint_of_downsampling(down, up):
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 8, 6), torch.randn(2, 3, 4, 3)
    torch.testing.assert_close(4 * (down(x) * y).sum(), (x * up(y)).sum())


def test_fir_upsampling_interpolates_three_to_one():
    row = torch.arange(4.0).repeat(1, 1, 4, 1)
    expected = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.25, 2.75])
    torch.testing.assert_close(FIRUpsample(1)(row)[0, 0, 3, 1:-1], expected)


def test_waves_are_sines_and_cosines_of_octaves():
    x = torch.tensor([[0.3, -2.0]])
    angle = x[..., None] * torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(Waves(3, 0.5)(x), torch.cat((angle.sin(), angle.cos()), -1))


def test_input_waves_let_the_perceptron_fit_sharp_edges():
    """The squared error on the sign of a checkerboard after a short training; 1 is what a constant reaches."""

    def error(input_frequencies: int) -> float:
        torch.manual_seed(0)
        net = ScoreMLP((2,), width=32, depth=2, input_frequencies=input_frequencies)
        optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
        losses = []
        for _ in range(200):
            z = 4 * torch.rand(256, 2) - 2
            sign = 2.0 * (z.floor().sum(1, keepdim=True) % 2) - 1
            loss = (net(z, torch.zeros(256)) - sign).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return sum(losses[-20:]) / 20

    with_waves, without = error(3), error(0)
    assert with_waves < 0.15 and with_waves < 0.5 * without


def test_perceptron_takes_any_shape_and_refuses_none():
    net = visible(ScoreMLP((2, 3), width=8, depth=1))
    assert net(*inputs(net)).shape == (3, 2, 3)
    with pytest.raises(ValueError, match=r"^shape = \[\]: accepted .*$"):
        ScoreMLP(())


@image_names
def test_channels_last_gives_the_same_output(name):
    net = visible(build(name))
    z, condition = inputs(net)
    expected = net(z, condition)
    last = torch.channels_last
    actual = net.to(memory_format=last)(z.to(memory_format=last), condition)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 8), (1, 28, 28)])
@image_names
def test_other_shapes(name, shape):
    net = getattr(NCSNpp, name)(shape, **{**TINY, "attn_resolutions": ()})
    z, condition = inputs(net, batch=2)
    assert net(z, condition).shape == z.shape


def test_single_level_and_residual_input_without_fir():
    net = NCSNpp((1, 5, 5), nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(5,))
    assert net(*inputs(net)).shape == (3, 1, 5, 5)
    net = visible(build("ddpmpp", progressive_input="residual"))
    assert net(*inputs(net)).shape == (3, *SHAPE)


@names
def test_compiles_without_a_graph_break(name):
    net = visible(build(name)).train()  # dropout included
    arguments = inputs(net)
    torch._dynamo.reset()
    torch.manual_seed(3)
    expected = net(*arguments)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="eager")(*arguments), expected)


@names
def test_mixed_precision_stays_close(name):
    net = visible(build(name))
    arguments = inputs(net)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(*arguments)
    expected = net(*arguments)
    assert (output - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shape": (1, 6, 8), "ch_mult": (1, 1, 1), "attn_resolutions": ()}, ["ch_mult = [1, 1, 1]", "6x8"]),
        ({"attn_resolutions": (4, 16)}, ["attn_resolutions = [4, 16]", "[8, 4]"]),
        ({"nf": 7}, ["nf = 7", "even"]),
        ({"nf": 2}, ["nf = 2", "4 or more"]),
        ({"nf": 18}, ["nf = 18", "18 channels", "4 groups"]),
        ({"nf": 6}, ["nf = 6", "18 channels"]),
        ({"shape": (8, 8)}, ["shape = [8, 8]", "[channels, height, width]"]),
        ({"embedding": "learned"}, ["embedding = 'learned'", "'positional', 'fourier'"]),
        ({"progressive_input": "sum"}, ["progressive_input = 'sum'", "'none', 'residual'"]),
        ({"num_res_blocks": 0}, ["num_res_blocks = 0", "positive"]),
        ({"dropout": 1.0}, ["dropout = 1.0", "below 1"]),
        ({"ch_mult": ()}, ["ch_mult = []", "positive integers"]),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(options, words):
    with pytest.raises(ValueError) as caught:
        NCSNpp(**{"shape": SHAPE, **TINY, **options})
    message = str(caught.value)
    assert "\n" not in message and "accepted" in message
    for word in words:
        assert word in message


@image_names
def test_wide_images_are_only_rounded_differently(name):
    """From 16x16 pixels a CPU's network has another layout and constant factors in its weights, nothing else."""
    net = visible(getattr(NCSNpp, name)((2, 16, 16), **TINY | {"attn_resolutions": (8,)})).double()
    weights = [p for p in net.parameters() if p.requires_grad]
    z, condition = (value.double() for value in inputs(net))
    found = []
    for wide in (True, False):
        for module in net.modules():
            if hasattr(module, "wide"):
                assert module.wide or not wide
                module.wide = wide
        output = net(z, condition)
        found.append([output, *torch.autograd.grad(output.square().sum(), weights)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_unscaled_dropout_needs_its_gain():
    x = torch.ones(8, 16, 32, 32).contiguous(memory_format=torch.channels_last)
    dropout = Dropout(0.1).train()
    y = dropout.unscaled(x)
    assert set(y.unique().tolist()) == {0.0, 1.0} and y.is_contiguous(memory_format=torch.channels_last)
    mean = y.mean() * dropout.gain
    assert abs(mean - 1) < 5 * math.sqrt(0.1 / 0.9 / x.numel())
    assert dropout.eval().gain == 1 and dropout.unscaled(x) is x
