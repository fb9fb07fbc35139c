"""`indm-bench performance`: measure, then write the page's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.errors import InputError


def run_performance(
    out: Path | None = None,
    device: str | None = None,
    only: Sequence[str] = (),
    again: bool = False,
    quick: bool = False,
    limit_seconds: float | None = None,
    report_only: bool = False,
) -> int:
    """Measure the cases that ``out`` lacks and write its index.md; the exit code. InputError for bad input.

    75 where the limit left cases for the next command, else 1 where a case failed.
    """
    from bench.config import reports_root
    from bench.performance.record import DEVICES, measure
    from bench.report.performance_page import write_performance
    from bench.stopping import EXIT_CODE

    out = reports_root() / "performance" if out is None else out
    if out.is_file():
        raise InputError(f"--out {out}: is a file; accepted: a folder")
    code = 0
    if not report_only:
        import torch

        found = "gpu" if torch.cuda.is_available() else "cpu"
        if device is not None and device not in DEVICES:
            raise InputError(f"--device {device}: accepted: {', '.join(DEVICES)}")
        if device == "gpu" and found == "cpu":
            raise InputError("--device gpu: no CUDA device is there; accepted: cpu")
        if limit_seconds is not None and not limit_seconds > 0:
            raise InputError(f"--limit-seconds {limit_seconds:g}: must be greater than 0")
        outcome = measure(out, device or found, only, again, quick, limit_seconds)
        code = EXIT_CODE if outcome.left else 1 if outcome.failed else 0
    write_performance(out)
    return code
