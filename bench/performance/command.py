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
    """Measure the cases that ``out`` lacks and write its index.md; 1 where a case failed. InputError for bad input."""
    from bench.config import reports_root
    from bench.performance.record import DEVICES, measure
    from bench.report.performance_page import write_performance

    out = reports_root() / "performance" if out is None else out
    if out.is_file():
        raise InputError(f"--out {out}: is a file; accepted: a folder")
    failed: list[str] = []
    if not report_only:
        import torch

        found = "gpu" if torch.cuda.is_available() else "cpu"
        if device is not None and device not in DEVICES:
            raise InputError(f"--device {device}: accepted: {', '.join(DEVICES)}")
        if device == "gpu" and found == "cpu":
            raise InputError("--device gpu: no CUDA device is there; accepted: cpu")
        if limit_seconds is not None and not limit_seconds > 0:
            raise InputError(f"--limit-seconds {limit_seconds:g}: must be greater than 0")
        failed = measure(out, device or found, only, again, quick, limit_seconds)
    write_performance(out)
    return 1 if failed else 0
