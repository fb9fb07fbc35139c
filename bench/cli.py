"""`indm-bench`: the command line. Exit code 0; 2 for bad input (one line); 1 for failure; 75 when asked to stop.

Heavy packages are imported inside the commands, so that `--help` and `list` answer at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bench.errors import InputError, RunFailure

app = typer.Typer(
    help="Train diffusion models alike, measure them alike, and put the numbers side by side.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# of a path that cannot be: too long, through a file, a folder where a file is meant
IMPOSSIBLE_NAMES = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)

SuiteName = Annotated[str, typer.Argument(metavar="SUITE", help="Name of a suite: experiments/SUITE.yaml.")]
VariantName = Annotated[str, typer.Argument(metavar="VARIANT", help="A variant of the suite.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Only this seed.")]
OneSeed = Annotated[int | None, typer.Option("--seed", help="The run's seed (default: the suite's first).")]
DatasetOption = Annotated[str | None, typer.Option("--dataset", help="Only this data set.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", help="Runs at once (default: from the cores; 1 on a GPU).")
]
MinutesOption = Annotated[
    float | None, typer.Option("--minutes", help="Stop in good time before so many minutes have passed.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. train.steps=100; repeatable."),
]


@app.command("list")
def list_suites() -> None:
    """Suites, their data sets, variants and seeds."""
    from bench.config import load_suite, suite_files

    for name in suite_files():
        suite = load_suite(name)
        print(f"{name}: {suite.title}")
        print(f"  data sets: {', '.join(suite.datasets)}")
        for kind, variants in (("variants", suite.core), ("more", suite.more)):
            if variants:
                seeds = ", ".join(map(str, suite.seeds_of(variants[0])))
                print(f"  {kind + ':':<11}{', '.join(variants)}; seeds {seeds}")


@app.command()
def train(
    suite: SuiteName,
    variant: VariantName,
    seed: SeedOption = None,
    dataset: DatasetOption = None,
    workers: WorkersOption = None,
    settings: SetOption = None,
) -> None:
    """Train a variant: all its seeds and data sets, or some. Finished runs are left alone, killed ones continue."""
    from bench.commands import run_stage

    run_stage("train", suite, variant, seed, dataset, workers, settings)


@app.command()
def evaluate(
    suite: Annotated[str | None, typer.Argument(metavar="SUITE", help="Name of a suite.")] = None,
    variant: Annotated[str | None, typer.Argument(metavar="VARIANT", help="A variant of the suite.")] = None,
    seed: SeedOption = None,
    dataset: DatasetOption = None,
    workers: WorkersOption = None,
    settings: SetOption = None,
    pretrained: Annotated[
        Path | None,
        typer.Option("--pretrained", help="Measure this folder instead: of import-checkpoint, export or diffusers."),
    ] = None,
    suite_option: Annotated[str | None, typer.Option("--suite", help="The suite, as SUITE.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="What --pretrained is called in the tables.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results of --pretrained.")] = None,
) -> None:
    """Measure a trained variant: likelihoods, sample quality against sampling steps, pictures.

    With --pretrained, a model trained elsewhere, under the settings of VARIANT (default: the suite's first).
    """
    from bench.commands import measure_pretrained, run_stage

    if suite_option is not None:  # then the one name that stands alone is a variant's
        if variant is not None:
            raise InputError(f"evaluate: --suite {suite_option}: accepted: the suite given once, here or as SUITE")
        suite, variant = suite_option, suite
    if suite is None or (variant is None and pretrained is None):
        missing = "SUITE" if suite is None else "VARIANT"
        raise InputError(f"evaluate: {missing} is missing; accepted: SUITE VARIANT, or SUITE with --pretrained PATH")
    if pretrained is not None:
        if workers is not None:
            raise InputError(f"evaluate: --workers {workers}: accepted: only without --pretrained, which is one run")
        measure_pretrained(pretrained, suite, variant, seed, dataset, name, out, settings)
        return
    if name is not None or out is not None:
        raise InputError(f"evaluate: {'--name' if name is not None else '--out'}: accepted: only with --pretrained")
    run_stage("evaluate", suite, variant, seed, dataset, workers, settings)


@app.command("import-checkpoint")
def import_checkpoint(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint that torch.save wrote (.pth).")],
    config: Annotated[
        str, typer.Option("--config", help="Its official configuration, e.g. vp/cifar10_ddpmpp_continuous.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write, for evaluate --pretrained.")],
    kind: Annotated[str, typer.Option("--kind", help="Whose checkpoint: score_sde or indm.")] = "score_sde",
    flow: Annotated[Path | None, typer.Option("--flow", help="With --kind indm: its flow_checkpoint.pth.")] = None,
    weights: Annotated[str, typer.Option("--weights", help="ema, the averaged ones, or raw.")] = "ema",
    shape: Annotated[str, typer.Option("--shape", help="Channels, height and width of an image.")] = "3,32,32",
    settings: SetOption = None,
) -> None:
    """Read an official checkpoint without unpickling objects, and write it as a folder of this harness."""
    from bench.commands import import_weights

    import_weights(file, config, out, kind, weights, shape, settings, flow)


@app.command()
def features(suite: SuiteName) -> None:
    """Train the classifiers that a suite's image quality is judged by, if any."""
    from bench.commands import train_features

    train_features(suite)


@app.command()
def references(suite: SuiteName) -> None:
    """Compute what needs no training: the likelihood of a Gaussian fitted to each of a suite's data sets."""
    from bench.commands import write_references

    write_references(suite)


@app.command()
def report(
    suite: Annotated[str | None, typer.Argument(metavar="[SUITE]", help="Name of a suite.")] = None,
    index: Annotated[bool, typer.Option("--index", help="Write the page reports/index.html.")] = False,
) -> None:
    """Write a suite's tables and figures from its runs' files, or the page of all suites (--index)."""
    from bench.commands import write_report

    if (suite is None) != index:
        raise InputError("report: give either a SUITE or --index")
    write_report(suite)


@app.command()
def run(
    suite: SuiteName,
    variant: Annotated[str | None, typer.Option("--variant", help="Only this variant.")] = None,
    seed: SeedOption = None,
    dataset: DatasetOption = None,
    workers: WorkersOption = None,
    minutes: MinutesOption = None,
    settings: SetOption = None,
) -> None:
    """The whole suite without DVC: references, features, train, evaluate, report, page. A failed run stops no other.

    With --minutes in pieces: exit code 75 means that work is left, and that the same command continues it.
    """
    from bench.commands import run_suite

    run_suite(suite, variant, seed, dataset, workers, settings, minutes)


@app.command()
def repro(
    suite: SuiteName,
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="LIST", help="E.g. 0,1,2,3, or cpu,cpu (default: all visible).")
    ] = None,
) -> None:
    """Reproduce a suite through DVC, its stages side by side on several GPUs, each stage on one. Code 75: stopped."""
    from bench.on_devices import reproduce_on

    raise typer.Exit(reproduce_on(suite, gpus))


@app.command()
def sample(
    suite: SuiteName,
    variant: VariantName,
    seed: OneSeed = None,
    dataset: DatasetOption = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many samples.")] = 64,
    first: Annotated[int, typer.Option("--first", min=0, help="Index of the first: sample i is always the same.")] = 0,
    sampler: Annotated[str, typer.Option("--sampler", help="Name of the sampler.")] = "ddim",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Number of sampling steps.")] = 64,
    out: Annotated[Path, typer.Option("--out", help="File to write: .npz (arrays) or .png (a picture).")] = Path(
        "samples.npz"
    ),
) -> None:
    """Draw samples from a trained run."""
    from bench.commands import draw_samples

    draw_samples(suite, variant, seed, dataset, count, first, sampler, steps, out)


@app.command()
def plan(
    suite: SuiteName,
    minutes: MinutesOption = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="Also the time on so many devices like this one.")] = None,
    settings: SetOption = None,
) -> None:
    """What a suite costs: runs, images, time from a short measurement on this machine, arithmetic, memory, disk."""
    from bench.plan import print_plan

    print_plan(suite, settings or [], minutes, gpus)


@app.command()
def export(
    suite: SuiteName,
    variant: VariantName,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    seed: OneSeed = None,
    dataset: DatasetOption = None,
) -> None:
    """Copy a trained run's averaged weights and configuration to a folder."""
    from bench.commands import export_run

    export_run(suite, variant, seed, dataset, out)


@app.command()
def regression(
    suite: SuiteName,
    against: Annotated[Path, typer.Option("--against", help="Folder with the tables to compare with.")],
) -> None:
    """Compare a suite's report with earlier tables, within tolerances from the spread over seeds; 1 if it differs."""
    from bench.commands import check_regression

    check_regression(suite, against)


@app.command()
def validate(
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the table as CSV and Markdown.")] = None,
) -> None:
    """Hold every estimator against ground truth: truth, estimate, standard error, error; exit 1 if any is off."""
    from bench.truth.battery import validate as hold

    code = hold(out)
    if code:
        raise typer.Exit(code)


@app.command()
def estimators(
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write (default: reports/estimators).")] = None,
) -> None:
    """Measure the estimators' standard error against their cost, from which the defaults are chosen."""
    from bench.config import reports_root
    from bench.estimators.command import measure_estimators

    measure_estimators(reports_root() / "estimators" if out is None else out)


@app.command()
def performance(
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write (default: reports/performance).")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu or gpu (default: gpu if there is one).")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Cases that begin so; repeatable.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure finished cases too.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds: a rehearsal.")] = False,
    limit_seconds: Annotated[float | None, typer.Option("--limit-seconds", help="Begin no case after that.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Measure nothing: write index.md from the record.")] = False,
) -> None:
    """Measure the speed of steps, likelihoods and samples, a case at a time; the same command continues."""
    from bench.performance.command import run_performance

    if code := run_performance(out, device, only or (), again, quick, limit_seconds, report):
        raise typer.Exit(code)


@app.command()
def pipeline(
    check: Annotated[bool, typer.Option("--check", help="Only say whether the files are up to date.")] = False,
) -> None:
    """Write dvc.yaml and experiments/pipelines/*/dvc.yaml from the suites."""
    from bench.pipeline import outdated, write_pipelines

    if not check:
        write_pipelines()
    elif stale := outdated():
        raise InputError(
            f"{', '.join(map(str, stale))}: differs from the suites; write it again by `indm-bench pipeline`"
        )


def execute(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; its exit code. Bad input is told in one line without a traceback."""
    try:
        return (
            app(args=None if arguments is None else list(arguments), prog_name="indm-bench", standalone_mode=False) or 0
        )
    except InputError as error:
        problem = error
    except typer.Abort:
        return 130
    except BrokenPipeError:
        raise
    except (RunFailure, OSError) as error:  # the disk is full, a folder is read-only
        print(f"indm-bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if getattr(error, "errno", None) in IMPOSSIBLE_NAMES else 1
    except Exception as error:
        # the parser's own errors, of whichever click the installed Typer brings
        if not hasattr(error, "format_message"):
            raise
        problem = error.format_message() or "a command is missing; see indm-bench --help"
    print(f"indm-bench: {' '.join(str(problem).split())}", file=sys.stderr)
    return 2


def main() -> None:
    """Entry point of the console script."""
    try:
        code = execute()
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader of our output has gone; keep the interpreter from flushing into the closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
