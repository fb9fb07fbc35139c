"""experiments/launch/nodes.sh on two nodes: two processes of this machine that meet at a fixed address."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

from bench.config import load_suite
from bench.train import train

ROOT = Path(__file__).parents[1]
DEADLINE = 120
SETTINGS = ["train.steps=6", "train.curve=1", "train.curve_images=8", "train.curve_samples=0", "train.batch_size=32"]
SETTINGS += ["model.score.width=8", "model.score.depth=1"]
RUN = ("smoke", "ddpmpp-vp", "checkerboard")
TOLERANCE = 1e-5

pytestmark = pytest.mark.slow


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def settings() -> list[str]:
    """The command line's form of SETTINGS."""
    return [word for setting in SETTINGS for word in ("--set", setting)]


def test_two_nodes_train_the_run_that_one_process_does(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folders = {}
    for name in ("one", "two"):
        folders[name] = {
            "INDM_BENCH_RUNS": str(tmp_path / name / "runs"),
            "INDM_BENCH_CHECKPOINTS": str(tmp_path / name / "checkpoints"),
        }
    # both nodes read and write the one file system
    environment = os.environ | folders["two"]
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"GPUS": "1", "PORT": str(free_port())}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    suite, variant, dataset = RUN
    chosen = [suite, variant, "--seed", "0", "--dataset", dataset, *settings()]
    with open(tmp_path / "log", "w+") as log:
        nodes = [
            subprocess.Popen(
                ["bash", "experiments/launch/nodes.sh", rank, "localhost", *chosen],
                env=environment,
                stdout=log,
                stderr=log,
            )
            for rank in ("0", "1")
        ]
        try:
            codes = [node.wait(DEADLINE) for node in nodes]
        finally:
            for node in nodes:
                node.terminate()
    assert codes == [0, 0], (tmp_path / "log").read_text()
    for name, value in folders["one"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    train(load_suite(suite, SETTINGS).runs(variant, 0, dataset)[0], progress=False)
    one, two = (tmp_path / name / "runs" / suite / variant / "0" / dataset for name in ("one", "two"))
    left, right = (load_file(folder / "weights" / "model.safetensors") for folder in (one, two))
    for key, value in left.items():
        assert value.sub(right[key]).abs().max() <= TOLERANCE
    curves = [pd.read_csv(folder / "learning_curve.csv").drop(columns="seconds") for folder in (one, two)]
    pd.testing.assert_frame_equal(*curves, rtol=TOLERANCE, atol=TOLERANCE)
