"""Trainings that two processes share: their configurations, how each is stopped, and how commands are started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import stopping
from bench.config import load_suite
from bench.train import Trainer

HERE = Path(__file__).parent
IMAGES = "indm-vp-fid"  # on images, by a convolutional network with dropout
VARIANTS = ("ddpmpp-vp", "indm-vp-nll", "sbp-fbsde", IMAGES)
COMMAND, STOPPED, STOP, EVERY = "ddpmpp-vp", "sbp-fbsde", 17, 5
ASKED = 7
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
]
POINTS = ["model.score.width=16", "model.score.depth=1"]
OWN = {
    "ddpmpp-vp": POINTS,
    "indm-vp-nll": [*POINTS, "model.flow.blocks=1", "model.flow.hidden=8"],
    IMAGES: ["model.score.dropout=0.3", "model.flow.blocks=[1, 1]", "model.flow.hidden=8"],
    # all of its halves: denoising up to step 8, then Z for 4 steps and Zhat for 6, in turn; the paths renewed in each
    "sbp-fbsde": [
        *POINTS,
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
    """The variant's run of 24 steps, seed 0, on the checkerboard, or on digits."""
    suite, dataset = ("digits", "digits") if variant == IMAGES else ("toy2d", "checkerboard")
    return load_suite(suite, [*SHARED, *OWN[variant]]).runs(variant, 0, dataset)[0]


def results(folder: Path, variant: str) -> Path:
    """Where a run's results are below ``folder``."""
    place = ("digits", variant, "0") if variant == IMAGES else ("toy2d", variant, "0", "checkerboard")
    return folder.joinpath("runs", *place)


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


def use(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Send results and checkpoints to ``folder``; a GPU that is there stays out of it."""
    patch.setenv("INDM_BENCH_RUNS", str(folder / "runs"))
    patch.setenv("INDM_BENCH_CHECKPOINTS", str(folder / "checkpoints"))
    patch.setattr(torch.cuda, "is_available", lambda: False)
