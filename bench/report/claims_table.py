"""The claims applied to the runs of a suite: one row a comparison, with estimate, interval, p, power and verdict."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.claims import (
    CHECK,
    FAMILY_LEVEL,
    IMAGES,
    PAIRED,
    UNJUDGED,
    Claim,
    Point,
    Test,
    minimum_seeds,
)
from bench.claims.readings import per_image, step_counts
from bench.files import write_text_atomic
from bench.report.cells import OK, Cell, aggregate, number_text
from bench.report.display import SAMPLERS, label
from bench.report.load import ROBUSTNESS, Run
from bench.report.protocol import (
    budget_protocol,
    curve_protocol,
    likelihood_protocol,
    refusals,
    study_protocol,
)
from bench.report.study_files import study_of
from bench.report.tables import NOT_ASKED, Grid, point_protocol
from bench.statistics import (
    CONTRADICTED,
    INCONCLUSIVE,
    MOST_SEEDS,
    NOT_MEASURED,
    bootstrap_interval,
    corrected_verdict,
    holm,
    paired_difference,
    seeds_needed,
    summarise,
    verdict,
)

COLUMNS = (
    "claim",
    "dataset",
    "variant",
    "baseline",
    "sampler",
    "statistic",
    "units",
    "estimate",
    "sd",
    "low",
    "high",
    "n",
    "p",
    "family",
    "p_holm",
    "p_holm_suite",
    "verdict_alone",
    "verdict",
    "seeds_needed",
    "decided_by",
    "note",
)
DISTANCES = {"fd": "FD", "energy": "energy distance", "sliced_wasserstein": "sliced Wasserstein distance"}


@dataclass(frozen=True)
class Outcome:
    """One comparison. The estimate is the mean over seeds of variant minus baseline, or of the variant's own number;
    of a check, its difference or smallest slack. None where nothing was measured: ``note`` says why.
    """

    claim: str
    statistic: str
    test: Test = field(repr=False)
    point: Point = field(default_factory=Point, repr=False)
    dataset: str = ""
    variant: str = ""
    baseline: str = ""
    units: str = ""
    estimate: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    p: float | None = None
    family: int | None = None  # how many comparisons share its correction
    p_holm: float | None = None
    p_holm_suite: float | None = None  # over all tested rows of the suite; decides nothing
    verdict_alone: str = NOT_MEASURED
    verdict: str = NOT_MEASURED
    seeds_needed: int | None = None
    decided_by: str = ""
    note: str = ""

    @property
    def sampler(self) -> str:
        return self.point.sampler

    def record(self) -> dict[str, Any]:
        """The row by column."""
        return {name: getattr(self, name) for name in COLUMNS}


def judge(
    suite: str,
    grid: Grid,
    quality: Mapping[str, str],
    units: Mapping[str, str | None],
    claims: Sequence[Claim],
) -> list[Outcome]:
    """Every claim for every pair and data set of the suite, at least one row a claim.

    ``quality``: data set -> column of robustness.csv that stands for sample quality; ``units``: data set -> unit of its
    likelihoods. Holm's correction is within a data set and pair, across the claims: over its rows that have a p and as
    many seeds as a verdict asks for.
    """
    if suite in UNJUDGED:
        return [_unmeasured(claim, claim.tests[0], UNJUDGED[suite]) for claim in claims]
    rows = [
        row
        for claim in claims
        for dataset in grid.datasets
        for test in claim.tests
        for row in _apply(suite, claim, test, grid, dataset, quality.get(dataset), units.get(dataset) or "")
    ]
    return correct(suite, rows)


def _unmeasured(claim: Claim, test: Test, why: str, dataset: str = "", **named: Any) -> Outcome:
    point = named.get("point", Point())
    return Outcome(claim.id, _statistic(test, point), test, dataset=dataset, note=why, **named)


def words(point: Point) -> dict[str, Any]:
    """What the places in a test's texts stand for at a point; in general words where there is none."""
    return {
        "sampler": SAMPLERS.get(point.sampler, point.sampler) or "any sampler",
        "distance": DISTANCES.get(point.metric, point.metric) or "distance",
        "steps": point.steps or "its own number of",
        "quantity": point.quantity or "each quantity",
    }


def _statistic(test: Test, point: Point) -> str:
    return test.statistic.format(**words(point))


def _apply(
    suite: str, claim: Claim, test: Test, grid: Grid, dataset: str, metric: str | None, units: str
) -> Iterator[Outcome]:
    """The rows of one test on one data set."""
    runs = grid.of(dataset)
    own = {"dataset": dataset, "units": units if test.units == "data" else test.units}
    elsewhere = (test.only_suites and suite not in test.only_suites) or units not in ("", test.only_units or units)
    if test.value is None or elsewhere:
        yield _unmeasured(claim, test, test.otherwise, **own)
        return
    if test.study and all(study_of(run, test.study) == NOT_ASKED for run in runs):
        yield _unmeasured(claim, test, f"the study '{test.study}' is {NOT_ASKED}", **own)
        return
    present = list(dict.fromkeys(run.variant for run in runs))
    sides = test.pairs if test.kind == PAIRED else [(name, "") for name in test.variants or present]
    found = [side for side in sides if set(side) <= {*present, ""}]
    if not found:
        names = [name for name in dict.fromkeys(name for side in sides for name in side) if name not in present]
        yield _unmeasured(claim, test, f"not in this suite: {', '.join(n for n in names if n)}", **own)
        return
    for variant, baseline in found:
        compared = [run for run in runs if run.variant in (variant, baseline)]
        named = own | {"variant": variant, "baseline": baseline}
        points = test.points(compared, metric)
        if not points:
            yield _unmeasured(claim, test, _nothing(claim, test, compared, metric), **named)
        for point in points:
            yield _compare(suite, claim, test, compared, named | {"point": point})


def _nothing(claim: Claim, test: Test, runs: Sequence[Run], metric: str | None) -> str:
    """Why a test has no point at which to compare."""
    if test.study:
        general = f"{test.study}.csv has no such row"
        readings = {(run.variant, run.seed): _failure(claim, study_of(run, test.study)) or general for run in runs}
    else:
        general = "no sampler has enough step counts" if metric else "no distance to the data was measured"
        readings = {(run.variant, run.seed): run.problems.get(ROBUSTNESS) or general for run in runs}
    if set(readings.values()) == {general}:
        return general
    said = {}
    for name in dict.fromkeys(run.variant for run in runs):
        said[name] = _plain(aggregate({seed: why for (variant, seed), why in readings.items() if variant == name}))
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{label(name)}: {why}" for name, why in said.items())


def _failure(claim: Claim, rows: Sequence[Mapping[str, Any]] | str) -> str | None:
    """The first status of a study that is not "ok", of the claim where rows belong to one; or why there is no study."""
    if isinstance(rows, str):
        return rows
    return next(
        (row["status"] for row in rows if row["status"] != "ok" and row.get("claim") in (None, "", claim.id)), None
    )


def _refusal(test: Test, point: Point, runs: Sequence[Run], variants: Sequence[str]) -> str | None:
    """Why these runs may not be put together."""
    protocols: list[Any] = []
    for name in test.protocols:
        if name == "robustness":
            counts = step_counts(runs, point.sampler)
            protocols += [partial(point_protocol, sampler=point.sampler, steps=steps) for steps in counts]
        elif name == "study":
            protocols.append(partial(study_protocol, study=test.study))
        else:
            known = {"likelihood": likelihood_protocol, "curve": curve_protocol, "budget": budget_protocol}
            protocols.append(known[name])
    for protocol in protocols:
        refused = refusals(runs, protocol, "side")
        variant = next((name for name in variants if name in refused), None)
        if variant:
            return f"{label(variant)}: {refused[variant]}"
    return None


def _compare(suite: str, claim: Claim, test: Test, runs: Sequence[Run], named: Mapping[str, Any]) -> Outcome:
    """One row: the runs of the two sides (or of one) at one point."""
    point, variants = named["point"], [name for name in (named["variant"], named["baseline"]) if name]
    row = Outcome(claim.id, _statistic(test, point), test, **named)
    refusal = _refusal(test, point, runs, variants)
    if refusal:
        return replace(row, note=refusal)
    cells = {}
    for name in variants:
        readings = {run.seed: test.value(run, runs, point) for run in runs if run.variant == name}
        cells[name] = aggregate(readings)
    notes = [f"{label(name)}: {_plain(cell)}" for name, cell in cells.items() if cell.status != OK]
    if any(cell.summary is None for cell in cells.values()):
        reasons = [f"{label(name)}: {_plain(cell)}" for name, cell in cells.items() if cell.summary is None]
        return replace(row, note="; ".join(reasons))
    if test.kind == CHECK:
        return _check(row, runs, cells[variants[0]], notes)
    first = cells[variants[0]].values
    second = cells[variants[1]].values if test.kind == PAIRED else dict.fromkeys(first, 0.0)
    if not set(first) & set(second):
        return replace(row, note="the two share no seed")
    return _test(suite, row, runs, first, second, notes)


def _plain(cell: Cell) -> str:
    return cell.status.removeprefix("not measured: ")


def _check(row: Outcome, runs: Sequence[Run], cell: Cell, notes: list[str]) -> Outcome:
    """An identity or an inequality over the runs of one variant; nothing is supported while a run is missing."""
    test = row.test
    errors = {run.seed: test.error(run, runs, row.point) if test.error else 0.0 for run in runs}
    estimate, decided, se = test.decide(cell.values, errors)
    if se:
        notes.append(f"standard error {number_text(float(f'{se:.3g}'))}, from within the runs")
    if cell.status != OK and decided != CONTRADICTED:
        decided = INCONCLUSIVE
    notes += [test.caveat] if test.caveat else []
    return replace(
        row,
        estimate=estimate,
        sd=cell.summary.sd,
        n=cell.summary.n,
        verdict_alone=decided,
        verdict=decided,
        decided_by=test.unit,
        note="; ".join(notes),
    )


def _test(
    suite: str,
    row: Outcome,
    runs: Sequence[Run],
    first: Mapping[int, float],
    second: Mapping[int, float],
    notes: list[str],
) -> Outcome:
    """Student's t over the seeds that both sides have; over the test images where that is one seed alone."""
    test = row.test
    found = paired_difference(first, second)
    least, n, by = minimum_seeds(suite), found.n, test.unit
    decided = verdict(found, test.side) if n >= least else INCONCLUSIVE
    if n < least:
        notes.append(f"{n} of the {least} {'paired ' if test.kind == PAIRED else ''}seeds that a verdict asks for")
    mean, sd, low, high = found.mean, found.sd, found.low, found.high
    if n == 1 and test.per_image:
        (seed,) = set(first) & set(second)
        pair = [next(run for run in runs if (run.variant, run.seed) == (v, seed)) for v in (row.variant, row.baseline)]
        ours, theirs = (per_image(run, test.per_image) for run in pair)
        if not isinstance(ours, str) and not isinstance(theirs, str) and ours.shape == theirs.shape:
            over = summarise(ours - theirs)
            (low, high), sd, n, by = bootstrap_interval(ours - theirs), over.sd, over.n, IMAGES
            notes.append(
                f"interval over the {n} test images of one pair of models (bootstrap, BCa): it is about these two "
                "models and decides nothing about training"
            )
    if test.kind == PAIRED and "budget" not in test.protocols:
        seen = [_images_seen(runs, name) for name in (row.variant, row.baseline)]
        notes += [f"trained on {seen[0]} against {seen[1]} images"] if seen[0] != seen[1] else []
    notes += [test.caveat] if test.caveat else []
    return replace(
        row,
        estimate=mean,
        sd=sd,
        low=low,
        high=high,
        n=n,
        p=found.p,
        verdict_alone=decided,
        verdict=decided,
        decided_by=by,
        note="; ".join(notes),
    )


def _images_seen(runs: Sequence[Run], variant: str) -> str:
    counts = {(run.provenance or {}).get("images_seen") for run in runs if run.variant == variant} - {None}
    return " or ".join(f"{int(count):,}" for count in sorted(counts)) or "an unknown number of"


def _in_family(suite: str, row: Outcome) -> bool:
    return row.p is not None and row.n >= minimum_seeds(suite) and row.decided_by != IMAGES


def families(suite: str, rows: Sequence[Outcome]) -> dict[tuple[str, str, str], int]:
    """(dataset, variant, baseline) -> how many comparisons of the two share Holm's correction across the claims."""
    return Counter(_family(row) for row in rows if _in_family(suite, row))


def _family(row: Outcome) -> tuple[str, str, str]:
    return row.dataset, row.variant, row.baseline


def correct(suite: str, rows: Sequence[Outcome]) -> list[Outcome]:
    """Verdicts after Holm's correction within each family, the correction over all tested rows of the suite, and how
    many seeds would decide each row at its family's strictest level.
    """
    sizes, least = families(suite, rows), minimum_seeds(suite)
    adjusted = {
        key: iter(holm([row.p for row in rows if _in_family(suite, row) and _family(row) == key])) for key in sizes
    }
    over_all = iter(holm([row.p for row in rows if _in_family(suite, row)]))
    corrected = []
    for row in rows:
        size = sizes.get(_family(row), 0)
        if _in_family(suite, row):
            p = next(adjusted[_family(row)])
            row = replace(row, p_holm=p, p_holm_suite=next(over_all), family=size)
            row = replace(row, verdict=corrected_verdict(row.verdict_alone, p, FAMILY_LEVEL))
        if row.p is not None:
            needed = seeds_needed(row.estimate, row.sd, level=FAMILY_LEVEL / max(size, 1))
            if needed is None and row.estimate:
                row = replace(row, note="; ".join(filter(None, [row.note, f"more than {MOST_SEEDS:,} seeds needed"])))
            row = replace(row, seeds_needed=None if needed is None else max(needed, least))
        corrected.append(row)
    return corrected


def write_csv(path: Path, rows: Sequence[Outcome]) -> None:
    """claims.csv: one line a row, blanks where there is no number."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: number_text(value) for name, value in row.record().items()} for row in rows)
    write_text_atomic(path, stream.getvalue())
