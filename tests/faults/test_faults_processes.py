"""Several processes at once, a scheduler's SIGTERM, and numbers that are not finite."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from bench.checkpoint import load_checkpoint
from bench.report.load import finite, read_csv

STOPPED = 75  # exit code of a command that was asked to stop
ONE = ("--seed", "0", "--workers", "1")


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [("train", "trained linear", "trained flow"), ("evaluate", "evaluated linear", "evaluated flow")],
)
def test_two_at_once_on_one_cell(whole, tmp_path, ledger, stage, before, after):
    states, _ = whole
    made = states[before].copy(tmp_path / "here")
    finished = made.raw("runs")
    pair = [made.start(stage, "faults", "flow", *ONE) for _ in range(2)]
    outcomes = [command.end() for command in pair]
    # the second is refused, or comes when the first is done
    assert 0 in [outcome.code for outcome in outcomes]
    for outcome in outcomes:
        assert outcome.code == 0 or (outcome.code == 2 and "another process is" in outcome.said and outcome.clear)
    assert made.results() == states[after].results() and made.leftovers() == []
    assert {name: held for name, held in made.raw("runs").items() if name in finished} == finished
    ledger("two runs on one cell")


def descendants(process):
    """Process ids of children's children."""
    found, parents = [], {process}
    for _ in range(2):
        children = set()
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) in parents:
                children.add(int(path.parent.name))
        found, parents = sorted(children), children
    return found


def test_one_of_two_workers_is_killed(whole, tmp_path, ledger):
    states, _ = whole
    settings = ("--set", "train.steps=150", "--set", "train.curve=1")
    expected = states["nothing"].copy(tmp_path / "expected")
    assert expected.run("train", "faults", "linear", "--workers", "1", *settings).code == 0
    made = states["nothing"].copy(tmp_path / "here")
    command = made.start("train", "faults", "linear", "--workers", "2", *settings)
    deadline = time.monotonic() + 90
    while not list(made.folder.glob("checkpoints/*/0*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(descendants(command.process)[-1], signal.SIGKILL)
    outcome = command.end()
    assert outcome.code == 1 and outcome.clear and "killed by signal 9" in outcome.said, outcome.said
    finished = made.raw("runs")
    assert len(list(made.folder.glob("runs/*/*/*/provenance.json"))) == 1  # the other one's
    assert made.run("train", "faults", "linear", "--workers", "1", *settings).code == 0
    assert made.results() == expected.results()
    assert {name: held for name, held in made.raw("runs").items() if name in finished} == finished
    ledger("one worker of two killed")


@pytest.mark.parametrize("number", range(4))
def test_sigterm(whole, tmp_path, ledger, number):
    """As a scheduler sends it: a checkpoint, then the exit code for work that is left."""
    states, _ = whole
    stage = ("train", "evaluate")[number % 2]
    before, after = {
        "train": ("trained linear", "trained flow"),
        "evaluate": ("evaluated linear", "evaluated flow"),
    }[stage]
    made = states[before].copy(tmp_path / "here")
    finished = made.raw("runs")
    command = made.start(stage, "faults", "flow", *ONE, fault={"kind": "signal"})
    pattern = "checkpoints/*/0*" if stage == "train" else "checkpoints/evaluation/*/*.npz"
    known = set(made.folder.glob(pattern))
    while set(made.folder.glob(pattern)) == known and command.poll() is None:
        time.sleep(0.001)
    time.sleep(random.Random(number).uniform(0, 0.02))
    command.send(signal.SIGTERM)
    outcome = command.end()
    assert outcome.code in (STOPPED, 0) and outcome.clear, outcome.said
    if outcome.code == STOPPED:
        assert "stopped" in outcome.said and "the same command continues" in outcome.said
        # the work so far is kept
        assert set(made.folder.glob(pattern)) > known or stage == "train"
    assert {name: held for name, held in made.raw("runs").items() if name in finished} == finished
    assert made.stage(stage).code == 0
    assert made.results() == states[after].results() and made.leftovers() == []
    ledger("SIGTERM")


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("what", ["data", "loss", "gradient"])
def test_a_training_that_is_not_finite_stops_and_continues(whole, tmp_path, ledger, what, value):
    states, _ = whole
    made = states["trained linear"].copy(tmp_path / "here")
    finished = made.raw("runs")
    outcome = made.stage("train", fault={"kind": "number", "what": what, "at": 14, "value": value})
    assert outcome.code == 1 and outcome.clear and "not finite at step 15" in outcome.said, outcome.said
    failure = made.folder / "runs" / "faults" / "flow" / "0" / "failure.json"
    assert "diverged" in json.loads(failure.read_text())["status"]
    for folder in made.folder.glob("checkpoints/*"):
        if (found := load_checkpoint(folder)) is not None:
            assert all(bool(tensor.isfinite().all()) for tensor in found[0].values())
    assert {name: held for name, held in made.raw("runs").items() if name in finished} == finished
    done = made.stage("train")
    assert done.code == 0 and not failure.exists()
    assert made.results() == states["trained flow"].results()
    ledger(f"{'NaN' if value == 'nan' else 'infinity'} in the {what}")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_flow_inverse_that_is_not_finite_becomes_a_status(whole, tmp_path, ledger, value):
    """A measurement that fails is a result: it says so, and no NaN stands in a file."""
    states, _ = whole
    made = states["evaluated linear"].copy(tmp_path / "here")
    finished = made.raw("runs")
    outcome = made.stage("evaluate", fault={"kind": "number", "what": "flow inverse", "at": 0, "value": value})
    assert outcome.code == 0 and outcome.clear, outcome.said
    folder = made.folder / "runs" / "faults" / "flow" / "0"
    rows = read_csv(folder / "robustness.csv")
    assert rows and all("not finite" in row["status"] and finite(row["sliced_wasserstein"]) is None for row in rows)
    record = json.loads((folder / "likelihood.json").read_text())
    assert record["nll"]["corrected"]["total"] is not None  # needs no inverse
    assert {name: held for name, held in made.raw("runs").items() if name in finished} == finished
    ledger(f"{'NaN' if value == 'nan' else 'infinity'} in the flow's inverse")
