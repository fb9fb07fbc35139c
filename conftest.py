"""`pytest --benchmark` runs the performance cases of tests/benchmarks, nothing else; plain `pytest` leaves them out."""

import os
from pathlib import Path

import pytest

# two spinning threads beside other work are many times slower than one; set before anything imports torch
os.environ.setdefault("OMP_NUM_THREADS", "1")

BENCHMARKS = Path(__file__).parent / "tests" / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("INDM-Bench")
    group.addoption("--benchmark", action="store_true", help="Run tests/benchmarks, and only them.")
    group.addoption(
        "--benchmark-quick", action="store_true", help="As --benchmark, with few rounds: does it run at all?"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not wanted(config):
        return
    # timings taken beside other work are worth nothing
    if hasattr(config.option, "numprocesses"):
        config.option.numprocesses, config.option.dist, config.option.tx = None, "no", []
    if config.getoption("--benchmark-quick"):
        config.option.benchmark_min_rounds, config.option.benchmark_max_time = 1, 0.1
        config.option.benchmark_warmup = False


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.suffix == ".py" and (BENCHMARKS in collection_path.parents) != wanted(config):
        return True
    return None


def wanted(config: pytest.Config) -> bool:
    """Whether this is a benchmark run."""
    return config.getoption("--benchmark") or config.getoption("--benchmark-quick")


@pytest.fixture(scope="session")
def benchmark_quick(request: pytest.FixtureRequest) -> bool:
    """Whether benchmarks should take as few rounds as they can."""
    return request.config.getoption("--benchmark-quick")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how far the estimators are from the truth; the numbers travel with the reports, from workers too."""
    found = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "ground truth"
    ]
    if found:
        error, what, _ = max(found)
        count = sum(value[2] for value in found)
        terminalreporter.write_line(f"ground truth: largest error {error:.1e} nats/dim ({what}), {count} estimates")
