"""Training on two processes of one machine's CPU, joined by gloo, against training on one.

Batches, times and noise are functions of the global index, so the curves and the weights differ by the rounding of the
gradients' average alone.
"""

import json
import os
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from two_processes import (
    ASKED,
    COMMAND,
    EVERY,
    HERE,
    OWN,
    SHARED,
    STOP,
    STOPPED,
    TORCHRUN,
    VARIANTS,
    launch,
    results,
    tiny_run,
    use,
)

from bench.checkpoint import exclusive, published
from bench.config import load_suite
from bench.train import Trainer, train

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder with what two processes leave: every variant's run in whole/, a broken one in stopped/."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder, *TORCHRUN, str(HERE / "processes_script.py"), str(folder))
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Folder with the same runs' results from one process."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        use(patch, folder)
        for variant in VARIANTS:
            train(tiny_run(variant), progress=False)
    return folder


def curve(folder: Path, variant: str) -> pd.DataFrame:
    """The learning curve without the columns that are wall-clock times or empty."""
    rows = pd.read_csv(results(folder, variant) / "learning_curve.csv")
    return rows.drop(columns="seconds").dropna(axis=1, how="all")


def assert_same_weights(first: Path, second: Path, variant: str) -> None:
    """Averaged weights and those of the last step agree, tensor by tensor."""
    for name in ("model.safetensors", "raw.safetensors"):
        left, right = (load_file(results(folder, variant) / "weights" / name) for folder in (first, second))
        assert left.keys() == right.keys()
        for key, value in left.items():
            torch.testing.assert_close(value, right[key], rtol=TOLERANCE, atol=TOLERANCE, msg=f"{name}: {key}")


def assert_same_curve(first: Path, second: Path, variant: str) -> None:
    """The learning curves agree, row by row: losses, bounds, likelihoods."""
    left, right = (curve(folder, variant) for folder in (first, second))
    assert {"nelbo_nats", "nelbo_bpd"} & set(left) and len(left) >= 3
    pd.testing.assert_frame_equal(left, right, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_end_with_the_weights_of_one(one, two, variant):
    assert_same_weights(one, two / "whole", variant)
    record = json.loads((results(two / "whole", variant) / "provenance.json").read_text())
    assert record["images_seen"] == 24 * 32


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_give_the_learning_curve_of_one(one, two, variant):
    """The loss as well: it is that of the whole batch, not of the first process's rows."""
    assert_same_curve(one, two / "whole", variant)


def test_a_run_stopped_on_two_processes_ends_the_same_on_one(one, two, monkeypatch):
    """It stops in the middle of a bridge's half, with paths in use that the two processes simulated between them."""
    use(monkeypatch, two / "stopped")
    run = tiny_run(STOPPED)
    checkpoints = two / "stopped" / "checkpoints" / run.training_hash
    assert int(published(checkpoints)[-1].name) == STOP // EVERY * EVERY
    assert not results(two / "stopped", STOPPED).exists()
    continued = Trainer(run, progress=False)
    assert continued.resume() and continued.step == STOP // EVERY * EVERY
    train(run, progress=False)
    assert_same_weights(one, two / "stopped", STOPPED)
    assert_same_curve(one, two / "stopped", STOPPED)


# torchrun ends with 1 whatever its processes' code; it says theirs
LOADED_ON_ONE = """
import os, sys
import bench.train
from bench import cli
from bench.errors import InputError
load = bench.train.load
def load_or_refuse(name):
    if os.environ["RANK"] == sys.argv[1]:
        raise InputError(f"{name}: not on this node; accepted: a data set that is there")
    return load(name)
bench.train.load = load_or_refuse
sys.exit(cli.execute(sys.argv[2:]))
"""


def test_bad_input_in_one_process_ends_both_with_one_line(tmp_path):
    (tmp_path / "script.py").write_text(LOADED_ON_ONE)
    settings = [part for setting in SHARED for part in ("--set", setting)]
    chosen = ["train", "toy2d", COMMAND, "--dataset", "checkerboard", *settings]
    said = launch(tmp_path, *TORCHRUN, str(tmp_path / "script.py"), "1", *chosen, expected=1)
    lines = [line for line in said.splitlines() if line.startswith("indm-bench: ")]
    assert len(lines) == len(set(lines)) == len(load_suite("toy2d").runs(COMMAND, None, "checkerboard"))
    assert all("checkerboard: not on this node; accepted: a data set that is there" in line for line in lines)
    assert "exitcode  : 2" in said and 'train.py", line' not in said  # of the traceback of torchrun alone


def test_a_run_that_is_taken_ends_both(tmp_path, monkeypatch):
    use(monkeypatch, tmp_path)
    settings = [part for setting in [*SHARED, *OWN[COMMAND]] for part in ("--set", setting)]
    chosen = ["train", "toy2d", COMMAND, "--seed", "0", "--dataset", "checkerboard", *settings]
    with exclusive(tmp_path / "checkpoints" / tiny_run(COMMAND).training_hash):  # found by the first process alone
        said = launch(tmp_path, *TORCHRUN, "-m", "bench.cli", *chosen, expected=1)
    (line,) = [line for line in said.splitlines() if line.startswith("indm-bench: ")]
    assert "another process is training this run" in line and "exitcode  : 2" in said


def test_one_process_that_is_asked_to_stop_stops_both_at_that_step(two):
    checkpoints = two / "asked" / "checkpoints" / tiny_run(COMMAND).training_hash
    assert int(published(checkpoints)[-1].name) == ASKED + 1


# two nodes on one machine: what Slurm's commands do, as far as the script uses them
SCONTROL = "#!/bin/sh\nprintf 'localhost\\nlocalhost\\n'\n"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
trap 'kill "$first" "$second"' TERM
wait "$first" && wait "$second"
"""


def test_the_slurm_script_trains_one_run_on_two_nodes(one, tmp_path):
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_SUBMIT_DIR": str(HERE.parent),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_PER_NODE": "h100:1",
    }
    settings = [part for setting in [*SHARED, *OWN[COMMAND]] for part in ("--set", setting)]
    chosen = ["toy2d", COMMAND, "--seed", "0", "--dataset", "checkerboard"]
    launch(tmp_path, "bash", "experiments/launch/slurm.sh", *chosen, *settings, **slurm)
    assert_same_weights(one, tmp_path, COMMAND)
    assert_same_curve(one, tmp_path, COMMAND)
