"""The page: one self-contained HTML file over all reported suites, made from ``reports/`` alone."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.errors import InputError
from bench.files import read_json, write_text_atomic
from bench.report.beside import beside_the_paper
from bench.report.data_uri import data_uri
from bench.report.display import EMPTY, SAMPLERS, TITLES, label, views
from bench.report.estimators_page import ESTIMATORS, estimators_section
from bench.report.findings import headline, score
from bench.report.forest import forest
from bench.report.forms import TABLES
from bench.report.performance_page import PERFORMANCE, performance_section
from bench.report.references import load_published
from bench.report.study_views import study_views
from bench.seals import read_summary

SUMMARY = "summary.json"
SCHEMA = 3  # of the summary
ORDER = ("toy2d", "digits", "cifar10-lite", "cifar10", "celeba64")
LAST = ("smoke",)
# bytes of the whole page, and the widths (figures, pictures) tried in turn to stay below it
LIMIT = 6_000_000
WIDTHS = ((1240, 480), (1000, 360), (760, 260), (560, 180))
VARIANTS = {
    "ddpmpp-vp": "variance-preserving linear diffusion with the DDPM++ score network",
    "ddpmpp-subvp": "sub-variance-preserving linear diffusion with the DDPM++ score network",
    "ncsnpp-ve": "variance-exploding linear diffusion with the NCSN++ score network",
    "indm-vp-nll": "a residual flow before the variance-preserving diffusion, both trained on the bound (NLL setting)",
    "indm-vp-fid": "the same, flow trained on the bound and score on its variance-weighted loss (FID setting)",
    "indm-ve": "a residual flow before the variance-exploding diffusion",
    "indm-vp-glow": "INDM (VP, NLL) with Glow's multi-scale coupling layers as its flow",
    "indm-vp-pretrained": "INDM (VP, NLL) begun as a linear diffusion: score first, then the two together",
    "indm-vp-st": "INDM (VP) with soft truncation: the smallest time of training is drawn anew at each step",
    "diffflow": "forward drift and score both learned, along one discrete chain",
    "sbp-fbsde": "a Schrödinger bridge whose two policies take turns in training on their likelihoods",
    "sbp-dsb": "a Schrödinger bridge by iterative proportional fitting with mean matching",
    "ddpm": "a discrete linear chain trained on the unweighted prediction of noise",
    "ncsn": "score matching at discrete noise levels, sampled by annealed Langevin dynamics",
    "scoreflow-vp": "DDPM++ (VP) with likelihood weighting and importance-sampled times",
    "sdeflow-uniform": "the variational framework's loss of the plug-in reverse SDE, times drawn uniformly",
    "sdeflow-debiased": "the same with the debiased law of times",
}


def report_index(reports_root: Path | str | None = None) -> None:
    """Write ``reports_root``/index.html over all suites that have a report; one of other code is named, not shown.

    Raises InputError where there is none.
    """
    if reports_root is None:
        from bench import config

        reports_root = config.reports_root()
    root = Path(reports_root)
    found = [
        path.parent.name for path in root.glob(f"*/{SUMMARY}") if path.parent.name not in (ESTIMATORS, PERFORMANCE)
    ]
    if not found:
        raise InputError(f"{root}: no suite has a report yet; accepted: run `indm-bench report SUITE` first")
    # a report that other code wrote long ago must not take the page from the others
    schemas = {name: _schema(root / name / SUMMARY) for name in found}
    outdated = sorted(name for name in found if schemas[name] != SCHEMA)
    names = [name for name in found if name not in outdated]
    if not names:
        name = outdated[0]
        raise InputError(
            f"{root / name / SUMMARY}: schema {schemas[name]}: this page reads schema {SCHEMA}; "
            f"accepted: run `indm-bench report {name}` again"
        )
    last = len(ORDER)
    names.sort(key=lambda name: (name in LAST, ORDER.index(name) if name in ORDER else last, name))
    template = _environment().get_template("page.html.j2")
    with _showing(root):
        for widths in WIDTHS:
            suites = []
            for name in names:
                with _showing(root / name):
                    suites.append(_suite(root / name, root, widths))
            page = template.render(
                suites=suites,
                outdated=outdated,
                overview=_overview(suites),
                claims=_claims_board(suites),
                estimators=estimators_section(root, widths[0]),
                performance=performance_section(root),
                variants=VARIANTS,
                label=label,
            )
            if len(page.encode()) < LIMIT:
                break
    write_text_atomic(root / "index.html", page)


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bench.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    # a number stays on one line with its interval
    environment.filters["tied"] = lambda text: str(text).replace(" ± ", "\u00a0±\u00a0").replace(" − ", "\u00a0− ")
    return environment


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def _schema(path: Path) -> Any:
    """The schema of a summary; InputError for a file that is none."""
    try:
        return read_json(path)["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
        raise InputError(
            f"{path}: not a summary ({reason}); accepted: run `indm-bench report {path.parent.name}`"
        ) from error


@contextmanager
def _showing(place: Path) -> Iterator[None]:
    """A block in which a report that is not as ``report_suite`` writes it becomes an InputError."""
    from jinja2 import TemplateError

    wrong = (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, csv.Error, TemplateError)
    try:
        yield
    except InputError:
        raise
    except wrong as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        again = place.name if (place / SUMMARY).is_file() else "SUITE"
        raise InputError(
            f"{place}: cannot be shown ({reason}); accepted: run `indm-bench report {again}` again"
        ) from error


def _suite(folder: Path, root: Path, widths: tuple[int, int]) -> dict[str, Any]:
    """Everything the template says about one suite."""
    summary = read_summary(folder)
    if not summary["judged"]:
        summary = summary | {"findings": []}
    rows = {name: make().read_rows(folder / f"{name}.csv") for name, make in TABLES.items()}
    shown = []
    for name, make in TABLES.items():
        table = make()
        table.rows = rows[name]
        made = views(table, summary["captions"].get(name, {}))
        shown.append({"name": name, "title": TITLES[name], "views": made, "empty": EMPTY.get(name, "")})
    return summary | {
        "anchor": f"suite-{folder.name}",
        "claims": _claims(summary),
        "stated": summary["claims"],
        "unmeasured": _unmeasured(summary),
        "board": _board(summary),
        "score": score(summary["findings"]),
        **_against(summary["findings"]),
        "figures": [_figure(folder / "figures" / name, summary, widths[0]) for name in summary["figures"]],
        "pictures": _pictures(folder / "figures", summary, widths[1]),
        "tables": [
            table | {"views": [view for view in table["views"] if view.dataset != "published"]} for table in shown
        ],
        "published": [view for table in shown for view in table["views"] if view.dataset == "published"],
        "beside": beside_the_paper(rows, load_published(root / "reference.csv"), summary),
        "studies": study_views(folder, summary, widths[0]),
        "missing": _grouped(summary["missing"], len(summary["datasets"]) > 1),
        "hardware": _hardware(summary["provenance"]),
        "alone": score([f | {"verdict": f["verdict_alone"]} for f in summary["findings"] if f["p_holm"] is not None]),
    }


def _against(findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the sentence under a suite's tally counts, each where it may be said.

    "paired": verdicts of INDM against its linear counterpart; "other": of what else is compared, which is not about
    the linear diffusion; "failed": how many checks of identities and inequalities came out against them.
    """
    # here, because the claims read result files with the loaders of this package
    from bench.claims import PAIRS

    tested = [finding for finding in findings if finding["side"] != "equal"]
    paired = [finding for finding in tested if (finding["variant"], finding["baseline"]) in PAIRS]
    other = [finding for finding in tested if (finding["variant"], finding["baseline"]) not in PAIRS]
    checks = score([finding for finding in findings if finding["side"] == "equal"])
    return {"paired": score(paired), "other": score(other), "failed": checks.get("contradicted", 0)}


def _claims(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Claims with a measured comparison: the findings of the first statistic and sampler in sight, others folded."""
    claims = []
    several = len(summary["datasets"]) > 1
    for claim in summary["claims"]:
        findings = [finding for finding in summary["findings"] if finding["claim"] == claim["id"]]
        if all(finding["estimate"] is None for finding in findings):
            continue
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for finding in findings:
            groups.setdefault((finding["statistic"], finding["sampler"]), []).append(finding)
        # a group without a number says nothing that the list of what was not measured does not say
        made = [_group(found, several) for found in groups.values() if any(f["estimate"] is not None for f in found)]
        claims.append(claim | {"first": made[0], "others": made[1:], "score": score(findings)})
    return claims


def _group(findings: Sequence[dict[str, Any]], several: bool) -> dict[str, Any]:
    """Findings of one statistic and sampler, each with its picture."""
    first = findings[0]
    drawn = [finding | {"mean": finding["estimate"]} for finding in findings]
    pictures = forest(drawn, first["side"]) if first["side"] != "equal" else [""] * len(drawn)
    return {
        "label": f"with {SAMPLERS.get(first['sampler'], first['sampler'])}" if first["sampler"] else first["statistic"],
        "statistic": first["statistic"],
        "expected": first["expected"],
        "shaded": first["side"] != "equal",
        "pairing": first["pairing"],
        "findings": [
            finding | {"forest": picture, "place": finding["dataset"] if several else ""}
            for finding, picture in zip(findings, pictures)
        ],
    }


def _unmeasured(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Claims of which a statistic has no number at all, each with the reasons and where they hold."""
    listed = []
    for claim in summary["claims"]:
        statistics: dict[str, list[Mapping[str, Any]]] = {}
        for finding in summary["findings"]:
            if finding["claim"] == claim["id"]:
                statistics.setdefault(finding["statistic"], []).append(finding)
        reasons: dict[str, dict[str, None]] = {}
        for findings in statistics.values():
            if all(finding["estimate"] is None for finding in findings):
                for finding in findings:
                    reasons.setdefault(finding["note"], {})[finding["dataset"]] = None
        if reasons:
            said = [f"{why} ({', '.join(places)})" if any(places) else why for why, places in reasons.items()]
            listed.append({"title": claim["title"], "why": "; ".join(said)})
    return listed


def _claims_board(suites: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Claims by suites: the count of each verdict, and one sentence a claim over all suites that judge any."""
    judging = [suite for suite in suites if suite["judged"]]
    claims = {claim["id"]: claim for suite in judging for claim in suite["stated"]}
    rows = []
    for name, claim in claims.items():
        own = [[finding for finding in suite["findings"] if finding["claim"] == name] for suite in judging]
        rows.append(claim | {"scores": [score(found) for found in own], "headline": headline(sum(own, []))})
    return {"suites": [{"title": suite["title"], "anchor": suite["anchor"]} for suite in judging], "rows": rows}


def _board(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Claims by pairs: how many comparisons (data sets, samplers) had each verdict."""
    findings = [finding for finding in summary["findings"] if finding["baseline"] and finding["estimate"] is not None]
    pairs = dict.fromkeys((finding["variant"], finding["baseline"]) for finding in findings)
    claims = [claim for claim in summary["claims"] if any(finding["claim"] == claim["id"] for finding in findings)]
    rows = []
    for variant, baseline in pairs:
        own = [finding for finding in findings if (finding["variant"], finding["baseline"]) == (variant, baseline)]
        scores = [score([finding for finding in own if finding["claim"] == claim["id"]]) for claim in claims]
        rows.append({"pair": f"{label(variant)} against {label(baseline)}", "scores": scores})
    return {"claims": [claim["title"] for claim in claims], "rows": rows}


def _overview(suites: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was run, over all suites."""
    records = [suite["provenance"] for suite in suites]

    def distinct(name: str) -> list[Any]:
        return list(dict.fromkeys(value for record in records for value in record[name]))

    dates = sorted(
        str(record[name])[:10] for record in records for name in ("first_started", "last_started") if record[name]
    )
    return {
        "runs": sum(suite["runs"]["complete"] for suite in suites),
        "wanted": sum(suite["runs"]["wanted"] for suite in suites),
        "variants": list(dict.fromkeys(variant for suite in suites for variant in suite["variants"])),
        "dates": dates[:1] + (dates[-1:] if dates and dates[-1] != dates[0] else []),
        "commits": distinct("commits"),
        "dirty": any(record["dirty"] for record in records),
        "hardware": "; ".join(dict.fromkeys(suite["hardware"] for suite in suites)),
        "seconds": sum(record["train_seconds"] + record["evaluate_seconds"] for record in records),
        "packages": records[-1]["packages"],
    }


def _hardware(record: Mapping[str, Any]) -> str:
    devices = [device for device in record["devices"] if device != "cpu"]
    cpu = ", ".join(map(str, record["cpus"])) or "an unnamed processor"
    threads = ", ".join(map(str, record["threads"]))
    text = f"{cpu}, {threads} thread{'' if threads == '1' else 's'} a process" if threads else cpu
    return f"{', '.join(devices)} ({text})" if devices else text


def _grouped(missing: Sequence[Mapping[str, Any]], several: bool) -> list[dict[str, Any]]:
    """Missing runs by reason."""
    groups: dict[str, list[str]] = {}
    for run in missing:
        place = f" on {run['dataset']}" if several else ""
        groups.setdefault(run["why"], []).append(f"{run['variant']}{place}, seed {run['seed']}")
    return [{"why": why, "runs": runs} for why, runs in groups.items()]


CAPTIONS = {
    "learning_curve": (
        "Learning curve",
        "Test NELBO against images seen, measured with the averaged weights. Lines are means over seeds, bands 95 % "
        "intervals. A model that has no NELBO has no line.",
    ),
    "learning_curve_flops": (
        "Learning curve against compute",
        "The same against the arithmetic that training took: its steps times the FLOPs of one.",
    ),
    "learning_curve_seconds": (
        "Learning curve against time",
        "The same against seconds of training, mean over seeds, on the hardware named above.",
    ),
    "gap": (
        "The gap",
        "NELBO − NLL at the end of training: nearer to zero is nearer to maximum likelihood. It may be negative: the "
        "two belong to different processes. Filled: after the residual correction; hollow: before it. Bars are 95 % "
        "intervals over seeds, ticks the seeds.",
    ),
    "costs": (
        "Costs",
        "What a better likelihood costs: test NLL against training time. Lower and further left is better.",
    ),
}


def _figure(path: Path, summary: Mapping[str, Any], width: int) -> dict[str, str]:
    """A figure as data URI with its caption and alternative text."""
    sampler = path.stem.removeprefix("robustness_")
    steps = f"Distance of the samples to the data against the number of steps of {SAMPLERS.get(sampler, sampler)}"
    title, caption = CAPTIONS.get(path.stem, ("Few steps", f"{steps}: a flat line is robust."))
    where = ", ".join(summary["datasets"])
    alt = f"{title}, {where}: {caption} The numbers are in the tables below."
    return {"title": title, "caption": caption, "alt": alt, "uri": data_uri(path, width)}


def _pictures(folder: Path, summary: Mapping[str, Any], width: int) -> list[dict[str, Any]]:
    """Samples, then trajectories, each by data set."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for picture in summary["pictures"]:
        name = label(picture["variant"])
        what = "Samples of" if picture["kind"] == "samples" else "The forward process in data space of"
        groups.setdefault((picture["kind"], picture["dataset"]), []).append(
            {
                "uri": data_uri(folder / picture["file"], width),
                "shape": _shape(folder / picture["file"]),
                "alt": f"{what} {name} on {picture['dataset']}, seed {picture['seed']}.",
                "caption": f"{name}, seed {picture['seed']}",
            }
        )
    titles = {"samples": "Samples", "trajectory": "The forward process, seen in data space"}
    return [
        {
            "title": title,
            "kind": kind,
            "groups": [{"dataset": key[1], "images": images} for key, images in groups.items() if key[0] == kind],
        }
        for kind, title in titles.items()
        if any(key[0] == kind for key in groups)
    ]


def _shape(path: Path) -> str:
    """Class of a picture by its proportions: how wide a column it needs."""
    from PIL import Image

    with Image.open(path) as image:
        ratio = image.width / image.height
    return "wide" if ratio > 2.5 else "middle" if ratio > 1.5 else "narrow"
