"""Ending on request: exit code 75, everything finished kept, and the same command ends as an unbroken run does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench import commands, stopping, workers
from bench.checkpoint import published
from bench.config import load_suite
from bench.train import Trainer, train

ROOT = Path(__file__).parents[1]
PATIENCE = 240  # seconds, of a machine that is busy with other things
SETTINGS = [
    "train.steps=400",
    "train.batch_size=32",
    "train.curve=1",
    "train.curve_images=4",
    "train.curve_samples=0",
    "train.checkpoint_every=120",
    "model.score.width=16",
    "model.score.depth=1",
]
STARTED: list[subprocess.Popen] = []
POINTS = ["--dataset", "checkerboard", *(word for setting in SETTINGS for word in ("--set", setting))]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Results and checkpoints in an empty folder; no request left behind."""
    monkeypatch.chdir(ROOT)
    use(monkeypatch, tmp_path / "stopped")
    yield tmp_path
    stopping.restore()
    while STARTED:
        STARTED[-1].kill()
        STARTED.pop().wait()


def use(monkeypatch, folder):
    for variable in ("RUNS", "REPORTS", "CHECKPOINTS"):
        monkeypatch.setenv(f"INDM_BENCH_{variable}", str(folder / variable.lower()))


def small_runs(extra=()):
    """The two seeds of ddpmpp-vp on the checkerboard, 400 steps."""
    return load_suite("smoke", [*SETTINGS, *extra]).runs("ddpmpp-vp", None, "checkerboard")


def start(*words):
    command = [sys.executable, "-m", "bench.cli", "train", "smoke", "ddpmpp-vp", *POINTS, *words]
    STARTED.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    return STARTED[-1]


def until(condition, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.02)
    return condition()


def weights(run):
    return (run.folder / "weights" / "model.safetensors").read_bytes()


def test_a_stopped_command_leaves_with_75_and_the_same_command_continues(project, monkeypatch):
    run = small_runs()[0]
    process = start("--seed", "0")
    folder = project / "stopped" / "checkpoints" / run.training_hash
    assert until(lambda: published(folder) or process.poll() is not None)
    process.terminate()
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 75, said
    assert said.rstrip().splitlines()[-1] == (
        "indm-bench: stopped (SIGTERM: train: 1 of 1 runs not done); the same command continues"
    )
    assert "Traceback" not in said and not run.folder.exists()
    reached = int(published(folder)[-1].name)
    assert 0 < reached < run.train.steps

    process = start("--seed", "0")
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, said
    continued = weights(run)
    use(monkeypatch, project / "whole")
    train(run, progress=False)
    assert weights(run) == continued


def test_workers_write_their_checkpoints_and_no_further_cell_begins(project):
    runs = small_runs(["train.steps=1000000"])
    process = start("--set", "train.steps=1000000", "--workers", "2")
    folders = [project / "stopped" / "checkpoints" / run.training_hash for run in runs]
    assert until(lambda: all(map(published, folders)) or process.poll() is not None)
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 75 and "SIGTERM: train: 2 of 2 runs not done" in said
    assert "Traceback" not in said
    # a checkpoint of its own, not one of every 120 steps
    assert all(int(published(folder)[-1].name) % 120 for folder in folders)
    assert until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))


def test_a_second_signal_ends_at_once(project):
    script = (
        "import time; from bench import stopping; stopping.install(); print('ready', flush=True)\n"
        "while not stopping.requested(): time.sleep(0.01)\n"
        "print(stopping.requested(), flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    process.terminate()  # an echo of the first
    assert process.stdout.readline() == "SIGTERM\n"
    time.sleep(stopping.ECHO_SECONDS + 0.1)
    process.send_signal(signal.SIGUSR1)  # a warning only
    time.sleep(0.1)
    assert process.poll() is None
    process.terminate()
    assert process.wait(5) == -signal.SIGTERM


def test_the_deadline_stops_after_a_step_and_is_told(project, capsys):
    run = small_runs(["train.steps=60", "train.checkpoint_every=50"])[0]
    stopping.set_deadline(0.0)
    assert stopping.remaining() < 0 and stopping.requested() == "time is up"
    trainer = Trainer(run, progress=False)
    with pytest.raises(stopping.Stopped, match="time is up"):
        trainer.train()
    assert trainer.step == 1 and int(published(trainer.folder)[-1].name) == 1
    with pytest.raises(stopping.Stopped, match="time is up: train: 1 of 1 runs not done"):
        commands.work("train", load_suite("smoke"), [run], 1)
    stopping.restore()
    assert stopping.requested() is None and stopping.remaining() is None
    train(run, progress=False)
    assert (run.folder / "provenance.json").exists()


def test_a_request_at_the_last_step_does_not_undo_it(project):
    run = small_runs(["train.steps=3"])[0]
    trainer = Trainer(run, progress=False)
    whole_step = trainer.train_step

    def last():
        if trainer.step == 2:
            stopping.request("SIGTERM")
        return whole_step()

    trainer.train_step = last
    trainer.train()
    assert trainer.step == 3


def test_an_evaluation_that_is_cut_leaves_no_result(project):
    run = small_runs(["train.steps=3"])[0]
    train(run, progress=False)
    stopping.request("SIGTERM")
    cells = [workers.Cell("one", run)]
    from bench.evaluate import evaluate

    with pytest.raises(stopping.Stopped):
        evaluate(run)
    assert not (run.folder / "likelihood.json").exists()
    workers.run_here("evaluate", cells)
    assert cells[0].stopped and cells[0].error is None


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with stopping.stoppable():
        assert [signal.getsignal(number) for number in stopping.SIGNALS] != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert until(stopping.requested, 5) == "SIGTERM"
        with pytest.raises(stopping.Stopped, match="SIGTERM"):
            stopping.check()
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before and stopping.requested() is None
