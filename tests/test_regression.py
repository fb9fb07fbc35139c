"""The quality gate: what must pass, and every way in which it must fail."""

import csv
import math
import random

import pytest
from scipy import stats

from bench.errors import InputError
from bench.files import write_hashed_json
from bench.regression import FLOOR, TABLES, compare, regression, tolerance
from bench.report.cells import Cell, Row, Table, aggregate
from bench.report.tables import TABLES as MADE
from bench.seals import report_hashes


def likelihood(values: dict[str, dict[int, float]], statuses: dict[str, str] | None = None) -> Table:
    """A likelihood table with corrected NLLs by variant and seed."""
    table = MADE["nll_nelbo_gap"]()
    for variant, seeds in values.items():
        cell = aggregate(seeds) if seeds else Cell(None, (statuses or {}).get(variant, "not measured: run missing"))
        keys = {"dataset": "digits", "kind": "run", "variant": variant}
        table.rows.append(Row(keys, {"nll_corrected": cell, "gap_corrected": aggregate({0: 0.05, 1: 0.06})}))
    return table


def folder(path, values, statuses=None):
    path.mkdir()
    for name, make in MADE.items():
        (likelihood(values, statuses) if name == "nll_nelbo_gap" else make()).write_csv(path / f"{name}.csv")
    write_hashed_json(path / "summary.json", {"hashes": report_hashes(path)})
    return path


BEFORE = {"ddpmpp-vp": {0: 2.60, 1: 2.62, 2: 2.61}, "indm-vp-nll": {0: 2.50, 1: 2.51, 2: 2.52}}


@pytest.fixture
def committed(tmp_path):
    return folder(tmp_path / "committed", BEFORE)


def changed(tmp_path, **values):
    return folder(
        tmp_path / "fresh", {name: values.get(name.replace("-", "_"), seeds) for name, seeds in BEFORE.items()}
    )


def kinds(differences):
    return [(difference.kind, difference.row.split(", ")[-1], difference.metric) for difference in differences]


def test_equal_tables_pass(committed, tmp_path):
    assert compare(committed, changed(tmp_path), "digits") == []


def test_every_table_of_the_report_is_compared_by_its_keys():
    assert {name: make().keys for name, make in MADE.items()} == TABLES


def test_rounding_passes(committed, tmp_path):
    fresh = changed(tmp_path, ddpmpp_vp={0: 2.6001, 1: 2.6199, 2: 2.6102})
    assert compare(committed, fresh, "digits") == []


@pytest.mark.parametrize(("shift", "word"), [(0.1, "above"), (-0.1, "below")])
def test_shift_fails_on_both_sides(committed, tmp_path, shift, word):
    fresh = changed(tmp_path, indm_vp_nll={seed: value + shift for seed, value in BEFORE["indm-vp-nll"].items()})
    (found,) = compare(committed, fresh, "digits")
    assert (found.kind, found.metric, found.fails) == ("changed", "nll_corrected", True)
    assert found.detail.startswith(word)
    assert abs(found.fresh - found.committed) > found.tolerance


def test_missing_row_fails_and_new_row_is_told(committed, tmp_path):
    fresh = folder(tmp_path / "fresh", {"ddpmpp-vp": BEFORE["ddpmpp-vp"], "diffflow": {0: 2.9, 1: 2.9, 2: 2.9}})
    differences = compare(committed, fresh, "digits")
    assert kinds(differences) == [("missing row", "indm-vp-nll", ""), ("new", "diffflow", "")]
    assert [difference.fails for difference in differences] == [True, False]


def test_absent_never_passes(committed, tmp_path):
    fresh = folder(
        tmp_path / "fresh", BEFORE | {"indm-vp-nll": {}}, {"indm-vp-nll": "not measured: diverged at step 3"}
    )
    (found,) = compare(committed, fresh, "digits")
    assert (found.kind, found.fails) == ("absent", True)
    assert "diverged at step 3" in found.detail


@pytest.mark.parametrize("text", ["nan", "inf", "", "refused"])
def test_what_is_no_number_is_absent(committed, tmp_path, text):
    fresh = changed(tmp_path)
    path = fresh / "nll_nelbo_gap.csv"
    rows = list(csv.DictReader(path.open()))
    rows[0]["nll_corrected_mean"] = text
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert kinds(compare(committed, fresh, "digits")) == [("absent", "ddpmpp-vp", "nll_corrected")]


def test_lost_seed_fails_although_the_mean_is_near(committed, tmp_path):
    fresh = changed(tmp_path, ddpmpp_vp={0: 2.60, 1: 2.62, 2: "diverged at step 9"})
    (found,) = compare(committed, fresh, "digits")
    assert (found.kind, found.fails) == ("absent", True)
    assert "2 of 3 seeds" in found.detail


def test_unmeasured_before_and_after_passes_and_newly_measured_is_told(tmp_path):
    before = folder(tmp_path / "before", BEFORE | {"indm-vp-nll": {}})
    same = folder(tmp_path / "same", BEFORE | {"indm-vp-nll": {}})
    assert compare(before, same, "digits") == []
    (found,) = compare(before, changed(tmp_path), "digits")
    assert (found.kind, found.fails) == ("new", False)


def test_lost_column_fails(committed, tmp_path):
    fresh = changed(tmp_path)
    path = fresh / "nll_nelbo_gap.csv"
    path.write_text(path.read_text().replace("nll_corrected_mean", "nll_corrected_average"))
    found = compare(committed, fresh, "digits")
    assert [difference.kind for difference in found] == ["absent", "absent"]


@pytest.mark.parametrize("side", ["committed", "fresh"])
def test_lost_table_fails(committed, tmp_path, side):
    fresh = changed(tmp_path)
    ({"committed": committed, "fresh": fresh}[side] / "costs.csv").unlink()
    (found,) = compare(committed, fresh, "digits")
    assert (found.kind, found.table, found.fails) == ("missing table", "costs", True)
    assert side in found.detail


def test_nothing_to_compare_fails(tmp_path):
    for name in ("committed", "fresh"):
        folder(tmp_path / name, {})
    (found,) = compare(tmp_path / "committed", tmp_path / "fresh", "digits")
    assert found.fails
    assert "no number of digits" in found.detail
    assert regression(tmp_path / "nowhere", tmp_path / "fresh", "digits", write=lambda text: None) == 1


def test_folder_is_not_compared_with_itself(committed, tmp_path):
    (tmp_path / "link").symlink_to(committed)
    with pytest.raises(InputError, match="the fresh report itself"):
        compare(committed, tmp_path / "link", "digits")


def test_tolerance_is_student_s_prediction_interval():
    assert tolerance(0.3, 4, 3, 5) == pytest.approx(stats.t.ppf(0.975, 4) * 0.3 * math.sqrt(1 / 3 + 1 / 5))
    assert tolerance(0.0, 0, 1, 1) == 0.0


def test_one_seed_is_held_to_the_floor(tmp_path):
    before = folder(tmp_path / "before", {"ddpmpp-vp": {0: 2.6}})
    near = folder(tmp_path / "near", {"ddpmpp-vp": {0: 2.6 * (1 + 0.9 * FLOOR)}})
    far = folder(tmp_path / "far", {"ddpmpp-vp": {0: 2.6 * (1 + 1.2 * FLOOR)}})
    assert compare(before, near, "digits") == []
    assert kinds(compare(before, far, "digits")) == [("changed", "ddpmpp-vp", "nll_corrected")]


def test_false_alarms_are_as_rare_as_promised(tmp_path):
    # new seeds of the same distribution, without the floor's help: wide spread, mean near zero
    draw = random.Random(5)
    alarms = trials = 0
    for _ in range(1500):
        pooled, fresh_means, means = 0.0, [], []
        for _ in range(4):
            seeds = [draw.gauss(0, 1) for _ in range(2)]
            means.append(sum(seeds) / 2)
            pooled += (seeds[0] - seeds[1]) ** 2 / 2
            fresh_means.append(sum(draw.gauss(0, 1) for _ in range(2)) / 2)
        allowed = tolerance(math.sqrt(pooled / 4), 4, 2, 2)
        trials += 4
        alarms += sum(abs(a - b) > allowed for a, b in zip(means, fresh_means))
    assert alarms / trials == pytest.approx(0.05, abs=0.015)


def test_seconds_of_another_machine_pass_but_must_be_there(tmp_path):
    def costs(path, seconds):
        folder(path, BEFORE)
        table = MADE["costs"]()
        cells = {"train_seconds": aggregate({0: seconds}), "parameters_total": aggregate({0: 61000.0})}
        table.rows.append(Row({"dataset": "digits", "variant": "ddpmpp-vp"}, cells))
        table.write_csv(path / "costs.csv")
        return path

    before = costs(tmp_path / "before", 10.0)
    assert compare(before, costs(tmp_path / "slow", 1000.0), "digits") == []
    lost = compare(before, costs(tmp_path / "lost", "not recorded"), "digits")
    assert kinds(lost) == [("absent", "ddpmpp-vp", "train_seconds")]


def test_printed_table_and_exit_status(committed, tmp_path):
    lines = []
    fresh = changed(tmp_path, indm_vp_nll={0: 3.0, 1: 3.0, 2: 3.0})
    assert regression(committed, fresh, "digits", write=lines.append) == 1
    text = "".join(lines)
    assert "FAIL" in text and "indm-vp-nll" in text and "nll_corrected" in text and "1 failure, 0 notices" in text
    lines.clear()
    same = folder(tmp_path / "same", BEFORE)
    assert regression(committed, same, "digits", write=lines.append) == 0
    assert lines == ["digits: 0 failures, 0 notices\n"]
