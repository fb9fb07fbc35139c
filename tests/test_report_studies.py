"""The report of the studies on synthetic files: numbers recomputed, damage told, rows refused."""

import ast
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic_runs import edit, write_suite
from synthetic_studies import (
    GRIDS,
    IMAGES,
    PATHS,
    PLANE,
    RULERS,
    SDE_TO_ODE,
    SEEDS,
    SLOPES,
    STEPS,
    STUDIES,
    VARIANTS,
    VARIATIONAL,
    change,
    folder_of,
    grid_of,
    read,
    write_studies,
    write_study,
)

import bench
from bench.report.studies import agreement, build_studies
from bench.report.study_files import FORMS, pooled, read_study, split_of
from bench.report.study_text import study_captions


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_suite(root, "toy2d", dict.fromkeys(PLANE, True), VARIANTS, SEEDS)
    assert len(write_studies(root, "toy2d")) == 12
    return root


@pytest.fixture
def copy(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def the_row(table, **keys):
    (row,) = [row for row in table.rows if all(str(row.keys[name]) == str(value) for name, value in keys.items())]
    return row


# The gap in parts --------------------------------------------------------------------------------------------------


def fitted(folder):
    """(nelbo, sde, ode) of each image, (3, IMAGES): intercepts of straight lines in the step, fitted to the file."""
    rows = read(folder, "gap_split")
    made = []
    for name in ("nelbo", "sde", "ode"):
        values = np.array([[float(r[name]) for r in rows if int(r["steps"]) == steps] for steps in GRIDS])
        made.append(np.polyfit(1 / np.array(GRIDS), values, 1)[1])
    return np.array(made)


def test_parts_are_of_the_same_images_and_sum_to_the_gap(runs):
    table = build_studies(grid_of(runs))["gap_split"]
    assert len(table.rows) == 4
    for row in table.rows:
        total, bound, ode = (row.cells[name].values for name in ("gap", "variational", "sde_to_ode"))
        for seed in SEEDS:
            assert total[seed] == pytest.approx(bound[seed] + ode[seed], abs=1e-12)
            nelbo, sde, nll = fitted(folder_of(runs, row.keys["variant"], seed, row.keys["dataset"])).mean(1)
            assert total[seed] == pytest.approx(nelbo - nll, abs=1e-9)
            assert bound[seed] == pytest.approx(nelbo - sde, abs=1e-9)
            found = [row.cells[name].values[seed] for name in ("nelbo", "sde", "nll")]
            assert found == pytest.approx([nelbo, sde, nll], abs=1e-9)
        sums = [row.cells[name].summary.mean for name in ("gap", "variational", "sde_to_ode")]
        assert sums[0] == pytest.approx(sums[1] + sums[2], abs=1e-12)


def test_split_recovers_its_parts_and_its_checks(runs):
    table = build_studies(grid_of(runs))["gap_split"]
    for variant in VARIANTS:
        row = the_row(table, dataset="checkerboard", variant=variant)
        # the error of the chains, 4 / 64 and 1.5 / 64, is gone: 0.0625 would be seen
        assert row.cells["variational"].summary.mean == pytest.approx(VARIATIONAL[variant], abs=0.006)
        assert row.cells["sde_to_ode"].summary.mean == pytest.approx(SDE_TO_ODE[variant], abs=0.006)
        assert row.cells["grid_change"].summary.mean == pytest.approx(-SLOPES["sde"] / GRIDS[1])
        assert row.cells["chain_excess"].summary.mean == pytest.approx(SLOPES["nelbo"] / GRIDS[1])
    row = the_row(table, dataset="checkerboard", variant="ddpmpp-vp")
    values = list(row.cells["variational"].values.values())
    half = stats.t.ppf(0.975, 2) * stats.tstd(values) / math.sqrt(3)
    found = row.cells["variational"].summary
    assert (found.mean, found.half) == (pytest.approx(np.mean(values)), pytest.approx(half))
    assert row.cells["ess"].summary.mean == 10 + (IMAGES - 1) / 2
    assert row.extra["sde_se"] == pytest.approx(0.02 / math.sqrt(IMAGES))
    sizes = [row.extra[name] for name in ("images", "steps", "grids", "paths")]
    assert sizes == [IMAGES, GRIDS[1], 2, PATHS]
    limits = [fitted(folder_of(runs, seed=seed)) for seed in SEEDS]
    for name, (first, second) in {"gap": (0, 2), "variational": (0, 1), "sde_to_ode": (1, 2)}.items():
        errors = [stats.sem(one[first] - one[second]) for one in limits]
        assert row.extra[f"{name}_se"] == pytest.approx(np.mean(errors))


SPLIT_DAMAGE = {
    "cannot be read": lambda f: (f / "gap_split.csv").write_text("image,steps\n1\n"),
    "lacks the column ess": lambda f: (f / "gap_split.csv").write_text(
        "image,steps,paths,nelbo,sde,sde_se,ode,status\n" + 7 * "1," + "ok\n"
    ),
    "lacks the column ode": lambda f: (f / "gap_split.csv").write_text(
        "image,steps,paths,nelbo,sde,sde_se,ess,status\n" + 7 * "1," + "ok\n"
    ),
    "no rows": lambda f: write_study(f, "gap_split", []),
    "sde = nan": lambda f: change(f, "gap_split", lambda r: r[3].update(sde="nan")),
    "image = 1.5": lambda f: change(f, "gap_split", lambda r: r[3].update(image="1.5")),
    "no status": lambda f: change(f, "gap_split", lambda r: r[3].update(status="")),
    "a second row of 2, 32": lambda f: change(f, "gap_split", lambda r: r[3].update(image="2")),
    "different images": lambda f: change(f, "gap_split", lambda r: r.pop(0)),
    "differ in their number of paths": lambda f: change(f, "gap_split", lambda r: r[0].update(paths="8")),
    "sde is blank": lambda f: change(f, "gap_split", lambda r: r[3].update(sde="")),
    "1 of 40 rows: not defined: one path": lambda f: change(
        f, "gap_split", lambda r: r[3].update(status="not defined: one path", sde="")
    ),
    "and other grids, but not half as many": lambda f: change(
        f, "gap_split", lambda r: [row.update(steps="20") for row in r[:IMAGES]]
    ),
    "differ in the NLL of the ODE": lambda f: change(f, "gap_split", lambda r: r[3].update(ode="0.5")),
    "ode is blank": lambda f: change(f, "gap_split", lambda r: r[3].update(ode="")),
    "gap_split.csv missing": lambda f: (f / "gap_split.csv").unlink(),
    "trained but not evaluated": lambda f: (f / "likelihood.json").unlink(),
    "ODE failed": lambda f: edit(f, "likelihood.json", lambda r: r.update(status="ODE failed")),
}


@pytest.mark.parametrize("reason", SPLIT_DAMAGE)
def test_damaged_split_is_told_and_not_fatal(copy, reason):
    SPLIT_DAMAGE[reason](folder_of(copy))
    row = the_row(build_studies(grid_of(copy))["gap_split"], dataset="checkerboard", variant="ddpmpp-vp")
    for name in ("gap", "variational", "ess"):
        assert row.cells[name].summary.n == 2
        assert reason in row.cells[name].status and "(seed 0)" in row.cells[name].status
        assert str(copy) not in row.cells[name].status


def test_split_of_one_grid_has_its_values_and_images_have_no_split(copy):
    for seed in SEEDS:
        change(folder_of(copy, seed=seed), "gap_split", lambda r: [r.pop(0) for _ in range(IMAGES)])
        write_study(folder_of(copy, "indm-vp-nll", seed), "gap_split", [{"status": "not defined: these are images"}])
    grid = grid_of(copy)
    tables = build_studies(grid)
    row = the_row(tables["gap_split"], dataset="checkerboard", variant="ddpmpp-vp")
    for seed in SEEDS:
        rows = read(folder_of(copy, seed=seed), "gap_split")
        expected = np.mean([float(r["nelbo"]) - float(r["sde"]) for r in rows])
        assert row.cells["variational"].values[seed] == pytest.approx(expected, abs=1e-12)
    for name in ("grid_change", "chain_excess"):
        assert row.cells[name].summary is None and "one grid only" in row.cells[name].status
    captions = study_captions(tables, grid)["gap_split"]
    assert f"those of one grid of {GRIDS[1]} steps" in captions["checkerboard"]
    assert "two grids that share their paths" not in captions["checkerboard"]
    row = the_row(tables["gap_split"], dataset="checkerboard", variant="indm-vp-nll")
    assert {cell.status for cell in row.cells.values()} == {"not defined: these are images"}


def test_a_limit_is_not_averaged_with_a_grid(copy):
    change(folder_of(copy, seed=1), "gap_split", lambda r: [r.pop(0) for _ in range(IMAGES)])
    row = the_row(build_studies(grid_of(copy))["gap_split"], dataset="checkerboard", variant="ddpmpp-vp")
    assert row.cells["gap"].status.startswith("refused: seeds differ in gap_split.grids")


def test_caption_of_the_split_says_how_it_was_measured(runs):
    grid = grid_of(runs)
    caption = study_captions(build_studies(grid), grid)["gap_split"]["checkerboard"]
    source = (Path(bench.__file__).parent / "studies" / "gap_split.py").read_text()
    (draws,) = re.findall(r"^RESIDUAL_DRAWS = (\d+)$", source, re.M)
    for words in (
        "two grids that share their paths",
        f"{draws} draws of the residual",
        "heavy-tailed",
        "SE over images",
        "the ODE is the worse model",
        "a negative NELBO − NLL",
    ):
        assert words in caption
    assert "one grid" not in caption


def test_splits_measured_differently_are_refused(copy):
    change(folder_of(copy, seed=1), "gap_split", lambda r: [row.update(paths="8") for row in r])
    table = build_studies(grid_of(copy))["gap_split"]
    row = the_row(table, dataset="checkerboard", variant="ddpmpp-vp")
    assert row.cells["gap"].status.startswith("refused: seeds differ in gap_split.paths")
    assert row.extra["detail"] and not row.extra.get("gap_se")
    assert the_row(table, dataset="checkerboard", variant="indm-vp-nll").cells["gap"].summary.n == 3


# Other studies -----------------------------------------------------------------------------------------------------


def test_terms_over_seeds_and_whether_the_bound_holds(copy):
    def broken(rows):
        # two standard errors of 0.01 are allowed, and nothing for the floor of 0.05
        rows[0].update(tv=float(rows[0]["bound"]) + 0.025)
        rows[1].update(tv=float(rows[1]["bound"]) + 0.015)

    change(folder_of(copy, seed=1), "discretisation", broken)
    table = build_studies(grid_of(copy))["discretisation"]
    assert len(table.rows) == 2 * 2 * 2 * len(STEPS)
    keys = {"dataset": "checkerboard", "variant": "ddpmpp-vp", "sampler": "euler_maruyama"}
    row = the_row(table, **keys, steps=4)
    assert (row.extra["holds"], row.extra["holds_in"]) == ("no", "2 of 3")
    assert row.cells["slack"].values[1] == pytest.approx(-0.025)
    assert row.extra["se"] == pytest.approx(0.01 / math.sqrt(3))
    row = the_row(table, **keys, steps=8)
    assert (row.extra["holds"], row.extra["holds_in"]) == ("yes", "3 of 3")
    parts = sum(row.cells[name].summary.mean for name in ("prior", "estimation", "discretisation"))
    assert row.cells["bound"].summary.mean == pytest.approx(parts)


def test_bound_without_its_estimation_term_does_not_hold(copy):
    """The discretisation term of finite samples is about the floor: with the floor allowed too, nothing would show."""
    keys = {"dataset": "checkerboard", "variant": "ddpmpp-vp", "sampler": "euler_maruyama", "steps": 4}
    for estimation, held in ((0.09, "3 of 3"), (0.0, "2 of 3")):
        terms = {"prior": 0.001, "estimation": estimation, "discretisation": 0.055}
        found = {"tv": 0.12, "bound": sum(terms.values())} | terms
        change(folder_of(copy, seed=1), "discretisation", lambda rows, found=found: rows[0].update(found))
        assert the_row(build_studies(grid_of(copy))["discretisation"], **keys).extra["holds_in"] == held
    caption = study_captions(build_studies(grid_of(copy)), grid_of(copy))["discretisation"]["checkerboard"]
    assert "no more than two of its standard errors" in caption and "no evidence by itself" in caption


def test_terms_that_do_not_sum_to_the_bound_are_no_bound(copy):
    change(folder_of(copy, seed=1), "discretisation", lambda rows: rows[0].update(bound="3.0"))
    row = the_row(
        build_studies(grid_of(copy))["discretisation"],
        dataset="checkerboard",
        variant="ddpmpp-vp",
        sampler="euler_maruyama",
        steps=4,
    )
    for name in ("bound", "slack"):
        assert row.cells[name].summary.n == 2 and "the bound is 3" in row.cells[name].status
    assert row.cells["tv"].summary.n == 3 and row.extra["holds_in"] == "2 of 2"


def test_every_difference_has_its_standard_error_and_its_agreement(runs):
    table = build_studies(grid_of(runs))["conventions"]
    for (convention, quantity, units), (right, _, closed) in RULERS.items():
        row = the_row(table, dataset="swissroll", variant="indm-vp-nll", convention=convention, quantity=quantity)
        lines = [
            next(
                line
                for line in read(folder_of(runs, "indm-vp-nll", seed, "swissroll"), "conventions")
                if line["convention"] == convention
            )
            for seed in SEEDS
        ]
        differences, errors = ([float(line[name]) for line in lines] for name in ("difference", "se"))
        assert row.cells["difference"].summary.mean == pytest.approx(np.mean(differences))
        assert row.cells["difference"].summary.half == pytest.approx(
            stats.t.ppf(0.975, 2) * stats.tstd(differences) / math.sqrt(3)
        )
        assert row.extra["se"] == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / 3)
        assert row.cells["right"].summary.mean == pytest.approx(right) and row.extra["units"] == units
        if closed is None:
            assert "closed_form" not in row.cells and row.extra["agreement"] is None
            continue
        # the standard error of the mean deviation, from the three of each run, which are paired there
        variance = 3 * 0.01**2
        assert row.extra["agreement"] == pytest.approx(abs(np.mean(differences) - closed) * 3 / math.sqrt(variance))
        scores = [abs(d - closed) / 0.01 for d in differences]
        assert row.extra["agreement_worst"] == pytest.approx(max(scores))


def test_difference_without_error_or_beside_its_numbers_does_not_count(copy):
    change(folder_of(copy, seed=0), "conventions", lambda rows: rows[0].update(se=""))
    change(folder_of(copy, seed=1), "conventions", lambda rows: rows[0].update(difference="0.5"))
    row = the_row(
        build_studies(grid_of(copy))["conventions"],
        dataset="checkerboard",
        variant="ddpmpp-vp",
        convention="two-draw-residual",
    )
    assert list(row.cells["difference"].values) == [2]
    assert "without its standard error (seed 0)" in row.cells["difference"].status
    assert "the difference 0.5 (seed 1)" in row.cells["difference"].status


def test_convention_of_some_seeds_keeps_one_row(copy):
    def undefined(rows):
        rows[0] = {"convention": "two-draw-residual", "quantity": "NELBO", "status": "not defined: the flow failed"}

    change(folder_of(copy, seed=1), "conventions", undefined)
    row = the_row(
        build_studies(grid_of(copy))["conventions"],
        dataset="checkerboard",
        variant="ddpmpp-vp",
        convention="two-draw-residual",
    )
    assert row.cells["difference"].summary.n == 2 and row.extra["units"] == "nats"
    assert "not defined: the flow failed (seed 1)" in row.cells["difference"].status


def test_agreement_is_counted_in_standard_errors():
    assert agreement([(0.3, 0.1), (-0.1, 0.1)]) == {
        "agreement": pytest.approx(0.2 / math.sqrt(0.02)),
        "agreement_worst": pytest.approx(3.0),
    }
    assert agreement([(0.0, 0.0)] * 2)["agreement"] == "equal"
    assert agreement([(1e-9, 0.0)])["agreement"] == "different"
    assert agreement([(1e-9, 1e-12)], exact=1e-6)["agreement"] == "equal"
    assert agreement([(1.0, 0.0), (0.1, 0.1)])["agreement"] == "different"
    assert agreement([(0.0, 0.0), (0.2, 0.1)])["agreement"] == pytest.approx(2.0)
    assert agreement([]) == {"agreement": None, "agreement_worst": None}
    assert pooled([3.0, 4.0]) == 2.5 and pooled([1.0, None]) is None


def test_latents_and_identities(copy):
    change(folder_of(copy, seed=0), "identities", lambda rows: rows[0].update(value="1e-9"))
    tables = build_studies(grid_of(copy))
    row = the_row(tables["latents"], dataset="checkerboard", variant="ddpmpp-vp", time="0", quantity="variance")
    assert row.cells["value"].summary.mean == pytest.approx(0.9, abs=0.05)
    assert row.extra["se"] == pytest.approx(0.02 / math.sqrt(3)) and row.extra["n"] == 200
    equal = the_row(tables["identities"], dataset="checkerboard", variant="indm-vp-nll", claim="special-case")
    assert equal.extra["agreement"] == "equal"
    broken = the_row(tables["identities"], dataset="checkerboard", variant="ddpmpp-vp", claim="special-case")
    assert broken.extra["agreement"] == "different"  # nothing is random there: 1e-9 is not 0
    free = the_row(tables["identities"], dataset="checkerboard", variant="ddpmpp-vp", claim="debiased-time")
    assert set(free.cells) == {"value"} and free.extra["agreement"] is None


# Reading -----------------------------------------------------------------------------------------------------------


def test_read_study_gives_numbers_words_and_none(runs):
    rows = read_study(folder_of(runs), "conventions")
    assert rows[0]["right"] == 2.5 and rows[0]["n"] == 100 and rows[1]["closed_form"] is None
    assert rows[2]["difference"] is None and rows[2]["status"].startswith("not defined: ")
    with pytest.raises(FileNotFoundError):
        read_study(runs, "latents")


@pytest.mark.parametrize("name", STUDIES)
def test_forms_are_the_columns_that_studies_write(name):
    """The columns that the report reads are those of the study, which is read here without importing torch."""
    path = Path(bench.__file__).parent / "studies" / f"{name}.py"
    (columns,) = [
        node.value
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "COLUMNS"
    ]
    form = FORMS[name]
    assert set(ast.literal_eval(columns)) == {*form.keys, *form.columns, "status"}


def test_split_needs_no_study_that_nobody_asked_for(copy):
    for path in (copy / "toy2d").glob("*/*/*"):
        config = path / "config.yaml"
        config.write_text(config.read_text().split("  studies:")[0])
    for seed in SEEDS:
        (folder_of(copy, seed=seed) / "gap_split.csv").unlink()
    run = next(run for run in grid_of(copy).runs if run.folder == folder_of(copy))
    assert split_of(run) == "not asked for in this suite"
    table = build_studies(grid_of(copy))["gap_split"]
    row = the_row(table, dataset="checkerboard", variant="ddpmpp-vp")
    assert {cell.status for cell in row.cells.values()} == {"not asked for in this suite"}
