"""The page's section on speed, and `reports/performance/index.md`: tables made from measured records, nothing measured.

Files of ``reports/performance``: cpu.json and gpu.json (`indm-bench performance`), official.csv (the official code on
the same machine, measured outside this project), changes.csv (optimisations that no switch can undo). Any may lack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.files import write_text_atomic
from bench.report.display import BLANK, View, markdown, number
from bench.report.load import finite
from bench.report.performance_files import Record

PERFORMANCE = "performance"
TITLE = "How fast it is"
NAMES = {
    "ddpmpp": "DDPM++ (VP)",
    "indm-nll": "INDM (VP, NLL)",
    "indm-nll-local": "INDM (VP, NLL), no global latent",
    "indm-fid": "INDM (VP, FID)",
    "indm-fid-local": "INDM (VP, FID), no global latent",
    "ncsnpp": "NCSN++ (VE)",
    "indm-ve": "INDM (VE)",
    "indm-ve-local": "INDM (VE), no global latent",
}
GPU_TITLES = {
    "gpu-step": "GPU: the optimiser step of the published networks",
    "gpu-nll": "GPU: likelihood by the ODE of the published networks",
    "gpu-sampling": "GPU: sampling of the published networks",
}
NO_GPU = "not measured: no GPU"
LEAD = (
    "Seconds of computing on one thread, medians of rounds taken in turn with the reference c, one forward and "
    "backward of Conv2d(64, 64, 3, padding=1) on (16, 64, 32, 32). “Spec” is what the project’s specification measured "
    "of the official code on another machine and asks for; there c took 0.08 s. A multiple of c travels badly: where c "
    "runs near the processor’s peak, every network costs more of it. So its arithmetic stands beside each multiple "
    "(FLOPs in units of c’s: less cannot be reached unless the arithmetic runs faster than c’s), and the official code "
    "measured on the same machine. A ratio to that is the fairer test."
)


def performance_section(reports_root: Path | str) -> dict[str, Any] | None:
    """What the page says of ``reports_root``/performance; None where nothing is there.

    Keys: title, lead, provenance, tables (views with a title), problems.
    """
    record = Record(Path(reports_root) / PERFORMANCE)
    if not record:
        return None
    return {
        "title": TITLE,
        "lead": LEAD,
        "provenance": _where(record),
        "tables": [view for view in tables(record) if view.rows or view.notes],
        "problems": record.problems,
    }


def _where(record: Record) -> str:
    """The CPU's record in sentences."""
    return " ".join(filter(None, (f"{record.measured_on(record.cpu) or 'nothing yet'}.", record.notes.get("cpu"))))


def write_performance(folder: Path | str) -> None:
    """Write ``folder``/index.md from the folder's records; the same bytes from the same records."""
    folder = Path(folder)
    record = Record(folder)
    made = [view for view in tables(record) if view.rows or view.notes]
    first = made[0] if made else None
    if first is not None:
        first.caption = f"{LEAD} Measured on: {_where(record)} {first.caption}"
    text = markdown(TITLE, made, "Nothing is measured yet: `indm-bench performance` does it.")
    if record.problems:
        text += "\n" + "\n".join(f"- {problem}." for problem in record.problems) + "\n"
    write_text_atomic(folder / "index.md", text)


def tables(record: Record) -> list[View]:
    """All tables, in order."""
    return [
        steps(record),
        likelihoods(record),
        ways(record),
        flows(record),
        others(record),
        changes(record),
        *(gpu(record, group) for group in GPU_TITLES),
        official(record),
    ]


def _view(title: str, caption: str, columns: Sequence[str], words: Sequence[str] = ()) -> View:
    return View(PERFORMANCE, title, caption, list(columns), [], words=frozenset((columns[0], *words)))


def _digits(value: Any, digits: int = 3) -> str:
    value = finite(value)
    return BLANK if value is None else number(value, digits)


def _reached(value: Any, goal: Any, floor: Any = None, most: bool = True) -> str:
    """Whether a goal is reached: at most (or at least) so much."""
    value, goal, floor = finite(value), finite(goal), finite(floor)
    if value is None or goal is None:
        return BLANK
    if value <= goal if most else value >= goal:
        return "yes"
    return "no: its arithmetic alone is more" if floor is not None and floor > goal else "no"


def _name(text: str) -> str:
    size, _, kind = text.partition("/")
    kind, _, rest = kind.partition("/")
    return ", ".join(part for part in (f"{size} {NAMES.get(kind, kind)}", rest) if part)


def _above(row: Mapping[str, Any]) -> float | None:
    """MB of a process's peak above what it held at first."""
    peak, alone = finite(row.get("peak_mb")), finite(row.get("peak_mb_alone"))
    return None if peak is None or alone is None else peak - alone


def _problem_row(view: View, name: str, case: Mapping[str, Any]) -> bool:
    """A case that failed says so in its row."""
    if "problem" in case:
        view.rows.append([name, f"not measured: {case['problem']}", *[BLANK] * (len(view.columns) - 2)])
    return "problem" in case


def steps(record: Record) -> View:
    """The optimiser steps."""
    columns = ["network", "seconds", "in c", "its arithmetic in c", "spec: official in c", "spec asks", "reached"]
    columns += ["official here, s", "official here in c", "times faster", "asked, times", "reached here"]
    columns += ["peak, MB", "of that the step, MB", "official, MB"]
    caption = (
        "Whole optimiser steps: zero_grad, losses of all phases, backward, clipping, AdamW, moving average. The "
        "specification’s INDM has a global latent. Compiled: the score network by torch.compile. Times faster: "
        "the official code’s seconds over ours, measured in turn. Memory: the process’s peak, and by how much it "
        "is above what the process held before the network was built, here and in the official code."
    )
    view = _view("The optimiser step", caption, columns, ("reached", "reached here"))
    for name, case in record.of("step").items():
        if _problem_row(view, _name(name), case):
            continue
        there = record.official.get(f"step/{name.removesuffix('/compiled').removesuffix('-local')}") or {}
        own, seconds, theirs = (
            finite(one) for one in (case.get("multiple"), case.get("seconds"), there.get("seconds"))
        )
        faster = theirs / seconds if seconds and theirs else None
        asked = 1 / case["share"] if case.get("share") else None
        other = "another flow" if name.endswith("-local") else ""  # than the official one, which it stands beside
        view.rows.append(
            [
                _name(name),
                *(_digits(case.get(key)) for key in ("seconds", "multiple", "flops_in_c", "official_multiple")),
                _digits(case.get("goal_multiple")),
                other or _reached(own, case.get("goal_multiple"), case.get("flops_in_c")),
                *(_digits(there.get(key)) for key in ("seconds", "multiple")),
                _digits(faster),
                _digits(asked),
                other or _reached(faster, asked, most=False),
                _digits(case.get("peak_mb"), 4),
                *(_digits(_above(one)) for one in (case, there)),
            ]
        )
    return view


def likelihoods(record: Record) -> View:
    """The ODE's likelihood."""
    columns = [
        "network, training steps",
        "solver, tolerance",
        "batch",
        "s an evaluation",
        "in c",
        "its arithmetic in c",
    ]
    columns += ["spec: official in c", "spec asks", "reached", "official here, s", "times faster"]
    columns += ["evaluations, mean", "largest", "RK45 in t, one norm", "spec: official", "half of RK45’s"]
    caption = (
        "Likelihood by the probability-flow ODE, by the solver of the suite cifar10. An evaluation gives drift and "
        "divergence. RK45: the official method at 1e-5 on the same network, two of the images; half of its "
        "evaluations, at no larger an error, is asked of one of the harness’s ways in the next table. The "
        "specification’s evaluations are of its own networks and data; here the networks are trained on enlarged "
        "handwritten digits."
    )
    view = _view("Likelihood by the ODE", caption, columns, (columns[1], "reached", "half of RK45’s"))
    for name, case in record.of("nll").items():
        if _problem_row(view, _name(name), case):
            continue
        there = record.official.get(f"nll/{name}") or {}
        own, seconds, theirs = (
            finite(one) for one in (case.get("multiple"), case.get("seconds"), there.get("seconds"))
        )
        compared = list((case.get("ways") or {}).values())
        rk45 = finite(compared[0].get("evaluations")) if compared else None
        words = [halved_at_no_larger_error(compared[0], way) for way in compared[1:]]
        view.rows.append(
            [
                _name(name),
                f"{case.get('solver', BLANK)}, {_digits(case.get('tolerance'))}",
                *(_digits(case.get(key)) for key in ("batch", "seconds", "multiple", "flops_in_c")),
                *(_digits(case.get(key)) for key in ("official_multiple", "goal_multiple")),
                _reached(own, case.get("goal_multiple"), case.get("flops_in_c")),
                _digits(theirs),
                _digits(theirs / seconds if seconds and theirs else None),
                *(_digits(case.get(key)) for key in ("evaluations", "evaluations_max")),
                *map(_digits, (rk45, case.get("official_evaluations"))),
                next((word for word in words if word == "yes"), words[-1] if words else BLANK),
            ]
        )
    return view


def halved_at_no_larger_error(official: Mapping[str, Any], way: Mapping[str, Any]) -> str:
    """Whether a way to solve needs half the official one's evaluations, which counts at no larger an error alone."""
    counts = [finite(one.get("evaluations")) for one in (official, way)]
    errors = [finite(one.get("error_mean")) for one in (official, way)]
    if None in counts:
        return BLANK
    if counts[1] > counts[0] / 2:
        return "no"
    if None in errors:
        return "fewer, error not measured"
    return "yes" if errors[1] <= errors[0] else "fewer, at a larger error"


def ways(record: Record) -> View:
    """Evaluations and error of each way to solve."""
    columns = ["problem", "way", "evaluations, mean", "largest", "error, nats/dim, mean", "largest error"]
    columns += ["half of RK45’s"]
    caption = (
        "Evaluations and error at a tolerance of 1e-5 by the variable and by the error norm. Errors are against the "
        "closed form (analytic scores, float64) or against a tolerance of 1e-7 in float64 (trained networks, float32). "
        "Half of RK45’s: half of the first way’s evaluations, or fewer, at a mean error no larger than its own."
    )
    view = _view("Evaluations of the ODE, by the way it is solved", caption, columns, ("way", "half of RK45’s"))
    found = {f"analytic score, {name.upper()}": case for name, case in record.of("analytic").items()}
    found |= {_name(name): case for name, case in record.of("nll").items()}
    for name, case in found.items():
        compared = case.get("ways") or {}
        if not any("error_mean" in one for one in compared.values()):
            continue
        first = next(iter(compared.values()))
        for way, one in compared.items():
            half = BLANK if one is first else halved_at_no_larger_error(first, one)
            counts = (_digits(one.get(key)) for key in ("evaluations", "evaluations_max"))
            errors = (_digits(one.get(key), 2) for key in ("error_mean", "error_max"))
            view.rows.append([name, way, *counts, *errors, half])
    return view


def flows(record: Record) -> View:
    """The flow alone."""
    what = {
        "train": "value, log-determinant and gradient",
        "evaluate": "value and log-determinant",
        "inverse": "inverse",
    }
    columns = ["flow", "what", "seconds", "in c", "its arithmetic in c", "official here in c", "times faster"]
    view = _view("The flow", "The flow alone, on a batch of 16, untrained.", columns, ("what",))
    for name, case in record.of("flow").items():
        base, _, kind = name.rpartition("/")
        if _problem_row(view, _name(base), case):
            continue
        own, theirs = finite(case.get("multiple")), finite(record.official.get(f"flow/{name}", {}).get("multiple"))
        faster = theirs / own if own and theirs else None
        numbers = (_digits(case.get(key)) for key in ("seconds", "multiple", "flops_in_c"))
        view.rows.append([_name(base), what.get(kind, kind), *numbers, _digits(theirs), _digits(faster)])
    return view


def others(record: Record) -> View:
    """Sampling, and what the harness adds to a bare loop."""
    columns = ["case", "seconds", "in c", "evaluations", "added to a bare loop, %", "asked, %", "reached"]
    caption = (
        "Sampling: seconds of a batch of 16 and c an evaluation. Harness: its step on the digits suite beside a bare "
        "PyTorch loop of the same step on a batch that is already there."
    )
    view = _view("Sampling, and what the harness costs", caption, columns, ("reached",))
    for name, case in record.of("sampling").items():
        if not _problem_row(view, _name(name), case):
            numbers = (_digits(case.get(key)) for key in ("seconds", "multiple", "evaluations"))
            view.rows.append([_name(name), *numbers, BLANK, BLANK, BLANK])
    for name, case in record.of("harness").items():
        if not _problem_row(view, f"harness, {name}", case):
            added, asked = finite(case.get("overhead")), finite(case.get("goal_overhead"))
            shares = [_digits(None if share is None else 100 * share, 2) for share in (added, asked)]
            row = [f"harness, {name}", _digits(case.get("seconds")), BLANK, BLANK, *shares, _reached(added, asked)]
            view.rows.append(row)
    return view


def changes(record: Record) -> View:
    """Each optimisation with what was predicted and what came of it."""
    columns = ["change", "predicted", "measured", "where", "date"]
    caption = (
        "Predictions were written down before measuring. Those with a switch are measured in turn with their plain "
        "counterpart by `indm-bench performance --only change`; the others once, before and after the change."
    )
    view = _view("What each change brought", caption, columns, columns[1:])
    for name, case in record.of("change").items():
        if "problem" in case:
            view.rows.append([name, BLANK, f"not measured: {case['problem']}", BLANK, BLANK])
            continue
        if "sd_plain" in case and "seconds" not in case:
            sds = f"standard deviation {_digits(case['sd'])} against {_digits(case['sd_plain'])}"
            text = f"{_digits(case['times_faster'])} times less variance ({sds})"
        else:
            seconds = f"{_digits(case['seconds'])} s against {_digits(case['plain_seconds'])} s"
            text = f"{_digits(case['times_faster'])} times as fast ({seconds})"
            if "sd_plain" in case:
                text += f"; standard deviation {_digits(case['sd'])} against {_digits(case['sd_plain'])}"
        text += f". {case['note']}" if case.get("note") else ""
        date = str((case.get("provenance") or {}).get("started") or "")[:10]
        view.rows.append([case["change"], case["predicted"], text, "CPU, one thread", date or BLANK])
    for row in record.changes:
        view.rows.append([row[column] or BLANK for column in columns])
    return view


def gpu(record: Record, group: str) -> View:
    """One table of the GPU's cases; without any it says that none was at hand."""
    columns = ["network, way", "seconds", "images/s", "plain float32 eager, s", "times faster", "asked", "reached"]
    columns += {
        "gpu-step": ["of the bf16 matrix rate, %", "peak, GiB", "plain, GiB"],
        "gpu-nll": ["evaluations", "plain, evaluations", "peak, GiB"],
        "gpu-sampling": ["rms difference of samples", "peak, GiB"],
    }[group]
    view = _view(GPU_TITLES[group], "", columns, ("reached",))
    cases = record.of(group)
    if not cases:
        view.notes = [f"{NO_GPU}; `indm-bench performance --device gpu` measures it where there is one."]
        return view
    view.caption = f"Measured on: {record.measured_on(cases)}."
    for name, case in cases.items():
        label = ", ".join((NAMES.get(name.split("/")[0], name), *name.split("/")[1:]))
        if _problem_row(view, label, case):
            continue
        each = 1 / case["seconds_per_image"] if case.get("seconds_per_image") else case.get("images_per_second")
        row = [label, _digits(case.get("seconds")), _digits(each), _digits(case.get("plain_seconds"))]
        row += [_digits(case.get("times_faster")), _digits(case.get("goal_times"))]
        row.append(_reached(case.get("times_faster"), case.get("goal_times"), most=False))
        if group == "gpu-step":
            row += [_digits(100 * case["utilisation"]), _digits(case["peak_gib"]), _digits(case["plain_peak_gib"])]
        elif group == "gpu-nll":
            row += [_digits(case[key]) for key in ("evaluations", "plain_evaluations", "peak_gib")]
        else:
            row += [_digits(case["rms_difference"], 2), _digits(case["peak_gib"])]
        view.rows.append(row)
    return view


def official(record: Record) -> View:
    """The official code's numbers with where they come from."""
    columns = ["case", "seconds", "c", "in c", "peak, MB", "source", "machine", "torch", "date"]
    caption = "Measured outside this project’s code, on the same machine as the numbers above."
    view = _view("The official code", caption, columns, ("source", "machine", "torch", "date"))
    for name, row in record.official.items():
        numbers = (_digits(row[key], 4 if key == "peak_mb" else 3) for key in ("seconds", "c", "multiple", "peak_mb"))
        view.rows.append([name, *numbers, *(row[key] or BLANK for key in ("source", "machine", "torch", "date"))])
    return view
