"""Tables, figures and the page, from the result files of runs and nothing else."""

from bench.report.page import report_index
from bench.report.suite import report_suite

__all__ = ["report_index", "report_suite"]
