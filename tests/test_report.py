"""Reports on synthetic runs, from reading the files to the aggregated rows: traced back, refused, told."""

import json
import math
import shutil

import pytest
from scipy import stats
from synthetic_runs import VARIANTS, cell, edit, expected, tables, write_suite

from bench.errors import InputError
from bench.report import report_suite
from bench.report.cells import Cell, aggregate
from bench.report.load import load_runs

PLANE = ["checkerboard", "swissroll"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two suites: digits (images) and toy2d (two data sets of points)."""
    root = tmp_path_factory.mktemp("runs")
    write_suite(root, "digits", {"digits": False})
    write_suite(root, "toy2d", dict.fromkeys(PLANE, True), seeds=(0, 1))
    return root


@pytest.fixture
def copy(runs, tmp_path):
    """A copy of the digits runs to damage."""
    shutil.copytree(runs / "digits", tmp_path / "runs" / "digits")
    return tmp_path / "runs"


# Loading -----------------------------------------------------------------------------------------------------------


def test_expected_grid_and_folders_become_runs(runs):
    found = load_runs("digits", runs, expected("digits", ["digits"], seeds=(0, 1, 2, 3)) + expected("other", ["x"]))
    assert len(found) == 20
    assert {run.status for run in found if run.seed == 3} == {"run missing"}
    assert {run.status for run in found if run.seed < 3} == {"ok"}
    assert {run.dataset for run in load_runs("digits", runs)} == {"digits"}
    assert {(run.dataset, run.seed) for run in load_runs("toy2d", runs)} == {(d, s) for d in PLANE for s in (0, 1)}


def test_runs_beside_the_expected_ones_are_found(runs):
    found = load_runs("digits", runs, expected("digits", ["digits"], variants=["ddpmpp-vp"], seeds=(1,)))
    assert (found[0].variant, found[0].seed) == ("ddpmpp-vp", 1)
    assert len(found) == 15


@pytest.mark.parametrize(
    ("damage", "status"),
    [
        (lambda folder: (folder / "likelihood.json").unlink(), "trained but not evaluated"),
        (lambda folder: (folder / "likelihood.json").write_text("{"), "likelihood.json cannot be read"),
        (lambda folder: (folder / "likelihood.json").write_text("[]"), "not a JSON object"),
        (lambda folder: edit(folder, "likelihood.json", lambda r: r.update(schema=9)), "schema 9"),
        (lambda folder: edit(folder, "likelihood.json", lambda r: r.update(status="ODE failed")), "ODE failed"),
        (lambda folder: (folder / "robustness.csv").write_text("a,b\n1\n"), "does not fit the header"),
        (lambda folder: (folder / "failure.json").write_text('{"status": "diverged: step 3"}'), "diverged: step 3"),
        (lambda folder: (folder / "failure.json").write_text("?"), "training failed"),
    ],
)
def test_damaged_run_is_told_and_not_fatal(copy, damage, status):
    folder = copy / "digits" / "ddpmpp-vp" / "1"
    damage(folder)
    run = next(run for run in load_runs("digits", copy) if (run.variant, run.seed) == ("ddpmpp-vp", 1))
    assert status in run.status
    assert str(copy) not in run.status  # no machine path in a report
    assert tables(copy)["nll_nelbo_gap"].rows


def test_run_that_broke_off_at_once_belongs_to_the_suites_data_set(copy):
    folder = copy / "digits" / "ddpmpp-vp" / "9"
    folder.mkdir()
    (folder / "failure.json").write_text('{"status": "diverged: step 3"}')
    assert {run.dataset for run in load_runs("digits", copy)} == {"digits"}


def test_incomplete_expectation_is_refused(tmp_path):
    with pytest.raises(InputError, match="lacks seed"):
        load_runs("digits", tmp_path, [{"suite": "digits", "dataset": "digits", "variant": "a"}])
    with pytest.raises(InputError, match="no runs under"):
        report_suite("digits", tmp_path, tmp_path, [])


# Aggregation -------------------------------------------------------------------------------------------------------


def test_cells_are_the_files_numbers(runs):
    values = []
    for seed in (0, 1, 2):
        record = json.loads((runs / "digits" / "indm-vp-nll" / str(seed) / "likelihood.json").read_text())
        values.append(record["gap"]["corrected"]["total"])
    found = cell(tables(runs)["nll_nelbo_gap"], "gap_corrected", variant="indm-vp-nll").summary
    mean = sum(values) / 3
    half = stats.t.ppf(0.975, 2) * stats.tstd(values) / math.sqrt(3)
    assert (found.mean, found.half, found.n) == pytest.approx((mean, half, 3))


def test_aggregate_names_what_it_left_out():
    assert aggregate({0: 1.0, 1: 3.0}).summary.mean == 2.0
    partial = aggregate({0: 1.0, 1: "run missing", 2: "run missing"})
    assert (partial.summary.n, partial.status) == (1, "1 of 3 seeds; left out: run missing (seeds 1, 2)")
    assert aggregate({2: "run missing"}) == Cell(None, "not measured: run missing (seed 2)")
    assert aggregate({0: "not defined for 2-D data"}).status == "not defined for 2-D data"
    assert aggregate({0: 1.0}, "refused: seeds differ in n").summary is None


@pytest.mark.parametrize("value", [None, "NaN", True])
def test_number_that_is_none_is_never_averaged(copy, value):
    folder = copy / "digits" / "ddpmpp-vp" / "0"
    edit(folder, "likelihood.json", lambda r: r["nll"]["corrected"].update(total=value))
    found = cell(tables(copy)["nll_nelbo_gap"], "nll_corrected", variant="ddpmpp-vp")
    assert found.summary.n == 2
    assert "seed 0" in found.status


def test_parts_that_do_not_sum_to_the_total_are_no_measurement(copy):
    folder = copy / "digits" / "ddpmpp-vp" / "0"
    edit(folder, "likelihood.json", lambda r: r["nelbo"]["corrected"]["parts"].update(prior=0.2))
    found = cell(tables(copy)["nll_nelbo_gap"], "nelbo_corrected", variant="ddpmpp-vp")
    assert found.summary.n == 2
    assert "parts sum to" in found.status


def test_parts_table_sums_to_its_total(runs):
    for row in tables(runs)["likelihood_parts"].rows:
        parts = [value.summary.mean for name, value in row.cells.items() if name != "total"]
        assert sum(parts) == pytest.approx(row.cells["total"].summary.mean)
        assert ("reconstruction" in row.cells) == (row.keys["correction"] == "corrected")


def test_curve_that_ends_early_is_told(copy):
    path = copy / "digits" / "ddpmpp-vp" / "1" / "learning_curve.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    found = cell(tables(copy)["learning_curve"], "nelbo", variant="ddpmpp-vp", images=64000)
    assert found.summary.n == 2
    assert "the curve ends at 32000 (seed 1)" in found.status


def test_costs_are_per_step_and_timings_of_two_devices_do_not_mix(copy):
    table = tables(copy)["costs"]
    seconds = cell(table, "train_seconds", variant="ddpmpp-vp").values
    assert cell(table, "ms_per_step", variant="ddpmpp-vp").values == pytest.approx(seconds)  # 1000 steps
    edit(copy / "digits" / "ddpmpp-vp" / "1", "provenance.json", lambda r: r.update(device="NVIDIA X"))
    table = tables(copy)["costs"]
    assert cell(table, "ms_per_step", variant="ddpmpp-vp").status.startswith("refused: seeds differ in device")
    assert cell(table, "parameters_total", variant="ddpmpp-vp").summary.mean == 61000
    assert cell(table, "ms_per_step", variant="ncsnpp-ve").summary.n == 3


def test_evaluation_time_is_read_from_either_file(copy):
    folder = copy / "digits" / "ddpmpp-vp" / "0"
    edit(folder, "provenance.json", lambda r: r.pop("evaluate_seconds"))
    edit(folder, "likelihood.json", lambda r: r.update(evaluate_seconds=31.0))
    assert cell(tables(copy)["costs"], "evaluate_seconds", variant="ddpmpp-vp").values == {0: 31.0, 1: 20.0, 2: 20.0}


# Refusals ----------------------------------------------------------------------------------------------------------

CHANGES = {
    "data.hash": lambda r: r["data"].update(hash="0" * 64),
    "n": lambda r: r.update(n=100),
    "units": lambda r: r.update(units="nats"),
    "nll.rtol": lambda r: r["nll"].update(rtol=1e-3),
    "nll.solver": lambda r: r["nll"].update(solver="heun"),
    "nll.probes": lambda r: r["nll"].update(probes=1),
    "nelbo.times": lambda r: r["nelbo"].update(times=1),
    "protocol.eps": lambda r: r["protocol"].update(eps=1e-3),
    "protocol.dequantiser": lambda r: r["protocol"].update(dequantiser="variational"),
    "protocol.weights": lambda r: r["protocol"].update(weights="live"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_seeds_measured_differently_are_refused(copy, field):
    edit(copy / "digits" / "ddpmpp-vp" / "1", "likelihood.json", CHANGES[field])
    table = tables(copy)["nll_nelbo_gap"]
    found = cell(table, "nll_corrected", variant="ddpmpp-vp")
    assert found.summary is None
    assert found.status.startswith(f"refused: seeds differ in {field} ")
    assert cell(table, "nll_corrected", variant="indm-vp-nll").summary.n == 3


@pytest.mark.parametrize("field", CHANGES)
def test_variant_measured_differently_from_the_others_is_refused(copy, field):
    for seed in "012":
        edit(copy / "digits" / "ddpmpp-vp" / seed, "likelihood.json", CHANGES[field])
    table = tables(copy)["nll_nelbo_gap"]
    assert cell(table, "nll_corrected", variant="ddpmpp-vp").status.startswith(f"refused: {field} = ")
    assert {cell(table, "nll_corrected", variant=name).status for name in VARIANTS[1:]} == {"ok"}


def test_sampling_with_other_counts_or_features_is_refused(copy):
    path = copy / "digits" / "ddpmpp-vp" / "1" / "robustness.csv"
    path.write_text(path.read_text().replace(",256,", ",64,"))
    config = copy / "digits" / "indm-ve" / "0" / "config.yaml"
    config.write_text(config.read_text().replace("digits-cnn", "inception"))
    table = tables(copy)["step_robustness"]
    assert "seeds differ in n " in cell(table, "fd", variant="ddpmpp-vp", steps=8).status
    assert "seeds differ in evaluate.features" in cell(table, "fd", variant="indm-ve", steps=8).status
    assert cell(table, "fd", variant="indm-vp-nll", steps=8).summary.n == 3


def test_options_of_a_sampler_are_a_variants_own_affair(copy):
    for seed in "012":
        config = copy / "digits" / "ncsnpp-ve" / seed / "config.yaml"
        config.write_text(config.read_text().replace("1.0e-4", "1.0e-3"))
    assert cell(tables(copy)["step_robustness"], "fd", variant="ncsnpp-ve", steps=0).status == "ok"
    config.write_text(config.read_text().replace("1.0e-3", "1.0e-2"))
    found = cell(tables(copy)["step_robustness"], "fd", variant="ncsnpp-ve", steps=0)
    assert found.status.startswith("refused: seeds differ in sampler options")


def test_status_of_a_sampler_row_stands_where_its_number_would(copy):
    path = copy / "digits" / "ddpmpp-vp" / "1" / "robustness.csv"
    lines = path.read_text().splitlines()
    assert lines[1].startswith("euler_maruyama,8,8,256,")
    lines[1] = "euler_maruyama,8,8,256,5.0,,0.6,0.5,,,1.0,kid not measured: too few images; fd fine"
    lines[2] = "euler_maruyama,16,16,256,,,,,,,1.0,3 of 256 samples not finite"
    path.write_text("\n".join(lines) + "\n")
    table = tables(copy)["step_robustness"]
    assert cell(table, "fd", variant="ddpmpp-vp", steps=8).values[1] == 5.0
    assert (
        "left out: kid not measured: too few images (seed 1)" in cell(table, "kid", variant="ddpmpp-vp", steps=8).status
    )
    assert "3 of 256 samples not finite (seed 1)" in cell(table, "fd", variant="ddpmpp-vp", steps=16).status
