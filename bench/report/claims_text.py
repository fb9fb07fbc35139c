"""What the claims' table says, in words: a sentence a comparison, and the table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.claims import CHECK, IMAGES, Claim, Point, minimum_seeds
from bench.report.captions import PAPER_SCALE, scale_words
from bench.report.claims_table import Outcome, families, words
from bench.report.display import BLANK, SAMPLERS, View, interval, label, markdown, minus, number
from bench.report.tables import Grid
from bench.statistics import INCONCLUSIVE, MOST_SEEDS, NOT_MEASURED, Summary

TITLE = "The claims"
EXPECTED = {"negative": "below zero", "positive": "above zero", "equal": "zero, as far as it can be"}


def record(outcome: Outcome) -> dict[str, Any]:
    """One finding for summary.json: the row of claims.csv, what was expected, and a sentence."""
    test = outcome.test
    said = {"side": test.side, "expected": EXPECTED[test.side], "pairing": test.pairing}
    return outcome.record() | said | {"sentence": sentence(outcome)}


def claim_record(claim: Claim) -> dict[str, Any]:
    """What summary.json says of a claim and its tests."""
    named = ("statistic", "side", "pairing", "rule", "needs")
    tests = [{name: getattr(test, name) for name in named} for test in claim.tests]
    for test in tests:
        test["statistic"] = test["statistic"].format(**words(Point()))
    return {"id": claim.id, "title": claim.title, "statement": claim.statement, "source": claim.source} | {
        "scope": claim.scope,
        "tests": tests,
    }


def sentence(row: Outcome) -> str:
    """A comparison in one sentence, or two."""
    named = words(row.point)
    named["quantity"] = named["quantity"].replace("_", " ")
    named["noun"] = row.test.noun.format(**named)
    ours, theirs = label(row.variant), label(row.baseline)
    if row.verdict == NOT_MEASURED:
        who = f"{ours} against {theirs}, " if theirs else f"{ours}, " if ours else ""
        return f"{who}{named['noun']}: not measured. {_sentence_case(row.note)}."
    unit = f" {row.units}" if row.units else ""
    if row.test.kind == CHECK:
        quantity = f" ({named['quantity']})" if row.point.quantity else ""
        runs = f"{row.n} run{'' if row.n == 1 else 's'}"
        return f"{ours}, {named['noun']}{quantity}: {number(row.estimate, 3)}{unit} in {runs}{_aside(row.note)}."
    return _tested(row, named | {"ours": ours, "theirs": theirs}, unit)


def _tested(row: Outcome, named: dict[str, Any], unit: str) -> str:
    """The sentence of a row with an estimate against zero."""
    noun, paired = named["noun"], "paired " if named["theirs"] else ""
    difference = f"{named['ours']} − {named['theirs']}" if paired else named["ours"]
    if row.low is None:
        shown = f"{number(row.estimate, 2)}{unit}"
        return f"One {paired}seed gives no interval. {_sentence_case(noun)}: {difference} = {shown}{_aside(row.note)}."
    if row.decided_by == IMAGES:
        shown = f"{number(row.estimate, 3)}{unit}, {number(row.low, 3)} to {number(row.high, 3)}"
        return f"{_sentence_case(noun)}: {difference} = {shown}. {_sentence_case(row.note)}."
    seeds = f"{row.n} {paired}seeds"
    power = _power(row) if row.verdict == INCONCLUSIVE else ""
    if row.low <= 0 <= row.high:
        shown = f"{interval(Summary(row.estimate, row.sd, row.n, row.low, row.high))}{unit}"
        seen = f"No difference seen in {noun}" if paired else f"No departure from zero seen in {noun}"
        return f"{seen}: {difference} = {shown} ({seeds}; the interval covers zero{power}){_rest(row)}."
    size_of = Summary(abs(row.estimate), row.sd, row.n, 0.0, row.high - row.low)
    text = row.test.below if row.estimate < 0 else row.test.above
    said = f"{text.format(**named, size=interval(size_of) + unit)} ({seeds}"
    if row.verdict == INCONCLUSIVE and row.p_holm is not None:
        corrected = f"p = {p_text(row.p)}, corrected {p_text(row.p_holm)}"
        said += f"; no verdict among {row.family} comparisons, {corrected}"
    return f"{said}{power}){_rest(row)}."


def _power(row: Outcome) -> str:
    """How many seeds would decide an inconclusive comparison."""
    if row.seeds_needed is not None:
        return f"; about {row.seeds_needed:,} seeds would decide it at the spread observed"
    if row.estimate == 0:
        return "; no difference to decide"
    return f"; more than {MOST_SEEDS:,} seeds would be needed to decide it"


def _rest(row: Outcome) -> str:
    """What the note adds to a sentence that has said how many seeds it would take."""
    return _aside("; ".join(part for part in row.note.split("; ") if not part.startswith("more than ")))


def _aside(note: str) -> str:
    return f" — {note}" if note else ""


def _sentence_case(text: str) -> str:
    """The text as a sentence begins and, without its full stop, ends; a file's name keeps its small letter."""
    first = text.split(" ")[0]
    return (text if "." in first else text[:1].upper() + text[1:]).rstrip(".")


def p_text(p: float | None) -> str:
    """A p value to two digits, never as zero."""
    if p is None:
        return BLANK
    return "< 0.0001" if p < 1e-4 else number(p, 2)


def caption(suite: str, grid: Grid, rows: Sequence[Outcome]) -> str:
    """What claims.md says of itself: seeds, scale, how verdicts are reached, and what the columns mean."""
    seeds = ", ".join(map(str, grid.seeds))
    scales = " ".join(f"{name}: {scale_words(suite, name, grid.of(name))}" for name in grid.datasets)
    small = "" if suite in PAPER_SCALE else "A small suite, not the paper's data and scale: its verdicts hold for it. "
    sizes, least = families(suite, rows), minimum_seeds(suite)
    tested, most = sum(sizes.values()), max(sizes.values(), default=0)
    return (
        f"Suite {suite}, seeds {seeds}. {small}{scales} Statements, statistics, pairs, sides and rules are fixed in "
        "`bench/claims`, before results are read. "
        "Estimate: mean over seeds ± half its 95 % t interval, paired by seed; "
        "sd is over seeds. On its own (alone) a row is decided where its interval excludes zero and it has at least "
        f"{least} seeds. The verdict also asks for Holm's corrected p below 0.05; a family is the tested rows of "
        f"one data set and pair, across all claims (at most {most} of the {tested} rows), so that the chance of any "
        "false verdict about that pair there is at most 5 %. The family is a pair on a data set because that is what "
        "a reader asks about; `p_holm_suite` in claims.csv tells what survives a correction over all tested rows of "
        "the suite. Checks of identities and inequalities have "
        "a rule of their own, no p, and stand outside the family. Seeds needed: paired seeds for which a t test at the "
        "family's strictest level, 0.05 / its size, finds the observed difference at the observed spread in four "
        "cases of five; blank where there is no spread, no difference or no end to it. Rows measured differently are "
        "refused, not averaged."
    )


def document(claims: Sequence[Claim], rows: Sequence[Outcome], caption: str) -> str:
    """claims.md: the caption, then a section a claim with its words, its rule and its rows."""
    views = [_view(claim, [row for row in rows if row.claim == claim.id]) for claim in claims]
    head, _, rest = markdown(TITLE, views).partition("\n\n")
    return f"{head}\n\n{caption}\n\n{rest}"


def _view(claim: Claim, rows: Sequence[Outcome]) -> View:
    described = []
    for test in claim_record(claim)["tests"]:
        described.append(
            f"Statistic: {test['statistic']}. Expected: {EXPECTED[test['side']]}. Pairing: {test['pairing']}. "
            f"Rule: {test['rule']}. Read from: {', '.join(test['needs'])}."
        )
    columns = ["data set", "variant", "baseline", "sampler", "statistic", "estimate", "n", "p", "p, Holm"]
    columns += ["alone", "verdict", "seeds needed", "decided by", "note"]
    view = View(
        "claims",
        f"{claim.title} ({claim.id})",
        f"“{claim.statement}” ({claim.source}). {' '.join(described)}",
        columns,
        [],
        words=frozenset(columns) - {"estimate", "n", "p", "p, Holm", "seeds needed"},
    )
    for row in rows:
        measured = row.verdict != NOT_MEASURED
        view.rows.append(
            [
                row.dataset or BLANK,
                row.variant or BLANK,
                row.baseline or BLANK,
                SAMPLERS.get(row.sampler, row.sampler) or BLANK,
                row.statistic,
                _estimate(row) if measured else BLANK,
                str(row.n) if measured else BLANK,
                p_text(row.p),
                p_text(row.p_holm),
                row.verdict_alone,
                row.verdict,
                BLANK if row.seeds_needed is None else f"{row.seeds_needed:,}",
                row.decided_by or BLANK,
                row.note or BLANK,
            ]
        )
    return view


def _estimate(row: Outcome) -> str:
    unit = f" {row.units}" if row.units else ""
    if row.low is None:
        return f"{number(row.estimate, 3)}{unit}"
    half = (row.high - row.low) / 2
    if abs((row.high + row.low) / 2 - row.estimate) > 0.01 * half:  # a bootstrap interval need not be symmetric
        return f"{number(row.estimate, 3)}{unit} ({number(row.low, 3)} to {number(row.high, 3)})"
    return minus(f"{interval(Summary(row.estimate, row.sd, row.n, row.low, row.high))}{unit}")
