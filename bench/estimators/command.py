"""The command `indm-bench estimators`: all options measured, tables, figures and a summary written."""

from __future__ import annotations

import time
from pathlib import Path

from bench.estimators.common import Budget
from bench.estimators.figures import draw_all
from bench.estimators.problems import flow_problems, score_problems
from bench.estimators.study import SUBJECTS
from bench.estimators.tables import choose_options, relate, write_table
from bench.files import write_json
from bench.progress import Bar
from bench.provenance import record

TITLE = "Likelihood estimators: variance against cost"
DESCRIPTION = (
    "Standard error, bias and cost of every way to draw the bound's noise levels, to estimate the divergence of the "
    "probability-flow ODE and to estimate a residual flow's log-determinant, on problems with closed forms and on "
    "trained networks."
)


def measure_estimators(out: Path, budget: Budget | None = None) -> None:
    """Measure all options and write tables, figures and, last, `summary.json` into the folder ``out``.

    Files: {time_sampling,trace,series}.csv and .md, figures/*.png. The default ``budget`` takes about two minutes on
    one thread. Runs that are not trained become rows with a status.
    """
    started, budget = time.perf_counter(), budget or Budget()
    scores, missing = score_problems(budget.images)
    problems = {"time_sampling": scores, "trace": scores, "series": flow_problems(scores, budget.images)}
    total = sum(SUBJECTS[name].units(budget) * len(own) for name, own in problems.items())
    tables, chosen = {}, {}
    with Bar(total=total, desc="estimators", unit="setting", leave=False) as bar:
        for name, own in problems.items():
            subject = SUBJECTS[name]
            measured = [row for problem in own for row in subject.measure(problem, budget, bar)]
            relate(subject, measured)
            chosen[name] = choose_options(subject, measured)
            # of the missing networks, the linear diffusion has no flow to measure
            absent = [(key, why) for key, why in missing.items() if name != "series" or "indm" in key]
            tables[name] = [row.values for row in measured] + [{"problem": key, "status": why} for key, why in absent]
            write_table(out, subject, tables[name], chosen[name]["sentence"])
        draw_all(tables, out / "figures")
    summary = {"schema": 1, "title": TITLE, "description": DESCRIPTION, "chosen": chosen}
    write_json(out / "summary.json", summary | {"seconds": time.perf_counter() - started, "provenance": record("cpu")})
