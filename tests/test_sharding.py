"""An evaluation on two processes, and one that is killed again and again, against one process that is left alone."""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sharding_script import COUNT, described, fragile, piece
from two_processes import launch, use

from bench import stopping
from bench.batches import Work
from bench.config import load_suite
from bench.data import load
from bench.evaluate import evaluate
from bench.features import train_classifier
from bench.files import read_json
from bench.pieces import Pieces
from bench.sharding import decode, encode, on_main, spread, team
from bench.train import train

HERE = Path(__file__).parent
VARIANT = "ddpmpp-vp"
OWN = {"checkerboard": [], "digits": ["model.score.nf=4", "model.score.ch_mult=[1]", "model.score.attn_resolutions=[]"]}
SETTINGS = [
    "train.steps=2",
    "train.curve=1",
    "train.curve_samples=0",
    "evaluate.images=11",
    "evaluate.rtol=0.1",
    "evaluate.atol=0.1",
    "evaluate.batch_size=13",
    "evaluate.likelihood_batch_size=4",
    "evaluate.samples=40",
    "evaluate.samplers=[{name: ddim, steps: [2, 3]}, {name: ode, rtol: 0.1, atol: 0.1}, {name: ancestral, steps: [2]}]",
    "evaluate.studies={gap_split: null, discretisation: null, conventions: null, identities: null}",
]
# of one evaluation: twice the NELBO, twice the NLL and the check of its tolerance, in 3 batches each; 4 rows, each of
# 4 batches and the row itself
PIECES = 3 * (2 + 3) + 4 * (4 + 1)


def run_of(dataset):
    """The run of VARIANT on a data set, in batches of 4 images and 13 samples."""
    return load_suite("smoke", [*SETTINGS, *OWN[dataset]]).runs(VARIANT, 0, dataset)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder whose runs/ holds the trained runs and the classifier."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        use(patch, folder)
        train_classifier(load("digits"), run_of("digits").features_file, epochs=1)
        for dataset in OWN:
            train(run_of(dataset), progress=False)
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of the trained runs in which a test evaluates."""
    use(monkeypatch, tmp_path)
    shutil.copytree(trained / "runs", tmp_path / "runs")
    yield tmp_path
    stopping.restore()


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """Folder with the evaluations of one process."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(trained / "runs", folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        use(patch, folder)
        for dataset in OWN:
            evaluate(run_of(dataset))
    return folder


@pytest.fixture(scope="module")
def two(trained, tmp_path_factory):
    """Folder with the evaluations of two processes, and what each of the two said of their messages."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(trained / "runs", folder / "runs")
    commands = []
    for dataset, own in OWN.items():
        words = [word for setting in [*SETTINGS, *own] for word in ("--set", setting)]
        commands.append(json.dumps(["evaluate", "smoke", VARIANT, "--seed", "0", "--dataset", dataset, *words]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch(folder, *torchrun, str(HERE / "sharding_script.py"), str(folder), *commands)
    return folder


def results(folder, dataset):
    """Where a run's results are below ``folder``."""
    return folder / "runs" / "smoke" / VARIANT / "0" / dataset


def assert_same_results(first, second, dataset):
    """All that an evaluation writes is equal bit for bit, but for its times; nothing unfinished is left."""
    left, right = results(first, dataset), results(second, dataset)
    assert {path.name for path in left.iterdir()} == {path.name for path in right.iterdir()}
    with np.load(left / "per_image.npz") as a, np.load(right / "per_image.npz") as b:
        assert set(a.files) == set(b.files) and len(a["nll"]) == 11
        assert all(np.array_equal(a[key], b[key]) for key in a.files)
    one, other = (read_json(folder / "likelihood.json") for folder in (left, right))
    assert one.pop("evaluate_seconds") > 0 and other.pop("evaluate_seconds") > 0 and one == other
    rows = [pd.read_csv(folder / "robustness.csv").drop(columns="seconds") for folder in (left, right)]
    pd.testing.assert_frame_equal(*rows, check_exact=True)
    metric = {"digits": "fd", "checkerboard": "energy"}[dataset]
    assert list(rows[0].index[rows[0][metric].notna()]) == [0, 1, 2, 3]
    for name in ("samples.png", "trajectory.png", "latents.csv"):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    assert not list((second / "checkpoints" / "evaluation").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("dataset", OWN)
def test_two_processes_evaluate_as_one(alone, two, dataset):
    assert_same_results(alone, two, dataset)


@pytest.mark.slow
def test_one_process_continues_what_two_have_begun(alone, two, tmp_path, monkeypatch):
    use(monkeypatch, tmp_path)
    shutil.copytree(two / "begun", tmp_path, dirs_exist_ok=True)
    (kept,) = (tmp_path / "checkpoints" / "evaluation").iterdir()
    found = len(list(kept.glob("*.npz")))
    whole, saved = Pieces.save, []
    monkeypatch.setattr(Pieces, "save", lambda self, *given: (whole(self, *given), saved.append(given)))
    evaluate(run_of("checkerboard"))
    assert found >= 4 + 4 and found + len(saved) == PIECES
    assert_same_results(alone, tmp_path, "checkerboard")


@pytest.mark.slow
def test_processes_share_the_work_and_all_get_the_results(two):
    first, second = said = [json.loads((two / f"messages-{rank}.json").read_text()) for rank in (0, 1)]
    expected = [[len(part["value"]), float(part["value"].sum()), k % 2, f"piece {k}"] for k, part in pieces()]
    for found in said:
        assert found["spread"] == found["afterwards"] == expected and found["nothing"] == []
        assert found["chunks"] == expected[:2]
        assert found["on main"] == [0, 1, math.inf, 0.1]  # within it the first process is on its own
    assert (first["main only"], second["main only"]) == (COUNT, 0)


def pieces():
    return [(k, piece(k)) for k in range(COUNT)]


@pytest.mark.slow
def test_failures_end_alike_in_every_process(two):
    first, second = (json.loads((two / f"messages-{rank}.json").read_text()) for rank in (0, 1))
    for found in (first, second):
        # that of the lowest number, as one process would have met it
        assert found["first failure"] == ["IntegrationError", "second"]
        assert found["failure elsewhere"] == ["NotDefined", "third"]
    assert first["fault"] == ["PeerFailed", "process 1 of 2: ValueError: a fault of the code"]
    assert second["fault"] == ["ValueError", "a fault\nof the code"]
    assert first["bad input"] == second["bad input"] == ["InputError", "train.steps: accepted: more"]
    assert second["fault of the first"] == ["PeerFailed", "process 0 of 2: OSError: disk full"]
    assert first["stopped"] == second["stopped"] == ["Stopped", "time is up"]
    assert [first["both"], second["both"]] == [["ValueError", f"fault of {rank}"] for rank in (0, 1)]
    # a quantity that some image spoils has the reason that one process gives
    expected = json.loads(json.dumps(fragile()))
    assert first["fragile"] == second["fragile"] == expected
    assert expected["reasons"]["nll"] == "unfinished in the batch of image 5"
    assert expected["reasons"]["chain"] == "not finite for 1 of 12 test samples" and expected["nelbo"]


def killed_after(run, count):
    """Evaluate in a forked process that is killed as soon as it has kept ``count`` more pieces; whether it was."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    code = 1
    try:
        whole, saved = Pieces.save, []

        def save(self, *arguments):
            whole(self, *arguments)
            saved.append(arguments)
            if len(saved) == count:
                os.kill(os.getpid(), signal.SIGKILL)

        Pieces.save = save
        evaluate(run)
        code = 0
    finally:
        os._exit(code)


def test_a_killed_evaluation_continues_with_what_it_kept(alone, here):
    run, kills = run_of("digits"), 0
    while killed_after(run, 9):
        kills += 1
    assert kills == PIECES // 9  # each was computed once
    assert_same_results(alone, here, "digits")
    evaluate(run)  # it is finished: nothing is computed again
    assert not list((here / "checkpoints" / "evaluation").iterdir())


def test_a_request_to_stop_is_heard_between_batches(alone, here, monkeypatch):
    run, saved = run_of("checkerboard"), []
    whole = Pieces.save

    def save(self, *arguments):
        whole(self, *arguments)
        saved.append(arguments)
        if len(saved) in (3, 20):
            stopping.request("test")

    monkeypatch.setattr(Pieces, "save", save)
    for expected in (3, 20):
        with pytest.raises(stopping.Stopped, match="test"):
            evaluate(run)
        assert len(saved) == expected and not (results(here, "checkerboard") / "likelihood.json").exists()
        stopping.restore()
    evaluate(run)
    assert_same_results(alone, here, "checkerboard")


def test_pieces_are_used_only_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.setenv("INDM_BENCH_CHECKPOINTS", str(tmp_path))
    kept, arrays = Pieces("hash", "weights", {"device": "cpu"}), {"x": np.arange(3.0)}
    kept.open()
    kept.save("nll rtol=1e-05", range(4, 8), arrays)
    assert np.array_equal(kept.load("nll rtol=1e-05", range(4, 8))["x"], arrays["x"])
    for name, rows in (("nll rtol=1e-04", range(4, 8)), ("nll rtol=1e-05", range(4, 7))):
        assert kept.load(name, rows) is None
    (path,) = kept.folder.glob("nll*.npz")
    same = Pieces("hash", "weights", {"device": "cpu"})
    same.open()
    assert same.load("nll rtol=1e-05", range(4, 8))
    other = Pieces("hash", "weights", {"device": "cuda"})
    assert other.folder == kept.folder and other.load("nll rtol=1e-05", range(4, 8)) is None
    for damage in (lambda data: data[:-30], lambda data: data[:90] + b"\x55" * 8 + data[98:], lambda data: b""):
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        assert kept.load("nll rtol=1e-05", range(4, 8)) is None
        path.write_bytes(whole)
    kept.forget("nll")
    assert path.exists()
    kept.forget("nll rtol=1e-05")
    assert not path.exists()
    kept.save("nelbo 0", range(4), arrays)
    other.open()  # evaluated on another kind of device: begun anew
    assert not list(other.folder.glob("*.npz"))


def test_a_single_process_is_a_team_of_its_own():
    assert (team().rank, team().size, team().main) == (0, 1, True)
    assert described(spread(2, piece)) == [[0, 0.0, 0, "piece 0"], [100, 4950.0, 0, "piece 1"]]
    assert on_main(lambda: object) is object  # nothing is sent
    assert spread(0, piece) == []


def test_arrays_are_sent_without_objects():
    sent = {"a": np.array([1.5, math.nan]), "text": np.array("é"), "none": np.zeros((0, 3), np.uint8)}
    found = decode(encode(sent))
    assert str(found["text"]) == "é" and found["none"].shape == (0, 3) and np.array_equal(found["a"], sent["a"], True)
    with pytest.raises(TypeError, match="objects"):
        encode({"x": np.array([{}])})


def test_progress_goes_from_nothing_to_all(capsys, monkeypatch):
    from bench import progress

    told = []
    monkeypatch.setattr(progress, "_listener", lambda done, total: told.append((done, total)))
    work = Work(costs={"nll": (10, 3.0), "ddim 2": (8, 2.0)}, label="run")
    work.batches("nll a", 5, 2, lambda rows: {"x": np.zeros(len(rows))}, quantity="nll")
    work.batches("ddim 2 x", 8, 8, lambda rows: {"x": np.zeros(len(rows))}, quantity="ddim 2")
    assert work._bar.n == pytest.approx(5 * 3 + 16)
    work.result("nll", lambda: ({"status": "ok"}, {}))  # what is left of a quantity counts as done when it ends
    assert work._bar.n == pytest.approx(46)
    work.close()
    assert told and all(total == 46 for _, total in told)
    assert Work()._bar is None and not Work().stoppable
