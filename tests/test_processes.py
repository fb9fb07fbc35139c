"""Training on two processes of one machine's CPU, joined by gloo, against training on one.

Batches, times and noise are functions of the global index, so the curves and the weights differ by the rounding of the
gradients' average alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from bench import stopping
from bench.checkpoint import exclusive, published
from bench.config import load_suite
from bench.train import Trainer, train

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
VARIANTS = ("ddpmpp-vp", "indm-vp-nll", "sbp-fbsde")
COMMAND, STOPPED, STOP, EVERY = "ddpmpp-vp", "sbp-fbsde", 17, 5
ASKED = 7
TOLERANCE = 1e-5
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DEADLINE = 120

SHARED = [
    "train.steps=24",
    "train.batch_size=32",
    "train.warmup=3",
    "train.curve=3",
    "train.curve_images=16",
    "train.curve_samples=0",
    f"train.checkpoint_every={EVERY}",
    "model.score.width=16",
    "model.score.depth=1",
]
OWN = {
    "ddpmpp-vp": [],
    "indm-vp-nll": ["model.flow.blocks=1", "model.flow.hidden=8"],
    # all of its halves: denoising up to step 8, then Z for 4 steps and Zhat for 6, in turn; the paths renewed in each
    "sbp-fbsde": [
        "model.drift.width=16",
        "model.drift.depth=1",
        "model.steps=5",
        "model.warm_steps=8",
        "model.forward_steps=4",
        "model.stage_steps=6",
        "model.refresh=3",
    ],
}


def tiny_run(variant):
    """The variant's run of 24 steps on the checkerboard, seed 0."""
    return load_suite("toy2d", [*SHARED, *OWN[variant]]).runs(variant, 0, "checkerboard")[0]


def stop_at(trainer: Trainer, step: int) -> None:
    """Train until ``step`` is due, and stop there as an interrupt does."""
    whole_step = trainer.train_step

    def stopping():
        if trainer.step == step:
            raise KeyboardInterrupt
        return whole_step()

    trainer.train_step = stopping
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def ask_one_at(trainer: Trainer, step: int) -> None:
    """Train; the second process alone is asked to stop while ``step`` is done, and all stop with a checkpoint."""
    whole_step = trainer.train_step

    def asked():
        if trainer.step == step and trainer.accelerator.process_index == 1:
            stopping.request("SIGTERM")
        return whole_step()

    trainer.train_step = asked
    said = "SIGTERM" if trainer.accelerator.process_index == 1 else "another process"
    with pytest.raises(stopping.Stopped, match=said):
        trainer.train()
    stopping.restore()


def launch(folder: Path, *command: str, expected: int = 0, **variables: str) -> str:
    """What a command that starts processes says, its results under ``folder``; shown where its code is another."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("INDM_BENCH_")} | {
        "INDM_BENCH_RUNS": str(folder / "runs"),
        "INDM_BENCH_CHECKPOINTS": str(folder / "checkpoints"),
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, env=environment | variables, cwd=HERE.parent, stdout=log, stderr=log)
        try:
            code = process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            code = f"still running after {DEADLINE} s: does one process wait for another?"
            process.terminate()  # torchrun then ends its workers, which have sessions of their own
            process.wait()
    said = (folder / "log").read_text()
    assert code == expected, f"{code}\n{said}"
    return said


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


def use(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Send results and checkpoints to ``folder``; a GPU that is there stays out of it."""
    patch.setenv("INDM_BENCH_RUNS", str(folder / "runs"))
    patch.setenv("INDM_BENCH_CHECKPOINTS", str(folder / "checkpoints"))
    patch.setattr(torch.cuda, "is_available", lambda: False)


def results(folder: Path, variant: str) -> Path:
    """Where a run's results are below ``folder``."""
    return folder / "runs" / "toy2d" / variant / "0" / "checkerboard"


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
    assert "nelbo_nats" in left and len(left) >= 3
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
