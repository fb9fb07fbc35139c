"""Stages of a pipeline on several devices at once, through DVC, in a repository of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.errors import InputError
from bench.on_devices import Devices, parse_devices, read_stages, visible_devices
from bench.pipeline import pipeline_file

ROOT = Path(__file__).parents[1]
# each training waits until the other has begun, so that it ends only if two run at the same time; one of them fails
PIPELINE = """
stages:
  first:
    cmd: echo "$CUDA_VISIBLE_DEVICES" > first.txt
    outs:
    - first.txt:
        cache: false
  train:
    matrix:
      variant: [a, b, c]
    cmd: sh train.sh ${item.variant}
    deps:
    - first.txt
    outs:
    - runs/${item.variant}/weights
  evaluate:
    matrix:
      variant: [a, c]
    cmd: cp runs/${item.variant}/weights ${item.variant}.txt
    deps:
    - runs/${item.variant}/weights
    outs:
    - ${item.variant}.txt:
        cache: false
  report:
    cmd: ls runs > report.txt
    deps:
    - runs
    outs:
    - report.txt:
        cache: false
"""
TRAIN = """
test $1 = c && exit 3
mkdir -p runs/$1
touch begun-$1
for i in $(seq 300); do
  test -e begun-a && test -e begun-b && { echo "$CUDA_VISIBLE_DEVICES" > runs/$1/weights; exit 0; }
  sleep 0.1
done
exit 4
"""
# a stage that ends on request, as the harness's do, and says so
PATIENT = """
stages:
  train:
    cmd: sh patient.sh
    outs:
    - weights.txt:
        cache: false
"""
STOPS = """
test -e checkpoint && { echo done > weights.txt; exit 0; }
trap 'touch checkpoint; exit 75' INT
touch begun
for i in $(seq 300); do sleep 0.1; done
"""
DRIVER = """
from pathlib import Path
from bench.on_devices import Devices, read_stages
raise SystemExit(Devices(read_stages(Path("dvc.yaml")), ["cpu"]).run())
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty DVC repository, as the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["dvc", "init", "--quiet", "--no-scm"], check=True)
    return tmp_path


def test_independent_stages_run_at_once_and_a_failure_stops_only_what_needs_it(repository, capfd):
    (repository / "dvc.yaml").write_text(PIPELINE)
    (repository / "train.sh").write_text(TRAIN)
    stages = {stage.name: stage for stage in read_stages(Path("dvc.yaml"))}
    assert Devices(list(stages.values()), ["3", "cpu"]).run() == 1
    states = {name: stage.state for name, stage in stages.items()}
    assert states == {
        "first": "done",
        "train@a": "done",
        "train@b": "done",
        "train@c": "failed",
        "evaluate@a": "done",
        "evaluate@c": "skipped",
        "report": "skipped",
    }
    # each saw its own device alone
    seen = {(repository / "runs" / name / "weights").read_text().strip() for name in "ab"}
    assert seen == {"3", ""}
    said = capfd.readouterr().out
    assert "evaluate@c: skipped, train@c is missing" in said and "1 failed, 2 skipped" in said
    # nothing that is done is done again, and what DVC recorded of two at once is whole
    locked = (repository / "dvc.lock").read_text()
    assert all(f"  {name}:" in locked for name in ("first", "train@a", "train@b", "evaluate@a"))


def test_a_request_to_stop_reaches_the_stage_and_the_same_command_continues(repository):
    (repository / "dvc.yaml").write_text(PATIENT)
    (repository / "patient.sh").write_text(STOPS)
    command = [sys.executable, "-c", DRIVER]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    for _ in range(300):
        if (repository / "begun").exists():
            break
        time.sleep(0.1)
    driver.send_signal(signal.SIGTERM)
    said, _ = driver.communicate(timeout=30)
    assert driver.returncode == 75 and "stopped; 1 of 1 stages left" in said
    assert (repository / "checkpoint").exists() and not (repository / "weights.txt").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (repository / "weights.txt").read_text() == "done\n"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 of 1 stages were up to date" in done.stdout


def test_stages_wait_for_what_they_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = {stage.name: stage for stage in read_stages(pipeline_file("smoke"))}
    needs = {name: {need.name for need in stage.needs} for name, stage in stages.items()}
    assert needs["features-smoke"] == needs["references-smoke"] == set()
    # its learning curve has no samples: the classifier is for those who evaluate
    assert "train-smoke@ddpmpp-vp" in needs["evaluate-smoke@ddpmpp-vp"]
    assert "features-smoke" in needs["evaluate-smoke@ddpmpp-vp"]
    assert not any(name.startswith("train") for name in needs["train-smoke@ddpmpp-vp"])
    assert needs["report-smoke"] == set(stages) - {"report-smoke"}
    assert stages["report-smoke"].address == "experiments/pipelines/smoke/dvc.yaml:report-smoke"


def test_devices_are_named_or_found(monkeypatch):
    assert parse_devices("0, 1,cpu") == ["0", "1", "cpu"]
    assert parse_devices("GPU-8a5f1f2e,MIG-1/2") == ["GPU-8a5f1f2e", "MIG-1/2"]
    for wrong in ("", "0,", "two", "-1", "0 1"):
        with pytest.raises(InputError, match="--gpus .*: accepted: "):
            parse_devices(wrong)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert visible_devices() == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == ["cpu"]
