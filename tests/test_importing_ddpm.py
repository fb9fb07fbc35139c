"""Checkpoints of score_sde's `ddpm`: the official numbers from our network, what is refused, what it is measured by.

tests/data/score_sde_ddpm.safetensors was written by github.com/yang-song/score_sde_pytorch at cb1f359 on a CPU: its
class ddpm at nf = 32, ch_mult = (1, 2, 1), attention at 4, images 3x8x8, all else as in the configuration that is
named. The metadata hold the names and shapes of its parameters in its own order; their values are `weights` below, a
stream of numpy's that does not change, and were loaded into it. `sigmas` is its buffer of noise levels;
`case/<configuration>/` is as in importing_files.
"""

import json
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from importing_files import GOLDEN, SHAPE, refused, saved
from safetensors import safe_open
from safetensors.torch import load_file

from bench.files import read_json
from bench.importing.pretrained import import_checkpoint, load_pretrained
from bench.importing.score_sde import CONFIGS, UNBUILT, convert, layout, read_checkpoint
from models.score.ddpm_unet import DDPMUNet

NUMBERS = load_file(GOLDEN.with_name("score_sde_ddpm.safetensors"))
with safe_open(GOLDEN.with_name("score_sde_ddpm.safetensors"), "pt") as stream:
    SHAPES = json.loads(stream.metadata()["shapes"])
NAMES = ["vp/ddpm/cifar10", "vp/ddpm/cifar10_continuous", "subvp/cifar10_ddpm_continuous", "ve/cifar10_ddpm"]
CONTINUOUS = "vp/ddpm/cifar10_continuous"
TINY = ["nf=32", "ch_mult=[1, 2, 1]", "attn_resolutions=[4]"]
SETTINGS = [f"model.score.{setting}" for setting in TINY]
SIZES = {"nf": 32, "ch_mult": (1, 2, 1), "attn_resolutions": (4,)}
MIDDLE = "module.all_modules.12."  # the attention there


def weights() -> OrderedDict[str, torch.Tensor]:
    """By official name: N(0, 1 / fan-in), biases N(0, 0.01), normalisation 1 + N(0, 0.01)."""
    source, drawn = np.random.RandomState(0), OrderedDict()
    for name, shape in SHAPES.items():
        values = source.standard_normal(shape)
        if len(shape) > 1:
            values /= math.sqrt(shape[0] if name.endswith(".W") else math.prod(shape[1:]))
        else:
            values = 0.1 * values + name.endswith(".weight")
        drawn[name] = torch.from_numpy(values).float()
    return drawn


def checkpoint() -> dict:
    """As the official code saves it, the parameters of its last step zero."""
    averaged = weights()
    raw = {name: torch.zeros_like(value) for name, value in averaged.items()}
    return {
        "optimizer": {},
        "model": OrderedDict({"module.sigmas": NUMBERS["sigmas"]} | raw),
        "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": list(averaged.values())},
        "step": 7,
    }


def imported(folder, config: str, content=None, **options):
    out = folder / "imported"
    import_checkpoint(saved(folder, content or checkpoint()), out, config, shape=SHAPE, settings=SETTINGS, **options)
    return out


@pytest.mark.parametrize("config", NAMES)
def test_imported_network_gives_the_official_numbers(config, tmp_path):
    model = load_pretrained(imported(tmp_path, config)).model
    case = {name: NUMBERS[f"case/{config}/{name}"] for name in ("input", "told", "time", "output", "score")}
    exploding, output, t = config.startswith("ve/"), case["output"], case["time"]
    if exploding:  # the official network divides by sigma itself
        output = (output * NUMBERS["sigmas"][case["told"]][:, None, None, None]).float()
    with torch.no_grad():
        told = model.score.net.net(case["input"], case["told"].float())
        torch.testing.assert_close(told, output, rtol=0, atol=1e-5)
    assert output.square().mean() > 0.1  # the comparison sees something

    # the whole score, its time and the units of its data included: x = 2 y - 1 for y in [0, 1]
    z = 2 * case["input"] - 1 if exploding else case["input"]
    if config == "vp/ddpm/cifar10":
        t = model.chain.times[case["told"]].float()
    with torch.no_grad():
        score = model.score(z, t)
    expected = case["score"].float() / (2 if exploding else 1)
    # official standard deviations and times are rounded to float32, a few 1e-5 of the score
    assert (score - expected).abs().max() < 5e-5 * expected.abs().max()


@pytest.mark.parametrize("config", NAMES)
def test_every_published_parameter_is_mapped_once(config):
    options = {key: value for key, value in CONFIGS[config].model["score"].items() if key != "name"}
    with torch.device("meta"):
        net = DDPMUNet((3, 32, 32), **options)
    entries, own = layout(net), net.state_dict()
    assert len(entries) == len(own) and {entry.own for entry in entries} == set(own)
    names = [name for entry in entries for name in entry.official]
    assert len(names) == len(set(names))
    numbers = {int(name.split(".")[1]) for name in names}
    assert numbers == set(range(max(numbers) + 1))
    # counted on the official network, which attends less often than that of Ho et al. (35.7 million)
    assert sum(p.numel() for p in net.parameters()) == 35_218_947


def test_order_is_the_official_one():
    net = DDPMUNet(SHAPE, **SIZES)
    modules = lambda names: list(dict.fromkeys(int(name.split("all_modules.")[1].split(".")[0]) for name in names))  # noqa: E731
    assert modules(name for entry in layout(net) for name in entry.official) == modules(SHAPES)


def test_averaged_and_raw_weights_are_told_apart(tmp_path):
    averaged = load_file(imported(tmp_path, CONTINUOUS) / "weights" / "model.safetensors")
    (tmp_path / "raw").mkdir()
    raw = load_file(imported(tmp_path / "raw", CONTINUOUS, weights="raw") / "weights" / "model.safetensors")
    wanted = weights()
    torch.testing.assert_close(averaged["unet.conv_in.weight"], wanted["module.all_modules.2.weight"], rtol=0, atol=0)
    key = averaged["unet.mid_block.attentions.0.to_k.weight"]
    matrices = [value.T for name, value in wanted.items() if name.endswith("NIN_1.W")]
    assert any(value.shape == key.shape and torch.equal(value, key) for value in matrices)
    assert all(value.abs().max() == 0 for value in raw.values())
    assert read_json(tmp_path / "imported" / "provenance.json")["source"]["step"] == 7


@pytest.mark.parametrize("config", [CONTINUOUS, "ve/cifar10_ddpm"])
def test_likelihood_and_samples(config, tmp_path):
    content = checkpoint()
    head = content["ema"]["shadow_params"][-2:]
    for value in head:
        value.zero_()
    silent = load_pretrained(imported(tmp_path, config, content)).model
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def nll(model, tolerance: float, corrected: bool) -> dict[str, torch.Tensor]:
        options = {"corrected": corrected, "generator": torch.Generator().manual_seed(1)}
        return model.nll_parts(x, tolerance, tolerance, **options)

    # without a score the ODE only scales: z(1) = r z(eps), and the divergence integrates to d log r
    (alpha, _), (start, _) = silent.sde.marginal(torch.ones(1)), silent.sde.marginal(torch.full((1,), silent.sde.eps))
    ratio, std, d = float(alpha / start), silent.sde.prior_std, x[0].numel()
    z = ratio * x.flatten(1)
    prior = 0.5 * (z / std).square().sum(1) + d * (math.log(std) + 0.5 * math.log(2 * math.pi))
    parts = nll(silent, 1e-3, corrected=False)
    torch.testing.assert_close(parts["prior"] + parts["ode"], prior - d * math.log(ratio), rtol=1e-3, atol=0)

    for value, drawn in zip(head, list(weights().values())[-2:], strict=True):
        value.copy_(0.02 * drawn)
    (tmp_path / "loud").mkdir()
    model = load_pretrained(imported(tmp_path / "loud", config, content)).model
    moved = nll(model, 1e-2, corrected=True)
    assert all(torch.isfinite(value).all() for value in moved.values())
    assert (moved["ode"] - parts["ode"]).abs().max() > 10
    assert torch.isfinite(model.nelbo(x, times=2, generator=torch.Generator().manual_seed(1))).all()
    draws = [model.sample(2, 3, "ddim", generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert draws[0].shape == (2, *SHAPE) and torch.isfinite(draws[0]).all() and model.nfe >= 3
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_chain_of_the_discrete_network(tmp_path):
    model = load_pretrained(imported(tmp_path, "vp/ddpm/cifar10")).model
    assert model.chain.times.shape == (1000,)
    assert torch.isfinite(model.sample(1, 3, "ddim", generator=torch.Generator().manual_seed(0))).all()


# What is refused -----------------------------------------------------------------------------------------------------


def change_average(suffix: str, value):
    def change(content):
        name = next(name for name in content["model"] if name.endswith(suffix))
        content["model"][name] = value(content["model"][name])
        shadows = weights()
        shadows[name] = value(shadows[name])
        content["ema"]["shadow_params"] = list(shadows.values())

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_average(".NIN_0.W", lambda v: v[:, :-1]), "NIN_0.W has shape [32, 63]: accepted: [32, 64]"),
        (change_average(".NIN_0.W", lambda v: v.T[:, :, None, None]), "shape [64, 32, 1, 1]: accepted: [32, 64]"),
        (change_average(".NIN_3.b", lambda v: v * math.nan), "NIN_3.b holds a value that is not finite"),
        (lambda c: c["model"].update({"module.sigmas": c["model"]["module.sigmas"] * 2}), "from 0.02 to 100: accepted"),
        (lambda c: c["ema"]["shadow_params"].pop(), "tensors: accepted: a list of"),
    ],
)
def test_other_checkpoints_are_refused_in_one_line(change, said, tmp_path):
    content = checkpoint()
    change(content)
    text = refused(imported, tmp_path, "ve/cifar10_ddpm", content)
    assert said in text and not (tmp_path / "imported").exists()


def test_networks_are_not_taken_for_one_another(tmp_path):
    path = saved(tmp_path, checkpoint())
    options = {"shape": SHAPE, "settings": [*SETTINGS, "model.score.num_res_blocks=2"]}
    assert "accepted:" in refused(import_checkpoint, path, tmp_path / "out", "vp/cifar10_ddpmpp_continuous", **options)
    tensors = read_checkpoint(path).tensors
    with torch.device("meta"):
        net = DDPMUNet(SHAPE, **SIZES | {"num_res_blocks": 1})
    assert "accepted:" in refused(convert, path, tensors, net, CONTINUOUS)
    narrow = [*SETTINGS, "model.score.nf=48"]
    text = refused(import_checkpoint, path, tmp_path / "out", CONTINUOUS, shape=SHAPE, settings=narrow)
    assert "nf = 48: accepted is a multiple of 32" in text
    for config in UNBUILT:
        text = refused(import_checkpoint, path, tmp_path / "out", config)
        assert f"--config {config}: the official PyTorch code fails" in text
    assert not (tmp_path / "out").exists()


# The network itself --------------------------------------------------------------------------------------------------


def test_new_network_begins_near_zero_and_learns():
    torch.manual_seed(0)
    net = DDPMUNet(SHAPE, **SIZES).train()
    z, told = torch.randn(2, *SHAPE), torch.tensor([10.0, 900.0])
    output = net(z, told)
    assert output.shape == z.shape and output.abs().max() < 1e-3
    output.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_second_derivatives_and_double_precision():
    torch.manual_seed(0)
    net = DDPMUNet(SHAPE, **SIZES).double().eval()
    net.load_state_dict({name: value.normal_(std=0.1) for name, value in net.state_dict().items()})
    z = torch.randn(1, *SHAPE, dtype=torch.float64, requires_grad=True)
    v = torch.randn_like(z)
    told = torch.tensor([5.0], dtype=torch.float64)

    def slope(at):
        return torch.autograd.grad((net(at, told) * v).sum(), at, create_graph=True)[0]

    (second,) = torch.autograd.grad((slope(z) * v).sum(), z)
    step = 1e-5
    with torch.enable_grad():
        moved = [slope((z + sign * step * v).detach().requires_grad_()) for sign in (1, -1)]
    expected = (moved[0] - moved[1]) / (2 * step)
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-7 * float(expected.detach().abs().max()))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"nf": 33}, "multiple of 32"), ({"attn_resolutions": (16,)}, "heights"), ({"num_res_blocks": 0}, "positive")],
)
def test_sizes_that_cannot_be_built_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        DDPMUNet(SHAPE, **SIZES | options)
