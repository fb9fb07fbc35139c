"""kill -9 at seeded points of training, evaluation, checkpoint and report writing; then the same command again."""

import random
import signal
import time

from fault_bench import STATES

from bench.checkpoint import published

# (stage, how the point is chosen): the pattern that a longer battery repeats
PATTERN = (
    ("train", "checkpoints"),
    ("evaluate", "writes"),
    ("train", "time"),
    ("train", "results"),
    ("evaluate", "time"),
    ("train", "checkpoints"),
    ("evaluate", "writes"),
    ("report", "writes"),
    ("train", "checkpoints"),
    ("train", "results"),
)
KINDS = {
    ("train", "checkpoints"): "kill -9 while a checkpoint is written",
    ("train", "results"): "kill -9 while weights and results of a training are written",
    ("train", "time"): "kill -9 in training, at a random time",
    ("evaluate", "writes"): "kill -9 while an evaluation writes",
    ("evaluate", "time"): "kill -9 in an evaluation, at a random time",
    ("report", "writes"): "kill -9 while a report is written",
}


def pytest_generate_tests(metafunc):
    if "point" in metafunc.fixturenames:
        metafunc.parametrize("point", range(metafunc.config.getoption("--faults")))


def places(events, how):
    """Numbers of the calls at which to kill, those of ``how``."""
    saves = [number for number, name in enumerate(events, 1) if name == "save"]
    # the last two are the weights among the results
    border = saves[-3] + 8 if saves else 0
    return {
        "checkpoints": range(saves[0], border) if saves else (),
        "results": range(border, len(events) + 1),
        "writes": range(1, len(events) + 1),
    }[how]


def test_the_same_command_ends_as_if_nothing_had_been(whole, tmp_path, ledger, point):
    states, events = whole
    stage, how = PATTERN[point % len(PATTERN)]
    before, after = (states[name] for name in STATES[stage])
    source = random.Random(point)
    made = before.copy(tmp_path / "here")
    finished = made.raw("runs")
    kills = 0
    # every third is killed again on its way back
    for _ in range(2 if point % 3 == 2 else 1):
        if how == "time":
            command = made.start(stage, "faults", "flow", "--seed", "0", "--workers", "1")
            time.sleep(source.uniform(0.0, 0.5))
            command.send(signal.SIGKILL)
            code = command.end().code
            assert code in (-signal.SIGKILL, 0)
        else:
            at = source.choice(places(events[stage, "flow" if stage != "report" else ""], how))
            outcome = made.stage(stage, fault={"kind": "kill", "at": at, "after": source.random() < 0.5})
            code = outcome.code
            # the way back may be shorter than to the point
            assert code == -signal.SIGKILL or (kills and code == 0), outcome.said
        kills += code == -signal.SIGKILL
    held = made.raw("runs")
    lost = [name for name in finished if name not in held]
    changed = [name for name in finished if name in held and held[name] != finished[name]]
    ledger(KINDS[stage, how], kills, len(lost), len(changed))
    assert not lost and not changed
    done = made.stage(stage)
    assert done.code == 0, done.said
    assert made.results() == after.results()
    assert {name: held for name, held in made.raw("runs").items() if name in finished} == finished
    assert made.leftovers() == []
    for folder in (made.folder / "checkpoints").glob("*"):
        assert len(published(folder)) <= 3  # two, and one that the kill kept from being removed


def test_a_killed_training_loses_no_more_than_the_steps_since_its_checkpoint(whole, tmp_path, ledger):
    """The way back begins at the last checkpoint, not at the start."""
    states, events = whole
    made = states["trained linear"].copy(tmp_path / "here")
    at = places(events["train", "flow"], "results")[0]
    assert made.stage("train", fault={"kind": "kill", "at": at}).code == -signal.SIGKILL
    ledger("kill -9 while weights and results of a training are written")
    done = made.stage("train")
    assert done.code == 0 and "save" in done.events
    # no checkpoint is written again: only the two files of weights
    assert done.events.count("save") == 2
