"""A full disk during each kind of write, a limit on the size of files, read-only results, and a clock that jumps."""

import os
import random

import pytest
from fault_bench import STATES

WRITES = {"open", "save", "fsync", "replace", "mkdir"}
SHARE = 20  # points of kills for one full disk in each stage


def pytest_generate_tests(metafunc):
    if "point" in metafunc.fixturenames:
        count = max(2, metafunc.config.getoption("--faults") // SHARE)
        metafunc.parametrize("point", range(count))


def refused(made, stage, fault, finished):
    """A stage with a fault that it must end at, in one clear line, with nothing lost."""
    outcome = made.stage(stage, fault=fault)
    assert outcome.code == 1 and outcome.clear, outcome.said
    held = made.raw("runs")
    lost = [name for name in finished if name not in held]
    changed = [name for name in finished if name in held and held[name] != finished[name]]
    assert not lost and not changed
    return outcome, len(lost), len(changed)


def recovered(made, stage, after, finished):
    """The same command without the fault."""
    done = made.stage(stage)
    assert done.code == 0, done.said
    assert made.results() == after.results()
    assert {name: held for name, held in made.raw("runs").items() if name in finished} == finished
    assert made.leftovers() == []


@pytest.mark.parametrize("stage", STATES)
def test_full_disk(whole, tmp_path, ledger, stage, point):
    states, events = whole
    before, after = (states[name] for name in STATES[stage])
    names = events[stage, "flow" if stage != "report" else ""]
    at = random.Random(point).choice([k for k, name in enumerate(names, 1) if name in WRITES])
    made = before.copy(tmp_path / "here")
    finished = made.raw("runs")
    outcome, *harm = refused(made, stage, {"kind": "full", "at": at}, finished)
    assert "No space left on device" in outcome.said and str(made.folder) in outcome.said
    ledger(f"disk full at a write of {stage}", 1, *harm)
    recovered(made, stage, after, finished)


@pytest.mark.parametrize(("stage", "size"), [("train", 3000), ("evaluate", 1500), ("report", 20000)])
def test_limit_on_the_size_of_files(whole, tmp_path, ledger, stage, size):
    """The system itself refuses: native code that writes is met by it too."""
    states, _ = whole
    before, after = (states[name] for name in STATES[stage])
    made = before.copy(tmp_path / "here")
    finished = made.raw("runs")
    outcome, *harm = refused(made, stage, {"kind": "size", "at": size}, finished)
    assert "File too large" in outcome.said or "too large" in outcome.said
    ledger(f"file-size limit in {stage}", 1, *harm)
    recovered(made, stage, after, finished)


@pytest.mark.parametrize("stage", STATES)
def test_read_only_results(whole, tmp_path, ledger, stage):
    states, _ = whole
    before, after = (states[name] for name in STATES[stage])
    made = before.copy(tmp_path / "here")
    finished = made.raw("runs", "reports")
    outcome, *harm = refused(made, stage, {"kind": "read-only"}, finished)
    assert "Read-only file system" in outcome.said
    ledger(f"read-only results in {stage}", 1, *harm)
    recovered(made, stage, after, made.raw("runs"))
    if stage != "report":  # what is finished needs no writing
        assert made.stage(stage, fault={"kind": "read-only"}).code == 0


def test_a_clock_that_jumps(whole, tmp_path, ledger):
    """Wall-clock time and the files' times decide nothing."""
    states, _ = whole
    made = states["trained linear"].copy(tmp_path / "here")
    finished = made.raw("runs")
    source = random.Random(0)
    for number, (stage, after) in enumerate((("train", "trained flow"), ("evaluate", "evaluated flow"))):
        if stage == "evaluate":
            assert made.stage("evaluate", "linear", fault={"kind": "clock", "at": 7}).code == 0
        done = made.stage(stage, fault={"kind": "clock", "at": number})
        assert done.code == 0, done.said
        assert made.results() == states[after].results()
        assert {name: held for name, held in made.raw("runs").items() if name in finished} == finished
        for path in made.folder.rglob("*"):
            moved = source.uniform(0, 4e9)
            os.utime(path, (moved, moved))
        finished = made.raw("runs")
        assert made.stage(stage).code == 0 and made.raw("runs") == finished
        ledger("clock moved", 2)
