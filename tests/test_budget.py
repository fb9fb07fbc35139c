"""`indm-bench run --minutes`: pieces that end in good time, keep all they did, and together equal one run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import budget, cli
from bench.budget import left_of, pieces, seconds_to_work
from bench.config import load_suite
from bench.errors import InputError
from bench.files import file_hash
from bench.train import train

ROOT = Path(__file__).parents[1]
TINY = ["train.steps=6", "train.curve=1", "train.curve_images=4", "train.curve_samples=0", "train.checkpoint_every=2"]
TINY += ["evaluate.images=8", "evaluate.nelbo_times=2", "evaluate.studies.latents=null", "evaluate.samples=64"]
CHOSEN = ["smoke", "--variant", "indm-vp-glow", "--dataset", "checkerboard", "--workers", "1"]
COMMAND = ["run", *CHOSEN, *(word for setting in TINY for word in ("--set", setting))]


def use(patch, folder):
    """Send results, reports and checkpoints to ``folder``."""
    for variable, name in (("RUNS", "runs"), ("REPORTS", "reports"), ("CHECKPOINTS", "checkpoints")):
        patch.setenv(f"INDM_BENCH_{variable}", str(folder / name))


def results(folder):
    """Where the one run's results are."""
    return folder / "runs" / "smoke" / "indm-vp-glow" / "0" / "checkerboard"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The suite's one run in one go, where DVC can be neither imported nor executed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "bin").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        use(patch, folder)
        patch.setenv("PATH", str(folder / "bin"))
        patch.setenv("PYTHONPATH", str(ROOT))
        without = "import sys; sys.modules['dvc'] = None; from bench.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", without, *COMMAND], cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    return folder


def test_a_suite_is_run_to_its_report_without_dvc(whole):
    record = json.loads((results(whole) / "likelihood.json").read_text())
    assert record["status"] == "ok" and record["n"] == 8
    assert (whole / "reports" / "smoke" / "nll_nelbo_gap.csv").is_file()
    assert (whole / "reports" / "index.html").is_file()


def test_pieces_end_with_75_and_together_equal_one_run(whole, tmp_path, monkeypatch, capsys):
    """The deadline is of the suite's own steps: so many looks at the clock a piece, however fast the machine."""
    monkeypatch.chdir(ROOT)
    use(monkeypatch, tmp_path)
    looks, allowed = [0], 5
    from bench import stopping

    def remaining_looks():
        looks[0] += 1
        if looks[0] > allowed:
            stopping.request("time is up")
        return stopping._reason

    monkeypatch.setattr(stopping, "requested", remaining_looks)
    codes, said = [], ""
    for _ in range(40):
        looks[0] = 0
        codes.append(cli.execute([*COMMAND, "--minutes", "9"]))
        said += capsys.readouterr().out
        if codes[-1] != 75:
            break
        # the report is the last thing of all
        assert not (tmp_path / "reports" / "smoke" / "summary.json").exists()
    assert codes[-1] == 0 and codes.count(75) == len(codes) - 1 >= 2
    assert "smoke: 0 of 1 runs trained, 0 evaluated" in said and "1 of 1 runs trained, 0 evaluated" in said
    one, many = results(whole), results(tmp_path)
    assert file_hash(one / "weights" / "model.safetensors") == file_hash(many / "weights" / "model.safetensors")
    left, right = (np.load(folder / "per_image.npz") for folder in (one, many))
    assert all(np.array_equal(left[name], right[name], equal_nan=True) for name in left.files)
    # and once all is done, nothing is done again
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    looks[0] = -(10**6)
    assert cli.execute([*COMMAND, "--minutes", "9"]) == 0
    assert "smoke: 1 of 1 runs trained, 1 evaluated\n" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}


def test_a_piece_keeps_a_reserve():
    assert seconds_to_work(9) == 540 - budget.RESERVE_SECONDS
    assert seconds_to_work(0.5) == pytest.approx(30 * (1 - budget.RESERVE_SHARE))
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="--minutes .*accepted"):
            seconds_to_work(wrong)


def test_pieces_hold_the_work():
    useful = 540 - budget.RESERVE_SECONDS - budget.START_SECONDS
    assert pieces(useful, 9) == 1 and pieces(useful + 1, 9) == 2
    assert pieces(8 * useful, 9, workers=4) == 2


def test_what_is_left_is_told_from_the_files_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    use(monkeypatch, tmp_path)
    runs = load_suite("smoke", TINY).runs("ddpmpp-vp", dataset="checkerboard")
    assert len(runs) == 2
    empty = left_of(runs)
    assert (len(empty.train), len(empty.evaluate), empty.seconds) == (2, 2, None)
    assert empty.describe(9).endswith("how long the rest takes is not known yet")
    train(runs[0], progress=False)
    monkeypatch.setattr(budget, "is_evaluated", lambda run: run is runs[0])
    records = {"provenance.json": {"train_seconds": 100.0}, "likelihood.json": {"evaluate_seconds": 1000.0}}
    monkeypatch.setattr(budget, "read_json", lambda path: records[Path(path).name])
    left = left_of(runs)
    assert (left.train, left.evaluate, left.seconds) == ([runs[1]], [runs[1]], 1100.0)
    useful = 540 - budget.RESERVE_SECONDS - budget.START_SECONDS
    assert left.describe(9) == (
        f"1 of 2 runs trained, 1 evaluated; about 19 minutes left, {-(-1100 // useful):.0f} pieces of 9 minutes"
    )


def test_a_checkpoint_tells_the_pace_before_any_run_has_ended(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    use(monkeypatch, tmp_path)
    run = load_suite("smoke", TINY).runs("ddpmpp-vp", 0, "checkerboard")[0]
    folder = tmp_path / "checkpoints" / run.training_hash / "000000002"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"step": 2, "seconds": 10.0}))
    # a third of 30 s is done; the same variant's next run will take all of them
    assert budget._begun(run) == (pytest.approx(1 / 3), pytest.approx(30.0))
    other = run.model_copy(update={"seed": 1})
    monkeypatch.setattr(budget, "is_trained", lambda run: False)
    left = left_of([run, other])
    assert left.seconds is None  # of evaluation nothing is known
    assert budget._like(other, [run, other], {id(run): 30.0}) == 30.0


def test_minutes_that_are_none_are_refused_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    use(monkeypatch, tmp_path)
    assert cli.execute(["run", "smoke", "--minutes", "0"]) == 2
    captured = capsys.readouterr()
    assert "--minutes 0: accepted: a number above 0" in captured.err and not os.listdir(tmp_path)
