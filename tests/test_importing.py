"""Official checkpoints: their numbers from our networks, and files that are refused without executing anything."""

import math
import re

import pytest
import torch
import yaml
from importing_files import (
    CONTINUOUS,
    FLOW,
    FLOW_SETTINGS,
    NETS,
    NUMBERS,
    SETTINGS,
    SHAPE,
    Trap,
    case,
    flow_checkpoint,
    imported,
    official_checkpoint,
    refused,
    saved,
)
from safetensors.torch import load_file, save_file

from bench.checkpoint import file_hash
from bench.files import read_json
from bench.importing.networks import ForeignNetwork, chain_times, level_at
from bench.importing.pretrained import import_checkpoint, load_pretrained
from bench.importing.score_sde import CONFIGS, INDM_CONFIGS, layout
from bench.importing.torch_files import read_torch_file
from models.score import NCSNpp

# The official network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", list(NETS))
def test_imported_network_gives_the_official_numbers(config, tmp_path):
    model = load_pretrained(imported(tmp_path, config)).model
    official = case(config)
    exploding = config.startswith("ve/")
    told, output, t = official["told"].float(), official["output"], official["time"]
    if exploding:  # the official network divides by sigma itself
        sigmas = NUMBERS[f"net/{NETS[config]}/module.sigmas"]
        sigma = told if config.endswith("continuous") else sigmas[official["told"]].float()
        output = (output * sigma[:, None, None, None]).float()
    with torch.no_grad():
        torch.testing.assert_close(model.score.net.net(official["input"], told), output, rtol=0, atol=1e-5)
    assert output.square().mean() > 0.1  # the comparison sees something

    # the whole score, its time and the units of its data included: x = 2 y - 1 for y in [0, 1]
    z = 2 * official["input"] - 1 if exploding else official["input"]
    if config == "vp/cifar10_ddpmpp":
        t = model.chain.times[official["told"]].float()
    with torch.no_grad():
        score = model.score(z, t)
    expected = official["score"].float() / (2 if exploding else 1)
    # official standard deviations and times are rounded to float32, a few 1e-5 of the score
    assert (score - expected).abs().max() < 5e-5 * expected.abs().max()


def test_exploding_units_are_those_of_data_in_minus_one_to_one(tmp_path):
    model = load_pretrained(imported(tmp_path, "ve/cifar10_ncsnpp_continuous")).model
    assert (model.sde.sigma_min, model.sde.sigma_max, model.sde.prior_std) == (0.02, 100.0, 100.0)
    seen = []
    model.score.net.net.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    x, t = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, *SHAPE), torch.tensor([0.0, 0.5, 1.0])
    with torch.no_grad():
        model.score(x, t)
    (y, sigma), *_ = seen
    torch.testing.assert_close(y[:, 0, 0, 0], torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(sigma, torch.tensor([0.01, math.sqrt(0.01 * 50), 50.0]))


# those of the class ddpm: test_importing_ddpm
@pytest.mark.parametrize("config", [name for name in CONFIGS | INDM_CONFIGS if "ddpm" not in re.split("[/_]", name)])
def test_every_configuration_maps_every_parameter_once(config):
    chosen = (CONFIGS | INDM_CONFIGS)[config]
    options = {key: value for key, value in chosen.model["score"].items() if key != "name"}
    with torch.device("meta"):
        net = NCSNpp((3, 32, 32), **options)
    entries = layout(net)
    assert [entry.own for entry in entries] == list(dict.fromkeys(entry.own for entry in entries))
    assert {entry.own for entry in entries} == set(net.state_dict())
    names = [name for entry in entries for name in entry.official]
    assert len(names) == len(set(names))
    numbers = {int(name.split(".")[1]) for name in names}
    # the positional embedding has no module of its own; else no number is left out
    assert numbers == set(range(max(numbers) + 1))
    # counted on the official networks
    deep, family = "deep" in config, (options["embedding"], options["progressive_input"])
    published = {
        ("positional", "none"): (61_804_419, 106_632_579),
        ("positional", "residual"): (62_693_251, 107_521_411),
        ("fourier", "residual"): (62_758_787 + 128, 107_586_947 + 128),
    }
    assert sum(p.numel() for p in net.parameters()) == published[family][deep]


def test_averaged_and_raw_weights_are_told_apart(tmp_path):
    config = "ve/cifar10_ncsnpp_continuous"
    averaged = load_file(imported(tmp_path, config) / "weights" / "model.safetensors")
    (tmp_path / "raw").mkdir()
    raw = load_file(imported(tmp_path / "raw", config, weights="raw") / "weights" / "model.safetensors")
    start = "net/ncsnpp_fourier/module.all_modules."
    torch.testing.assert_close(averaged["stem.weight"], NUMBERS[f"{start}3.weight"], rtol=0, atol=0)
    assert raw["stem.weight"].abs().max() == 0
    # frequencies have no gradient, hence no average
    for state in (averaged, raw):
        torch.testing.assert_close(state["encode.weight"], NUMBERS[f"{start}0.W"], rtol=0, atol=0)


def test_provenance_names_the_source(tmp_path):
    out = imported(tmp_path, CONTINUOUS)
    record = read_json(out / "provenance.json")
    assert record["source"]["sha256"] == file_hash(tmp_path / "checkpoint_7.pth")
    assert record["source"] | {"file": "checkpoint_7.pth", "step": 7, "ema_decay": 0.9999} == record["source"]
    assert record["weights_sha256"] == file_hash(out / "weights" / "model.safetensors")
    assert str(tmp_path) not in (out / "provenance.json").read_text() + (out / "config.yaml").read_text()


# INDM ----------------------------------------------------------------------------------------------------------------


def imported_indm(folder, config: str):
    score = saved(folder, official_checkpoint("ncsnpp_fourier" if config.startswith("ve") else "ddpmpp"))
    flow = saved(folder, flow_checkpoint(), "flow_checkpoint_7.pth")
    out = folder / "indm"
    import_checkpoint(score, out, config, "indm", shape=SHAPE, settings=SETTINGS + FLOW_SETTINGS, flow=flow)
    return out


def test_imported_flow_gives_the_official_latents(tmp_path):
    out = imported_indm(tmp_path, "vp/CIFAR10/indm_nll")
    model = load_pretrained(out).model
    official = {name: FLOW[f"case/{name}"] for name in ("input", "mean", "log_var", "h", "kl", "z")}
    x, h = official["input"], official["h"]
    with torch.no_grad():
        mean, log_var = model.flow.moments(x)
        torch.testing.assert_close(mean, official["mean"], rtol=0, atol=1e-5)
        torch.testing.assert_close(log_var, official["log_var"], rtol=0, atol=1e-5)
        torch.testing.assert_close(model.flow.given(h).latent(x), official["z"], rtol=0, atol=1e-5)
        eps = (h - mean) / (0.5 * log_var).exp()
        log_q = -0.5 * ((log_var + eps.square()).sum(1) + h.shape[1] * math.log(2 * math.pi))
        torch.testing.assert_close(log_q - model.flow.prior.log_prob(h), official["kl"], rtol=1e-5, atol=1e-4)
    assert (official["z"] - x).abs().max() > 0.1
    source = read_json(out / "provenance.json")["source"]
    assert source["flow"]["sha256"] == file_hash(tmp_path / "flow_checkpoint_7.pth")

    weights = out / "weights" / "flow.safetensors"
    state = load_file(weights)
    state["head.bias"] += 1
    save_file(state, weights)
    assert "flow.safetensors: sha256" in refused(load_pretrained, out)


def test_exploding_flow_sees_data_in_zero_to_one(tmp_path):
    flow = load_pretrained(imported_indm(tmp_path, "ve/CIFAR10/indm")).model.flow
    x = FLOW["case/input"]
    draw = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    with torch.no_grad():
        z, log_det = flow(x, draw())
        inner, expected = flow.flow((x + 1) / 2, draw())
        torch.testing.assert_close(z, 2 * inner - 1)
        torch.testing.assert_close(log_det, expected)
        torch.testing.assert_close(flow.latent(x, generator=draw()), z)
        back = flow.inverse(z, generator=draw())
        torch.testing.assert_close(back, 2 * flow.flow.inverse((z + 1) / 2, draw()) - 1)
        fixed = flow.given(flow.posterior(x, draw())[0])
        torch.testing.assert_close(fixed.latent(x), z)
        torch.testing.assert_close(fixed.inverse(z), x, rtol=0, atol=1e-4)
    assert (back - z).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("discriminator.fc.linear.bias", None, "discriminator.fc.linear.bias: missing"),
        ("discriminator.fc.linear.bias", torch.zeros(3), "has shape [3]: accepted: [128]"),
        ("generator.flow.transforms.2.weight", torch.zeros(3), "unexpected"),
        ("discriminator.fc.linear.bias", torch.full((128,), math.inf), "not finite"),
    ],
)
def test_other_flows_are_refused_in_one_line(name, value, said, tmp_path):
    content = flow_checkpoint()
    content["model"].pop(f"module.{name}", None)
    if value is not None:
        content["model"][f"module.{name}"] = value
    score, flow = saved(tmp_path, official_checkpoint("ddpmpp")), saved(tmp_path, content, "flow.pth")
    options = {"shape": SHAPE, "settings": SETTINGS + FLOW_SETTINGS, "flow": flow}
    text = refused(import_checkpoint, score, tmp_path / "out", "vp/CIFAR10/indm_nll", "indm", **options)
    assert said in text and not (tmp_path / "out").exists()
    options["settings"] = SETTINGS
    assert "--flow" in refused(import_checkpoint, score, tmp_path / "out", CONTINUOUS, **options)


# Noise levels --------------------------------------------------------------------------------------------------------


def test_levels_are_met_at_equal_alpha_bar():
    times = chain_times(1000, 0.1, 20.0)
    index = torch.tensor([0, 1, 30, 700, 999])
    torch.testing.assert_close(level_at(times[index], times), index.double(), rtol=0, atol=1e-9)
    middle = (times[30] + times[31]) / 2
    torch.testing.assert_close(level_at(middle[None], times), torch.tensor([30.5], dtype=torch.float64))
    assert level_at(torch.tensor([0.0, 2.0], dtype=torch.float64), times).tolist() == [0.0, 999.0]
    # through float32, as the harness supplies it
    net = ForeignNetwork(torch.nn.Identity(), "level", times=times)
    torch.testing.assert_close(net.told(999 * times[index].float()), index.float(), rtol=0, atol=2e-4)


def test_reversed_levels_begin_with_the_largest_noise():
    net = ForeignNetwork(torch.nn.Identity(), "reversed_level", levels=1000)
    torch.testing.assert_close(net.told(999 * torch.tensor([1.0, 0.25, 0.0])), torch.tensor([0.0, 749.25, 999.0]))


# Files that are refused ----------------------------------------------------------------------------------------------


class Harmless:
    """Of a class that a checkpoint of weights has no use for."""


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_nothing_in_a_file_is_executed(options, tmp_path):
    trap = tmp_path / "sprung"
    path = saved(tmp_path, official_checkpoint("ddpmpp") | {"step": Trap(trap)}, **options)
    said = refused(import_checkpoint, path, tmp_path / "out", CONTINUOUS, shape=SHAPE, settings=SETTINGS)
    assert ("not a zip archive" if options else "it asks for") in said
    assert not trap.exists() and not (tmp_path / "out").exists()


def test_formats_before_the_zip_archive_are_refused(tmp_path):
    path = saved(tmp_path, official_checkpoint("ddpmpp"), _use_new_zipfile_serialization=False)
    assert "since 1.6" in refused(read_torch_file, path)


def test_classes_declared_safe_elsewhere_are_refused_here(tmp_path):
    path = saved(tmp_path, {"model": Harmless()})
    with torch.serialization.safe_globals([Harmless]):
        assert isinstance(torch.load(path, weights_only=True)["model"], Harmless)
        assert "Harmless" in refused(read_torch_file, path)
        assert Harmless in torch.serialization.get_safe_globals()  # as others declared it


def test_damaged_files_are_refused(tmp_path):
    path = saved(tmp_path, official_checkpoint("ddpmpp"))
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused(read_torch_file, path)
    assert "no such file" in refused(read_torch_file, tmp_path / "nosuch.pth")
    assert "holds a list" in refused(read_torch_file, saved(tmp_path, [torch.zeros(2)]))


def without(name: str):
    return lambda content: content.pop(name)


def set_weight(name: str, value):
    def change(content):
        content["model"][name] = value
        content["ema"]["shadow_params"] = [v for n, v in content["model"].items() if n != "module.sigmas"]

    return change


def drop_weight(name: str):
    def change(content):
        del content["model"][name]
        content["ema"]["shadow_params"] = [v for n, v in content["model"].items() if n != "module.sigmas"]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("ema"), "ema: missing (it has optimizer, model, step)"),
        (without("model"), "model: missing"),
        (lambda c: c.update(model=torch.zeros(3)), "model = a Tensor: must be a mapping"),
        (lambda c: c["ema"].update(shadow_params=None), "ema.shadow_params = a NoneType: accepted: a list of"),
        (lambda c: c["ema"]["shadow_params"].pop(), "tensors: accepted: a list of"),
        (lambda c: c["ema"]["shadow_params"].reverse(), "has shape"),
        (set_weight("module.all_modules.2.weight", torch.zeros(4, 1, 3, 3)), "[4, 1, 3, 3]: accepted: [4, 3, 3, 3]"),
        (set_weight("module.all_modules.2.bias", torch.full((4,), math.nan)), "not finite"),
        (set_weight("module.all_modules.2.bias", torch.zeros(4, dtype=torch.int64)), "torch.int64: accepted"),
        (set_weight("module.extra.weight", torch.zeros(4)), "extra.weight: unexpected"),
        (drop_weight("module.all_modules.4.GroupNorm_0.bias"), "all_modules.4.GroupNorm_0.bias: missing"),
    ],
)
def test_other_checkpoints_are_refused_in_one_line(change, said, tmp_path):
    content = official_checkpoint("ddpmpp")
    change(content)
    path = saved(tmp_path, content)
    text = refused(import_checkpoint, path, tmp_path / "out", CONTINUOUS, shape=SHAPE, settings=SETTINGS)
    assert said in text and str(path) in text and not (tmp_path / "out").exists()


def test_checkpoint_of_other_noise_levels_is_refused(tmp_path):
    content = official_checkpoint("ncsnpp")
    content["model"]["module.sigmas"] = content["model"]["module.sigmas"] * 2
    path = saved(tmp_path, content)
    text = refused(import_checkpoint, path, tmp_path / "out", "ve/cifar10_ncsnpp", shape=SHAPE, settings=SETTINGS)
    assert "sigmas = 1000 from 0.02 to 100: accepted: 1000 from 0.01 to 50" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": "vp/cifar10_ddpm"}, "--config vp/cifar10_ddpm: unknown to score_sde; accepted: vp/cifar10_ddpmpp"),
        ({"kind": "edm"}, "--kind edm: unknown; accepted: score_sde, indm"),
        ({"weights": "best"}, "--weights best: unknown; accepted: ema, raw"),
        ({"settings": [*SETTINGS, "model.score.nf=6"]}, "model.score: nf = 6"),
        ({"settings": [*SETTINGS, "model.score.width=6"]}, "model.score.width: unknown key"),
        ({"settings": [*SETTINGS, "model.score.embedding=fourier"]}, 'embedding = "fourier": accepted: positional'),
        ({"settings": [*SETTINGS, "model.sde.name=ve"]}, 'model.sde.name = "ve": accepted: vp'),
        ({"settings": [*SETTINGS, "model.flow={name: glow, steps: [1], hidden: 4}"]}, 'flow.name = "glow": accepted'),
        ({"settings": ["train.steps=3"]}, "--set train: unknown key; accepted: model.*"),
        ({"settings": []}, "has shape [16, 4]: accepted: [512, 128]"),
    ],
)
def test_unknown_names_and_settings_are_refused_in_one_line(options, said, tmp_path):
    path = saved(tmp_path, official_checkpoint("ddpmpp"))
    arguments = {"config": CONTINUOUS, "settings": SETTINGS, "shape": SHAPE} | options
    if not arguments["settings"]:
        arguments["shape"] = (3, 32, 32)
    assert said in refused(import_checkpoint, path, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_folders_that_were_changed_are_refused(tmp_path):
    out = imported(tmp_path, CONTINUOUS)
    assert "exists and is not an empty folder" in refused(
        import_checkpoint, tmp_path / "checkpoint_7.pth", out, CONTINUOUS, shape=SHAPE, settings=SETTINGS
    )
    weights = out / "weights" / "model.safetensors"
    state = load_file(weights)
    state["stem.bias"] += 1
    save_file(state, weights)
    assert "sha256" in refused(load_pretrained, out)
    (out / "provenance.json").unlink()
    assert "a finished import" in refused(load_pretrained, out)
    assert "see import-checkpoint" in refused(load_pretrained, tmp_path / "checkpoint_7.pth")
    assert "no config.yaml" in refused(load_pretrained, tmp_path)


def test_score_of_latents_is_imported_but_not_evaluated_alone(tmp_path):
    out = imported(tmp_path, "vp/CIFAR10/indm_nll", kind="indm")
    assert yaml.safe_load((out / "config.yaml").read_text())["space"] == "latents"
    assert "space = latents" in refused(load_pretrained, out)
