"""`pytest tests/fuzz --fuzz-examples N` tries more cases than CI; `--fuzz-record FILE` writes what came of them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import harness  # noqa: E402

PROPERTY = "inputs fuzzed"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("INDM-Bench")
    group.addoption("--fuzz-examples", type=int, help="Cases of the cheapest kind (default: 100); others follow.")
    group.addoption("--fuzz-record", type=Path, help="Write the numbers of cases to this JSON file.")


def pytest_configure(config: pytest.Config) -> None:
    # before the test modules are imported, whose decorators read it
    harness.examples = config.getoption("fuzz_examples", None) or harness.DEFAULT_EXAMPLES


@pytest.fixture(autouse=True)
def counted(request: pytest.FixtureRequest):
    """Let the numbers of a test's cases travel with its report, from the workers too."""
    harness.COUNTS.clear()
    yield
    made = {kind: dict(counts) for kind, counts in harness.COUNTS.items()}
    request.node.user_properties.append((PROPERTY, made))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    total: dict[str, dict[str, int]] = {}
    failures = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            if "tests/fuzz" not in getattr(report, "nodeid", ""):
                continue
            if getattr(report, "failed", False):
                failures.append(str(report.longrepr))
            if getattr(report, "when", None) == "teardown":
                for name, made in report.user_properties:
                    for kind, counts in made.items() if name == PROPERTY else ():
                        for result, number in counts.items():
                            own = total.setdefault(kind, {})
                            own[result] = own.get(result, 0) + number
    record = config.getoption("fuzz_record", None)
    if not total or record is None:
        return
    hangs = sum("harness.Hang" in text for text in failures)
    content = {
        "schema": 1,
        "command": f"pytest tests/fuzz --fuzz-examples {harness.examples} --fuzz-record {record}",
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
        "inputs": sum(sum(counts.values()) for counts in total.values()),
        "kinds": {kind: {"inputs": sum(counts.values()), **counts} for kind, counts in sorted(total.items())},
        "tracebacks": len(failures) - hangs,
        "hangs": hangs,
        "limits": {"seconds": harness.SECONDS, "bytes": harness.MEMORY},
        "exit_codes": {"0": sum(c.get(harness.ACCEPTED, 0) for c in total.values())}
        | {"2": sum(c.get(harness.REFUSED, 0) for c in total.values())},
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(content, indent=1) + "\n")
