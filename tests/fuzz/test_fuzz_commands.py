"""Command lines: every command with every option, hostile values included, up to where computing would begin."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import pytest
import typer
from hypothesis import example, given
from hypothesis import strategies as st

import bench.baselines
import bench.commands
import bench.estimators.command
import bench.features
import bench.importing.measure
import bench.importing.pretrained
import bench.on_devices
import bench.performance.command
import bench.pipeline
import bench.plan
import bench.truth.battery
from bench import cli
from bench.config import load_suite

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(cli.app).commands
# beside these, typer.Exit: 1 of a regression that found differences, or of a run that failed
CODES = (0, 1, 2)
WORDS = [
    "smoke",
    "toy2d",
    "digits",
    "indm-vp-nll",
    "ddpmpp-vp",
    "checkerboard",
    "nowhere",
    "-",
    "--",
    "--no-such",
    "=",
    "-h",
]
TEXT = st.sampled_from(WORDS) | harness.TEXTS.filter(lambda text: "\0" not in text)  # no shell can give a zero byte
NUMBER = st.sampled_from(["0", "1", "2", "-1", "10" * 30, "1.5", "nan", "inf", "1e3", "", "0x1"])
PATHS = st.sampled_from(
    [
        "out",
        "/",
        "/dev/null",
        "/proc/self/mem",
        "missing/file",
        "a.npz",
        "a.png",
        "x" * 300,
        "bad.pth",
        "folder",
        "../up",
    ]
    + [os.fsdecode(b"\xff\xfe"), "new\nline"]
)
SETTING = st.sampled_from(
    [
        "train.steps=1",
        "train.steps=x",
        "train.steps",
        "model.name=indm",
        "model=[",
        "model.flow.blocks=1",
        "..=1",
        "a.b=1",
    ]
    + [
        "evaluate.samples=.nan",
        "train.learning_rates.score=-1",
        "evaluate.samplers=[{name: ddim}]",
        "=",
        "model.sde=!!x 1",
    ]
)


def value(parameter: Any) -> st.SearchStrategy[str]:
    if parameter.name in ("out", "file", "flow", "pretrained", "against"):
        return PATHS | TEXT
    if parameter.name == "settings":
        return SETTING | TEXT
    return TEXT | NUMBER


@st.composite
def line(draw: st.DrawFn) -> list[str]:
    name = draw(st.sampled_from(sorted(COMMANDS)))
    words = [name]
    for parameter in COMMANDS[name].params:
        if parameter.opts[0].startswith("-"):
            needed = parameter.required and draw(st.integers(0, 4))
            for _ in range(1 if needed else draw(st.sampled_from([0, 0, 0, 0, 1, 1, 2]))):
                flag = draw(st.sampled_from(parameter.opts))
                words += [flag] if getattr(parameter, "is_flag", False) else [flag, draw(value(parameter))]
        elif draw(st.integers(0, 5)):
            likely = {"suite": ["smoke", "toy2d"], "variant": ["indm-vp-nll", "ddpmpp-vp"]}.get(parameter.name)
            usual = st.sampled_from(likely) if likely else value(parameter)
            words.append(draw(usual if draw(st.integers(0, 3)) else value(parameter)))
    if draw(st.integers(0, 9)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(TEXT))
    return words


@pytest.fixture(autouse=True)
def stubs(tmp_path, monkeypatch):
    """Everything up to the computing is the real thing."""
    monkeypatch.chdir(tmp_path)
    for name in ("RUNS", "REPORTS", "CHECKPOINTS"):
        monkeypatch.setenv(f"INDM_BENCH_{name}", str(tmp_path / name.lower()))
    (tmp_path / "experiments").mkdir()
    for path in (ROOT / "experiments").glob("*.yaml"):  # copies: a command may write there
        shutil.copy(path, tmp_path / "experiments")
    (tmp_path / "bad.pth").write_bytes(b"PK\5\6" + bytes(18))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.yaml").write_text("kind: score_sde\n")
    monkeypatch.setattr(bench.commands, "work", lambda *_: [])
    monkeypatch.setattr(bench.commands, "ask_server", lambda stage, function, *rest: function(*rest))
    monkeypatch.setattr(bench.commands, "write_report", lambda *_: None)
    monkeypatch.setattr(bench.features, "train_classifier", lambda *_, **__: 0.9)
    monkeypatch.setattr(bench.baselines, "gaussian_nll", lambda *_: 1.0)
    monkeypatch.setattr(bench.plan, "print_plan", lambda suite, settings, *_: load_suite(suite, settings).count())
    monkeypatch.setattr(bench.truth.battery, "validate", lambda *_: 0)
    monkeypatch.setattr(bench.estimators.command, "measure_estimators", lambda *_: None)
    monkeypatch.setattr(bench.on_devices, "reproduce_on", lambda *_: 0)
    monkeypatch.setattr(bench.performance.command, "run_performance", lambda *_: False)
    monkeypatch.setattr(bench.pipeline, "write_pipelines", lambda: None)
    monkeypatch.setattr(bench.pipeline, "outdated", list)


def run(arguments: list[str]) -> None:
    """One command line; a refusal has to be one line on stderr, and raises InputError for the count."""
    out, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
        code = cli.execute(arguments)
    assert code in CODES, (code, arguments)
    lines = [text for text in told.getvalue().splitlines() if text.strip()]
    assert "Traceback" not in told.getvalue()
    if code == 2:
        assert len(lines) == 1 and lines[0].startswith("indm-bench: "), lines
        raise harness.InputError(lines[0])


@harness.cases(1.0)
@given(arguments=line())
@example(arguments=["export", "smoke", "indm-vp-nll", "--out", "x" * 300])
@example(arguments=["evaluate", "smoke", "--pretrained", "x" * 300])
@example(arguments=["regression", "smoke", "--against", "x" * 300])
@example(arguments=["import-checkpoint", "x" * 300, "--config", "vp/cifar10_ddpmpp_continuous", "--out", "out"])
@example(arguments=["import-checkpoint", "bad.pth", "--config", "vp/cifar10_ddpmpp_continuous", "--out", "/dev/null"])
@example(
    arguments=[
        "import-checkpoint",
        "bad.pth",
        "--config",
        "vp/cifar10_ddpmpp_continuous",
        "--out",
        "o",
        "--shape",
        "³,1,1",
    ]
)
@example(arguments=["train", "smoke", "indm-vp-nll", "--seed", "10" * 30])
@example(arguments=["export", "smoke", "indm-vp-nll", "--out", "bad.pth"])
@example(arguments=[])
def test_command_lines(arguments):
    harness.attempt("command lines", lambda: run(arguments))


LINES = [
    (["list"], 0),
    ([], 2),
    (["--help"], 0),
    (["nothing"], 2),
    (["train", "nowhere", "x"], 2),
    (["train", "smoke", "nothing"], 2),
    (["train", "smoke", "indm-vp-nll", "--set", "train.steps=.inf"], 2),
    (["train", "smoke", "indm-vp-nll", "--set", "model.flow.blocks=[" + "9" * 30 + "]"], 2),
    (["evaluate", "smoke", "--pretrained", "/dev/null"], 2),
    (["regression", "smoke", "--against", "x" * 300], 2),
    (["sample", "smoke", "indm-vp-nll", "--out", "x.exe"], 2),
    (["report", "smoke", "--index"], 2),
]


def test_true_processes(tmp_path):
    """The console script itself, within 2 GiB beyond what the imports map."""
    limit = 8 * 2**30  # address space: the libraries map most of it and use little
    for arguments, code in LINES:
        done = subprocess.run(
            [sys.executable, "-m", "bench.cli", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "INDM_BENCH_RUNS": str(tmp_path / "runs")},
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        assert done.returncode == code, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
        if code == 2:
            assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        harness.count("processes", harness.REFUSED if code else harness.ACCEPTED)
