"""Truncated and bit-flipped files: what is read is refused by name and made again, what stands beside it stays."""

import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from fault_bench import ROOT, bit_flipped, truncated
from PIL import Image

from bench import seals
from bench.checkpoint import load_checkpoint, published, save_checkpoint
from bench.data import load
from bench.errors import InputError
from bench.report.load import load_runs

RUN = "runs/faults/flow/0"
TRAINED = [
    "config.yaml",
    "learning_curve.csv",
    "provenance.json",
    "weights/model.safetensors",
    "weights/raw.safetensors",
]
EVALUATED = ["likelihood.json", "per_image.npz", "robustness.csv", "samples.png", "trajectory.png", "latents.csv"]
WAYS = {"truncated": truncated, "bit flipped": bit_flipped}


def harmed(path, way, seed):
    """Damage a file; its length and content decide where."""
    before = path.read_bytes()
    WAYS[way](path, random.Random(f"{path.name} {seed}").random())
    if path.read_bytes() == before:
        truncated(path, 0.0)


@pytest.mark.parametrize("number", range(13))
def test_a_damaged_result_is_named_and_made_again(whole, tmp_path, ledger, number, request):
    states, _ = whole
    name = [*TRAINED, seals.TRAIN, *EVALUATED, seals.EVALUATE][number]
    stage = "train" if name in (*TRAINED, seals.TRAIN) else "evaluate"
    for seed in range(max(1, request.config.getoption("--faults") // 100)):
        way = list(WAYS)[(number + seed) % 2]
        made = states["evaluated flow"].copy(tmp_path / f"here-{seed}")
        others = {path: held for path, held in made.raw("runs").items() if not path.startswith(RUN)}
        harmed(made.folder / RUN / name, way, seed)
        if not name.startswith("weights"):  # the report reads none
            (run,) = [run for run in load_runs("faults", made.folder / "runs") if run.variant == "flow"]
            assert run.problems and all(
                "differs" in why or "read" in why or "hash" in why or "JSON" in why for why in run.problems.values()
            ), run.problems
        done = made.stage(stage)
        assert done.code == 0, done.said
        assert name.rpartition("/")[2] in done.said
        # an evaluation of the same weights is not lost to a damaged training
        assert made.results() == states["evaluated flow"].results()
        assert {path: held for path, held in made.raw("runs").items() if path in others} == others
        ledger(f"results file {way}")


@pytest.mark.parametrize("number", range(4))
def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, ledger, number):
    states, events = whole
    made = states["trained linear"].copy(tmp_path / "here")
    at = [k for k, name in enumerate(events["train", "flow"], 1) if name == "save"][4]
    made.stage("train", fault={"kind": "kill", "at": at})
    others = {path.name for path in states["trained linear"].folder.glob("checkpoints/*")}
    (folder,) = [path for path in made.folder.glob("checkpoints/*") if path.name not in others]
    newest = published(folder)[-1]
    way, name = list(WAYS)[number % 2], ("state.safetensors", "meta.json")[number // 2]
    harmed(newest / name, way, number)
    _, meta = load_checkpoint(folder)
    assert meta["step"] == int(newest.name) - 4
    done = made.stage("train")
    assert done.code == 0 and name in done.said and newest.name in done.said
    assert made.results() == states["trained flow"].results()
    ledger(f"checkpoint {way}")


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_weights_file_is_not_evaluated(whole, tmp_path, ledger, way):
    states, _ = whole
    made = states["evaluated linear"].copy(tmp_path / "here")
    harmed(made.folder / RUN / "weights" / "model.safetensors", way, 0)
    done = made.stage("evaluate")
    assert done.code == 2 and "model.safetensors differs from its hash" in done.said and done.clear, done.said
    assert made.stage("train").code == 0 and made.stage("evaluate").code == 0
    assert made.results() == states["evaluated flow"].results()
    ledger(f"weights file {way}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["png", "npz"])
def test_a_damaged_data_file_is_refused_by_name(tmp_path, ledger, kind, way):
    source = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        folder = tmp_path / "images" / split
        folder.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(source.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    name = f"folder:{tmp_path / 'images'}"
    load(name)
    path = tmp_path / "images" / "train" / "3.png"
    if kind == "npz":
        pixels = source.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
        shutil.rmtree(tmp_path / "images" / "train")
        (tmp_path / "images" / "train").mkdir()
        path = tmp_path / "images" / "train" / "all.npz"
        np.savez(path, images=pixels)
    (truncated if way == "truncated" else bit_flipped)(path, 0.55)
    with pytest.raises(InputError) as caught:
        load(name)
    assert "\n" not in str(caught.value) and (path.name in str(caught.value) or kind == "npz")
    ledger(f"data file {way}")


def test_a_report_whose_tables_are_not_its_own_is_refused(whole, tmp_path, ledger):
    states, _ = whole
    made = states["reported"].copy(tmp_path / "here")
    against = tmp_path / "committed"
    shutil.copytree(made.folder / "reports" / "faults", against)
    fine = made.run("regression", "faults", "--against", str(against))
    assert fine.code == 0, fine.said
    for way, name in (("bit flipped", "bounds.csv"), ("truncated", "summary.json")):
        kept = (against / name).read_bytes()
        harmed(against / name, way, 0)
        outcome = made.run("regression", "faults", "--against", str(against))
        assert outcome.code == 2 and outcome.clear and name in outcome.said, outcome.said
        (against / name).write_bytes(kept)
        ledger(f"results file {way}")
    harmed(made.folder / "reports" / "faults" / "costs.csv", "bit flipped", 0)
    outcome = made.run("report", "--index")
    assert outcome.code == 2 and outcome.clear and "costs.csv" in outcome.said
    assert made.stage("report").code == 0 and made.results() == states["reported"].results()
    ledger("results file bit flipped")


def test_results_from_before_there_were_seals(whole, tmp_path):
    states, _ = whole
    made = states["evaluated flow"].copy(tmp_path / "here")
    expected = made.raw("runs")
    for path in made.folder.glob("runs/**/hashes-*.json"):
        path.unlink()
    for command in (
        ("train", "faults", "flow", "--seed", "0"),
        ("evaluate", "faults", "flow", "--seed", "0"),
        ("report", "faults"),
    ):
        outcome = made.run(*command)
        assert outcome.code == 2 and outcome.clear and "python -m bench.seals" in outcome.said, outcome.said

    def seal():
        command = [sys.executable, "-m", "bench.seals", str(made.folder / "runs")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    weights = made.folder / RUN / "weights" / "model.safetensors"
    kept = weights.read_bytes()
    bit_flipped(weights, 0.5)
    done = seal()
    assert done.returncode == 2 and "flow" in done.stderr and "Traceback" not in done.stderr
    weights.write_bytes(kept)
    assert seal().returncode == 0 and made.raw("runs") == expected
    assert "0 seals written for 2 runs" in seal().stdout
    assert made.stage("train").code == 0 and made.stage("evaluate").code == 0 and made.raw("runs") == expected


def test_checkpoints_that_could_not_be_used_do_not_displace_good_ones(tmp_path):
    """A run that begins again, under other code say, keeps its own two: older steps than the useless ones before it."""
    for step in (50, 60, 10, 20, 30):
        save_checkpoint(tmp_path, step, {"x": torch.full((2,), float(step))}, {"code": "a"})
        tensors, meta = load_checkpoint(tmp_path)
        assert meta == {"step": step, "code": "a"} and tensors["x"].tolist() == [step, step]
    assert [int(path.name) for path in published(tmp_path)] == [20, 30]
