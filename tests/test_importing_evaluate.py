"""`evaluate --pretrained`: imported checkpoints, folders of diffusers and exported models, as runs of a suite."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from importing_files import (
    CONTINUOUS,
    EVALUATION,
    SETTINGS,
    Trap,
    digits_checkpoint,
    imported,
    indm_bench,
    refused,
    settings,
)
from safetensors.torch import load_file, save_file

import models
from bench.checkpoint import file_hash, save_weights
from bench.config import dump_config, load_suite
from bench.data import load
from bench.files import read_json, write_json, write_text_atomic
from bench.importing import measure as importing
from bench.importing.pretrained import import_checkpoint, load_pretrained
from bench.likelihood import measure


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    for variable in ("RUNS", "REPORTS", "CHECKPOINTS"):
        monkeypatch.setenv(f"INDM_BENCH_{variable}", str(tmp_path / variable.lower()))
    return tmp_path


def test_command_line_imports_and_evaluates(capsys, project):
    path, net = digits_checkpoint(project)
    out = project / "imported"
    arguments = [path, "--kind", "score_sde", "--config", CONTINUOUS, "--out", out, "--shape", "1,8,8"]
    code, said, err = indm_bench(capsys, "import-checkpoint", *arguments, *settings(SETTINGS))
    assert code == 0 and f"{CONTINUOUS} (ema weights)" in said, err

    measuring = ["evaluate", "--pretrained", out, "--suite", "smoke", "--dataset", "digits", "--name", "theirs"]
    code, said, err = indm_bench(capsys, *measuring, *settings(EVALUATION))
    assert code == 0, err
    folder = project / "runs" / "smoke" / "theirs" / "0" / "digits"
    record, rows = read_json(folder / "likelihood.json"), (folder / "robustness.csv").read_text().splitlines()
    assert f"NLL {record['nll']['corrected']['total']:.4f} bits/dim" in said
    assert [row.split(",")[:3] for row in rows[1:]] == [["ddim", "2", "2.0"], ["ddim", "3", "3.0"]]
    assert {"config.yaml", "provenance.json", "per_image.npz", "samples.png"} <= {p.name for p in folder.iterdir()}
    provenance = read_json(folder / "provenance.json")
    assert provenance["source"]["sha256"] == file_hash(path)
    assert record["protocol"]["weights"] == "ema" and record["n"] == 2

    # the same numbers as the harness's own model of these weights
    own = models.build({"name": "indm", "shape": [1, 8, 8], "sde": {"name": "vp"}, "flow": {"name": "identity"}} | {
        "score": {"name": "ncsnpp", "nf": 4, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4]}
    })  # fmt: skip
    own.score.net.load_state_dict(net.state_dict())
    (run,) = load_suite("smoke", EVALUATION).runs("ddpmpp-vp", 0, "digits")
    expected, _ = measure(own.eval().requires_grad_(False), load("digits"), run.evaluate, 0)
    for quantity in ("nll", "nelbo"):
        number = expected[quantity]["corrected"]["total"]
        assert record[quantity]["corrected"]["total"] == pytest.approx(number, rel=1e-6)
        assert np.isfinite(number)

    written = (folder / "likelihood.json").stat().st_mtime_ns
    assert indm_bench(capsys, *measuring, *settings(EVALUATION))[0] == 0
    assert (folder / "likelihood.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate"], "SUITE is missing"),
        (["evaluate", "smoke"], "VARIANT is missing"),
        (["evaluate", "smoke", "ddpmpp-vp", "--name", "x"], "--name: accepted: only with --pretrained"),
        (["evaluate", "smoke", "ddpmpp-vp", "--suite", "digits"], "--suite digits: accepted"),
        (["evaluate", "smoke", "--pretrained", "{}", "--workers", "2"], "--workers 2: accepted"),
        (["evaluate", "smoke", "--pretrained", "{}"], "--dataset: missing, smoke has several"),
        (["evaluate", "nosuch", "--pretrained", "{}"], "unknown suite 'nosuch'"),
        (["evaluate", "smoke", "--pretrained", "{}", "--dataset", "digits", "--seed", "-1"], "--seed -1: accepted"),
        (["evaluate", "smoke", "x", "--pretrained", "{}", "--dataset", "digits"], "variant 'x'"),
        (["evaluate", "smoke", "--pretrained", "{}", "--dataset", "digits", "--name", "indm-ve"], "taken by a variant"),
        (["evaluate", "smoke", "--pretrained", "{}", "--dataset", "digits", "--name", "a/b"], "--name 'a/b'"),
        (["evaluate", "smoke", "--pretrained", "{}", "--dataset", "digits"], "[3, 8, 8]: accepted: [1, 8, 8]"),
        (["evaluate", "smoke", "--pretrained", "{}", "--dataset", "digits", "--out", "{}"], "accepted: [1, 8, 8]"),
        (
            ["import-checkpoint", "{}", "--config", CONTINUOUS, "--out", "x", "--shape", "3,32"],
            "--shape 3,32: accepted",
        ),
        (["import-checkpoint", "{}", "--config", CONTINUOUS, "--out", "{}"], "not an empty folder"),
        (["import-checkpoint", "{}", "--config", CONTINUOUS], "--out"),
        (["import-checkpoint", "{}", "--config", CONTINUOUS, "--out", "x", "--flow", "y"], "--flow y: accepted: only"),
    ],
)
def test_bad_commands_are_one_line_and_exit_code_2(arguments, said, capsys, project):
    out = imported(project, CONTINUOUS)
    code, printed, err = indm_bench(capsys, *(word.replace("{}", str(out)) for word in arguments))
    assert code == 2 and not printed and err.count("\n") == 1 and said in err
    assert not (project / "runs").exists()


def test_results_never_land_on_weights(project, capsys):
    path, _ = digits_checkpoint(project)
    out = project / "imported"
    import_checkpoint(path, out, CONTINUOUS, shape=(1, 8, 8), settings=SETTINGS)
    before = (out / "config.yaml").read_bytes()
    measuring = ["evaluate", "smoke", "--pretrained", out, "--dataset", "digits", "--out", out]
    code, _, err = indm_bench(capsys, *measuring, *settings(EVALUATION))
    assert code == 2 and "holds weights" in err and (out / "config.yaml").read_bytes() == before


def test_models_of_the_harness_itself_are_loaded_too(tmp_path):
    (run,) = load_suite("smoke").runs("ddpmpp-vp", 0, "digits")
    torch.manual_seed(0)
    model = models.build({**run.model, "shape": [1, 8, 8]}).eval()
    save_weights(tmp_path, model.state_dict(), run.resolved())
    write_text_atomic(tmp_path / "config.yaml", dump_config(run))
    loaded = load_pretrained(tmp_path)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.score(x, t), model.score(x, t), rtol=0, atol=0)
    assert loaded.description["kind"] == "indm-bench" and loaded.shape == (1, 8, 8)


# Folders of diffusers ------------------------------------------------------------------------------------------

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "linear",
    "beta_start": 0.002,
    "beta_end": 0.4,
    "num_train_timesteps": 50,
    "variance_type": "fixed_large",
    "clip_sample": True,
}


def diffusers_folder(folder: Path, flat: bool = False, safe: bool = True, **scheduler) -> UNet2DModel:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    ).eval()
    unet.save_pretrained(folder if flat else folder / "unet", safe_serialization=safe)
    write_json((folder if flat else folder / "scheduler") / "scheduler_config.json", SCHEDULER | scheduler)
    return unet


@pytest.mark.parametrize(("flat", "safe"), [(False, True), (True, False)])
def test_diffusers_network_is_told_its_own_levels(flat, safe, tmp_path):
    unet = diffusers_folder(tmp_path, flat, safe)
    loaded = load_pretrained(tmp_path)
    model, z, level = loaded.model, torch.randn(2, 1, 8, 8), torch.tensor([3, 41])
    # its chain is the library's: alpha_bar of level i is the product of 1 - beta_0 .. 1 - beta_i
    alpha_bar = torch.cumprod(1 - torch.linspace(0.002, 0.4, 50, dtype=torch.float64), 0)
    torch.testing.assert_close(model.chain.alpha.square(), alpha_bar)
    with torch.no_grad():
        expected = unet(z, level).sample
        torch.testing.assert_close(model.noise(z, model.chain.times[level].float()), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.sde.marginal(model.chain.times)[0].square(), alpha_bar)
    assert (model.chain.clip, model.chain.reverse_variance, loaded.shape) == (1.0, "fixed_large", (1, 8, 8))


def test_diffusers_folder_is_evaluated(capsys, project):
    folder = project / "ddpm-digits"
    diffusers_folder(folder, flat=True)
    results, ancestral = project / "results", "evaluate.samplers=[{name: ancestral, steps: [4]}]"
    measuring = ["evaluate", "smoke", "ddpm", "--pretrained", folder, "--dataset", "digits", "--out", results]
    code, _, err = indm_bench(capsys, *measuring, *settings([*EVALUATION, ancestral]))
    assert code == 0 and not (project / "runs").exists(), err
    record = read_json(results / "likelihood.json")
    assert record["status"] == "ok" and not record["reasons"]
    assert all(record[name] is not None for name in ("nelbo", "nll", "chain", "discrete"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    assert read_json(results / "provenance.json")["source"]["sha256"] == file_hash(weights)
    assert "ancestral,4,4" in (results / "robustness.csv").read_text()


def edit(path: Path, **changes) -> None:
    write_json(path, read_json(path) | changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: edit(f / "unet/config.json", _class_name="UNet2DConditionModel"), "accepted: UNet2DModel"),
        (lambda f: edit(f / "unet/config.json", num_class_embeds=10), "num_class_embeds = 10: accepted: null"),
        (lambda f: edit(f / "unet/config.json", time_embedding_type="fourier"), "accepted: positional"),
        (lambda f: edit(f / "unet/config.json", out_channels=2), "out_channels = 2: accepted: 1"),
        (lambda f: edit(f / "unet/config.json", sample_size=None), "sample_size = None"),
        (lambda f: edit(f / "unet/config.json", block_out_channels=[8, 24]), "cannot be loaded"),
        (lambda f: (f / "unet/config.json").write_text("{"), "not valid JSON"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", beta_schedule="squaredcos_cap_v2"), "accepted: linear"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="v_prediction"), "accepted: epsilon"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", beta_end=1.5), "beta_start, beta_end"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", num_train_timesteps=0), "num_train_timesteps = 0"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "no scheduler"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "no weights here"),
    ],
)
def test_other_diffusers_folders_are_refused_in_one_line(change, said, tmp_path):
    diffusers_folder(tmp_path)
    change(tmp_path)
    assert said in refused(load_pretrained, tmp_path)


def test_incomplete_weights_of_diffusers_are_refused(tmp_path):
    diffusers_folder(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["conv_in.bias"]
    save_file(state, path, metadata={"format": "pt"})
    assert "conv_in.bias: missing" in refused(load_pretrained, tmp_path)
    save_file(state | {"conv_in.bias": torch.zeros(8), "more": torch.zeros(1)}, path, metadata={"format": "pt"})
    assert "more: unexpected" in refused(load_pretrained, tmp_path)


def test_pickled_weights_of_diffusers_execute_nothing(tmp_path):
    diffusers_folder(tmp_path, safe=False)
    trap = tmp_path / "sprung"
    torch.save({"conv_in.bias": Trap(trap)}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    assert "it asks for" in refused(load_pretrained, tmp_path) and not trap.exists()


@pytest.mark.parametrize(("flow", "said"), [({}, "ema"), ({"flow": "0" * 64}, "ema score, raw flow")])
def test_averaged_score_with_raw_flow_is_not_called_averaged(flow, said):
    """The tables refuse to compare what is measured with different weights, if the record says so."""
    loaded = SimpleNamespace(description={"weights": "ema"}, source={"sha256": "1" * 64} | flow)
    assert importing._weights(loaded) == said
    assert "_weights(loaded)" in inspect.getsource(importing._measure)
