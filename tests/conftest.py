"""Tests of reports make up runs and edit their files: each folder is sealed as it stands when it is read."""

import sys
from pathlib import Path

import pytest


def seal_as_it_stands(folder: Path) -> None:
    """Seals over whatever a made-up run's folder holds."""
    from bench import seals
    from bench.files import file_hash, write_hashed_json

    trained = {*seals.TRAINED_FILES, seals.MARKERS[seals.TRAIN]}
    names = {path.name for path in folder.glob("[!.]*") if path.is_file()} - {seals.TRAIN, seals.EVALUATE}
    for seal, wanted in ((seals.TRAIN, names & trained), (seals.EVALUATE, names - trained)):
        if seals.MARKERS[seal] in names:
            files = {name: file_hash(folder / name) for name in sorted(wanted)}
            write_hashed_json(folder / seal, {"schema": 1, "files": files})


@pytest.fixture(autouse=True, scope="module")
def sealed_synthetic_runs(request):
    """Applies to the modules that import synthetic_runs."""
    if all(getattr(value, "__module__", None) != "synthetic_runs" for value in vars(request.module).values()):
        yield
        return
    from bench.report import load

    read = load._read

    def sealed(suite, dataset, variant, seed, folder):
        seal_as_it_stands(folder)
        return read(suite, dataset, variant, seed, folder)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(load, "_read", sealed)
        yield


FAULTS = 30  # points at which a process is killed; CI_POINTS of tests/faults/fault_ledger.py


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("INDM-Bench")
    group.addoption("--faults", type=int, default=FAULTS, help=f"Points of tests/faults to kill at (default {FAULTS}).")
    group.addoption("--faults-file", help="JSON file for the figures of tests/faults, see reports/reliability.md.")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The figures of the fault battery, from all workers together."""
    path, reporter = (
        session.config.getoption("--faults-file"),
        session.config.pluginmanager.getplugin("terminalreporter"),
    )
    if not path or reporter is None:
        return
    sys.path.insert(0, str(Path(__file__).parent / "faults"))
    from fault_ledger import write_figures

    write_figures(Path(path), reporter.stats, session.config.getoption("--faults"))
