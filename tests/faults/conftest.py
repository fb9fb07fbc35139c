"""What every fault is tried on: an unbroken reference of the tiny suite, and a ledger of what became of each fault."""

import pytest
from fault_bench import VARIANTS, Bench, Server


@pytest.fixture(scope="session")
def server():
    """Forks the commands."""
    started = Server()
    yield started
    started.close()


@pytest.fixture(scope="session")
def whole(server, tmp_path_factory):
    """The suite, unbroken: its state after each stage, and how many events each stage has."""
    made = Bench(tmp_path_factory.mktemp("whole") / "start", server)
    states = {"nothing": made.copy(made.folder.with_name("nothing"))}
    events = {}
    for stage, said in (("train", "trained"), ("evaluate", "evaluated")):
        for variant in VARIANTS:
            done = made.stage(stage, variant)
            assert done.code == 0, done.said
            events[stage, variant] = done.events
            states[f"{said} {variant}"] = made.copy(made.folder.with_name(f"{said}-{variant}"))
    done = made.stage("report")
    assert done.code == 0, done.said
    events["report", ""] = done.events
    states["reported"] = made
    return states, events


@pytest.fixture
def ledger(record_property):
    """``ledger(kind, tried, survived, lost, changed)``: counted over all tests for reports/reliability."""

    def add(kind: str, tried: int = 1, lost: int = 0, changed: int = 0) -> None:
        record_property("fault", [kind, tried, lost, changed])

    return add
