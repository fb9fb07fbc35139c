"""The command line: exit codes, one line for bad input, runs side by side that do not lose each other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from bench import cli, plan, workers
from bench.config import Suite, load_suite, read_run

ROOT = Path(__file__).parents[1]
COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
TINY = ["train.steps=4", "train.curve=1", "train.curve_images=4", "train.curve_samples=0", "train.batch_size=8"]
SETTINGS = [word for setting in TINY for word in ("--set", setting)]
POINTS = ["--seed", "0", "--dataset", "checkerboard"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Results, reports and checkpoints of the smoke suite in an empty folder."""
    monkeypatch.chdir(ROOT)
    for variable, folder in (("RUNS", "runs"), ("REPORTS", "reports"), ("CHECKPOINTS", "checkpoints")):
        monkeypatch.setenv(f"INDM_BENCH_{variable}", str(tmp_path / folder))
    return tmp_path


def indm_bench(capsys, *arguments):
    """(exit code, stdout, stderr) of one command line in this process."""
    code = cli.execute(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_every_command_explains_itself(command, capsys):
    code, out, err = indm_bench(capsys, *command, "--help")
    assert code == 0 and "Usage: indm-bench" in out and not err
    assert len(COMMANDS) == len(set(COMMANDS)) >= 12


def test_light_commands_import_no_heavy_package():
    code = "import sys, bench.cli; bench.cli.execute(['list']); sys.exit(bool({'torch', 'pandas'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == 0
    )


def test_list_names_every_suite_with_its_variants(capsys, project):
    code, out, _ = indm_bench(capsys, "list")
    assert code == 0
    for path in (ROOT / "experiments").glob("*.yaml"):
        assert f"{path.stem}: {load_suite(path.stem).title}" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing command"),
        (["trian"], "trian"),
        (["train", "smoke"], "VARIANT"),
        (["train", "smoke", "x"], "variant 'x' is not in suite smoke"),
        (["train", "smok", "ddpmpp-vp"], "unknown suite 'smok'; accepted: "),
        (["train", "smoke", "ddpmpp-vp", "--seed", "one"], "--seed"),
        (["train", "smoke", "ddpmpp-vp", "--seed", "7"], "accepted: 0, 1"),
        (["train", "smoke", "ddpmpp-vp", "--workers", "0"], "--workers 0: must be at least 1"),
        (["train", "smoke", "ddpmpp-vp", "--set", "train.steps=-1"], "--set train.steps = -1: must be greater"),
        (["evaluate", "smoke", "ddpmpp-vp", "--set", "train.stpes=1"], "train.stpes: unknown key; accepted: "),
        (["run", "smoke", "--variant", "y"], "variant 'y'"),
        (["run", "smoke", "--frobnicate"], "--frobnicate"),
        (["report"], "either a SUITE or --index"),
        (["report", "nosuch"], "unknown suite 'nosuch'"),
        (["sample", "smoke", "ddpmpp-vp"], "--dataset: missing, smoke has several; accepted: checkerboard, digits"),
        (["sample", "smoke", "ddpmpp-vp", "--dataset", "digits"], "no trained run here"),
        (["sample", "smoke", "ddpmpp-vp", "--sampler", "magic"], "accepted: euler_maruyama"),
        (["sample", "smoke", "ddpmpp-vp", "--out", "a.pkl"], "accepted: .npz, .png"),
        (["export", "smoke", "ddpmpp-vp", "--dataset", "digits", "--out", "weights"], "no trained run here"),
        (["regression", "smoke", "--against", "nosuch"], "no such folder"),
        (["plan", "nosuch"], "unknown suite"),
        (["references", "nosuch"], "unknown suite"),
        (["features", "nosuch"], "unknown suite"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, capsys, project):
    code, out, err = indm_bench(capsys, *arguments)
    assert code == 2 and not out
    assert err.startswith("indm-bench: ") and err.count("\n") == 1 and said in err
    assert not list(project.rglob("*"))


def test_bad_input_leaves_the_process_with_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "bench.cli", "train", "nosuch", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_train_sample_export(capsys, project):
    arguments = ["smoke", "indm-vp-nll", *POINTS]
    assert indm_bench(capsys, "train", *arguments, *SETTINGS)[0] == 0
    folder = project / "runs" / "smoke" / "indm-vp-nll" / "0" / "checkerboard"
    run = read_run(folder)
    assert run.train.steps == 4 and run.folder == folder

    parts = []
    for name, first, count in (("whole", 0, 5), ("head", 0, 3), ("tail", 3, 2)):
        out = project / f"{name}.npz"
        options = ["--steps", "3", "--first", str(first), "--count", str(count), "--out", str(out)]
        code, said, _ = indm_bench(capsys, "sample", *arguments, *options)
        assert code == 0 and f"{count} samples, 3 network evaluations each" in said
        parts.append(np.load(out)["samples"])
    whole, head, tail = parts
    assert whole.shape == (5, 2) and np.isfinite(whole).all()
    np.testing.assert_allclose(whole, np.concatenate([head, tail]), rtol=1e-4, atol=1e-5)

    exported = project / "exported"
    assert indm_bench(capsys, "export", *arguments, "--out", str(exported))[0] == 0
    assert {path.name for path in exported.iterdir()} == {"config.yaml", "model.safetensors", "provenance.json"}
    assert read_run(exported).hash == run.hash
    assert (exported / "model.safetensors").read_bytes() == (folder / "weights" / "model.safetensors").read_bytes()
    code, _, err = indm_bench(capsys, "export", *arguments, "--out", str(exported))
    assert code == 2 and "not empty" in err


def test_plan_measures_every_cell_and_needs_nothing_prepared(capsys, project, monkeypatch):
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.0)
    suite = load_suite("digits")
    (run,) = suite.runs("indm-vp-nll", seed=0)
    monkeypatch.setattr(Suite, "runs", lambda self, variant, seed: [run] if variant == run.variant else [])
    assert run.train.curve_samples > 0 and not run.features_file.exists()
    code, out, _ = indm_bench(capsys, "plan", "digits")
    assert code == 0 and f"{run.train.steps * run.train.batch_size:,}" in out
    cost = plan.measure(run)
    assert 0 < cost.train < 1e5 and 0 < cost.evaluate < 1e5
    assert not list(project.rglob("*"))


def test_references_beat_nothing_but_are_exact(capsys, project):
    assert indm_bench(capsys, "references", "digits")[0] == 0
    found = json.loads((project / "reports" / "digits" / "references.json").read_text())
    reference = found["digits"]["gaussian_full_covariance"]
    assert reference["units"] == "bits/dim" and reference["nll"] == pytest.approx(2.962, abs=0.01)


def test_a_diverging_run_is_a_failure_not_bad_input(capsys, project):
    steps = ["--set", "train.learning_rates.score=1e30", "--set", "train.clip=null"]
    code, _, err = indm_bench(capsys, "train", "smoke", "ddpmpp-vp", *POINTS, *SETTINGS, *steps)
    assert code == 1
    assert err.rstrip().splitlines()[-1].startswith("indm-bench: train smoke/ddpmpp-vp/0/checkerboard: ")


class Dying:
    """A run whose folder kills the process that asks for it."""

    @property
    def folder(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_side_by_side_no_cell_loses_another(project):
    good = load_suite("smoke", TINY).runs("ddpmpp-vp", dataset="checkerboard")
    cells = [workers.Cell(label, run) for label, run in zip("abcd", [None, good[0], Dying(), good[1]], strict=True)]
    workers.run_beside("train", cells, 2)
    broken, first, dead, second = cells
    assert first.error is None and second.error is None
    assert all((run.folder / "weights" / "model.safetensors").is_file() for run in good)
    assert "NoneType" in broken.error and "Traceback" in broken.log
    assert dead.error == "killed by signal 9"


def test_side_by_side_or_one_after_the_other_the_weights_are_the_same(project, monkeypatch):
    runs = load_suite("smoke", TINY).runs("indm-vp-nll", dataset="checkerboard")

    def weights(folder, workers_at_once):
        monkeypatch.setenv("INDM_BENCH_RUNS", str(project / folder))
        monkeypatch.setenv("INDM_BENCH_CHECKPOINTS", str(project / folder / "checkpoints"))
        cells = [workers.Cell(str(run.seed), run) for run in runs]
        if workers_at_once > 1:
            workers.run_beside("train", cells, workers_at_once)
        else:
            workers.run_here("train", cells)
        assert not any(cell.error for cell in cells)
        return [(run.folder / "weights" / "model.safetensors").read_bytes() for run in runs]

    assert weights("beside", 2) == weights("here", 1)


def test_workers_die_with_their_parent(project):
    command = [sys.executable, "-m", "bench.cli", "train", "smoke", "ddpmpp-vp", "--dataset", "checkerboard"]
    command += ["--workers", "2", "--set", "train.steps=1000000"]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def descendants():
        return psutil.Process(parent.pid).children(recursive=True)

    def until(condition, seconds):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not condition():
            time.sleep(0.2)
        return condition()

    try:
        # resource tracker, fork server and two workers that have written their first checkpoint
        assert until(lambda: len(descendants()) >= 4 and list(project.glob("checkpoints/*/*")), 60)
        family = descendants()
        parent.kill()
        assert until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 20)
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.parametrize(
    ("cells", "cores", "expected"), [(1, 2, 1), (3, 2, 3), (4, 2, 2), (5, 2, 3), (15, 2, 3), (3, 8, 3)]
)
def test_default_workers_leave_no_core_idle(cells, cores, expected):
    assert workers.default_workers(cells, cores) == expected
