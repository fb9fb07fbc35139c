"""The smoke suite, made smaller, from end to end through DVC in a copy of the project."""

import csv
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bench import repro
from bench.pipeline import TABLES
from bench.yaml_files import dump_yaml, read_yaml

ROOT = Path(__file__).parents[1]
PIPELINE = "experiments/pipelines/smoke/dvc.yaml"
VARIANTS = ["ddpmpp-vp", "indm-vp-fid"]
# the README's guide: a model of one's own and its entry in a suite
GUIDE = re.search(
    r"^## A variant of your own$.*?^```python\n(?P<model>.*?)^```$.*?^```yaml\n(?P<entry>.*?)^```$",
    (ROOT / "README.md").read_text(),
    flags=re.M | re.S,
)
GUIDED = "gaussian"
FILES = ["config.yaml", "learning_curve.csv", "likelihood.json", "per_image.npz", "provenance.json", "robustness.csv"]
SEALS = ["hashes-evaluate.json", "hashes-train.json"]
PICTURES = ["samples.png", "trajectory.png"]
STUDIES = {"checkerboard": ["gap_split", "latents"], "digits": ["latents"]}

pytestmark = pytest.mark.slow


class Project:
    """A copy of the project in a git repository of its own, with a smoke suite of one seed."""

    def __init__(self, folder):
        self.folder = folder
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        for name in listed.decode().split("\0"):
            if name and not name.startswith(("reports/smoke/", "tests/")) and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        self.edit(self._shrink)
        (folder / "models" / f"{GUIDED}.py").write_text(GUIDE["model"])
        # the console script of this environment, running this copy's code
        script = folder / "bin" / "indm-bench"
        script.parent.mkdir()
        script.write_text(f'#!{shutil.which("bash")}\nexec "{sys.executable}" -m bench.cli "$@"\n')
        script.chmod(0o755)
        paths = [str(script.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
        own = ("INDM_BENCH", "PYTEST", "GIT_")
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(own)}
        self.environment |= {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self("indm-bench", "pipeline")
        self("git", "init", "-q")
        self("git", "add", "-A")
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        self("git", *identity, "commit", "-q", "-m", "copy")

    def __call__(self, *command, check=True):
        """Run a command in the copy; what it printed."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout

    def edit(self, change):
        """Change the smoke suite's file."""
        path = self.folder / "experiments" / "smoke.yaml"
        suite = read_yaml(path)
        change(suite["smoke"])
        path.write_text(dump_yaml(suite))

    @staticmethod
    def _shrink(suite):
        suite["seeds"] = [0]
        suite["variants"] = {name: suite["variants"][name] for name in VARIANTS} | yaml.safe_load(GUIDE["entry"])
        suite.pop("more", None)
        for dataset, names in STUDIES.items():
            settings = suite["datasets"][dataset]["evaluate"]
            settings["studies"] = {name: settings["studies"][name] for name in names}

    def repro(self):
        """Reproduce the smoke suite: (exit code, what was printed)."""
        command = [sys.executable, "-m", "bench.repro", PIPELINE]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def table(self, name):
        """Rows of a table of the report."""
        with open(self.folder / "reports" / "smoke" / f"{name}.csv") as stream:
            return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project after one reproduction of its smoke suite."""
    made = Project(tmp_path_factory.mktemp("project"))
    made.code, made.said = made.repro()
    assert made.code == 0, made.said
    return made


def test_every_stage_ran_and_said_so(project):
    headings = re.findall(r"^\[stage (\d+) of (\d+), [^\]]+\] (\S+)", project.said, flags=re.M)
    expected = {"references-smoke", "features-smoke", "report-smoke"}
    expected |= {f"{stage}-smoke@{variant}" for stage in ("train", "evaluate") for variant in VARIANTS}
    expected |= {f"{stage}-smoke-{GUIDED}@{GUIDED}" for stage in ("train", "evaluate")}
    assert {name for _, _, name in headings} == expected
    assert [int(number) for number, _, _ in headings] == list(range(1, len(expected) + 1))
    assert "# Likelihood: NELBO, NLL and their gap" in project.said


@pytest.mark.parametrize("dataset", ["checkerboard", "digits"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_leaves_exactly_its_files(project, variant, dataset):
    folder = project.folder / "runs" / "smoke" / variant / "0" / dataset
    studies = {f"{name}.csv" for name in STUDIES[dataset]}
    assert {path.name for path in folder.iterdir()} == {*FILES, *SEALS, *PICTURES, *studies, "weights"}
    assert {path.name for path in (folder / "weights").iterdir()} == {"model.safetensors", "raw.safetensors"}
    record = json.loads((folder / "likelihood.json").read_text())
    assert record["status"] == "ok" and record["seed"] == 0 and record["variant"] == variant
    for name in ("nelbo", "nll"):
        for kind in ("corrected", "uncorrected"):
            part = record[name][kind]
            assert math.isfinite(part["total"]) and sum(part["parts"].values()) == pytest.approx(
                part["total"], abs=1e-5
            )
    with open(folder / "robustness.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert rows and all(row["status"] == "ok" for row in rows)
    provenance = json.loads((folder / "provenance.json").read_text())
    assert len(provenance["commit"]) == 40 and provenance["dirty"] is False
    assert str(project.folder) not in json.dumps(provenance)


def test_tables_hold_every_variant_and_the_references(project):
    found = {(row["dataset"], row["variant"]) for row in project.table("nll_nelbo_gap")}
    assert {(dataset, variant) for dataset in ("checkerboard", "digits") for variant in VARIANTS} <= found
    assert {("checkerboard", "exact density"), ("digits", "Gaussian, full covariance")} <= found


# the claims are about pairs of variants that were fixed beforehand
@pytest.mark.parametrize("table", [name for name in (*TABLES, "latents") if name != "claims"])
def test_a_model_of_ones_own_stands_in_every_table(project, table):
    """The guide of the README, followed to the letter: one file, one entry."""
    rows = [row for row in project.table(table) if row.get("variant") == GUIDED]
    # points have no grey levels
    assert {row["dataset"] for row in rows} == {"digits"} | ({"checkerboard"} if table != "discrete_bounds" else set())


def test_a_model_of_ones_own_is_measured_like_the_others(project):
    """Its NELBO is its NLL, and both are those of the best Gaussian of independent dimensions, or nearly."""
    rows = {row["dataset"]: row for row in project.table("nll_nelbo_gap") if row["variant"] == GUIDED}
    for row in rows.values():
        assert float(row["gap_corrected_mean"]) == pytest.approx(0, abs=1e-5)
    assert float(rows["checkerboard"]["nll_corrected_mean"]) > math.log(8)


def test_a_new_models_file_leaves_finished_runs_of_the_others_valid(project):
    path = project.folder / "models" / f"{GUIDED}.py"
    try:
        path.write_text(GUIDE["model"] + "\n# changed\n")
        assert {name.partition("@")[2] for name in changed_stages(project)} == {GUIDED}
    finally:
        path.write_text(GUIDE["model"])


def test_metrics_and_plots_are_shown_by_dvc(project, tmp_path):
    shown = json.loads(project("dvc", "metrics", "show", "--json", "reports/smoke/metrics.json"))
    scalars = shown[""]["data"]["reports/smoke/metrics.json"]["data"]
    assert math.isfinite(scalars["digits"]["ddpmpp-vp"]["nelbo_corrected"])
    project("dvc", "plots", "show", "--out", str(tmp_path / "plots"), check=False)
    page = (tmp_path / "plots" / "index.html").read_text()
    for title in ("learning curve", "gap", "step robustness"):
        assert f"smoke: {title}" in page
    assert "DVC_METRIC" not in page


def computed():
    """Seconds that this process's children have computed: other work beside the tests does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_second_reproduction_does_nothing_and_quickly(project):
    before = {path: path.stat().st_mtime_ns for path in (project.folder / "runs").rglob("*") if path.is_file()}
    started = computed()
    code, said = project.repro()
    assert code == 0 and "9 of 9 stages were up to date" in said
    assert computed() - started < 15
    assert before == {path: path.stat().st_mtime_ns for path in (project.folder / "runs").rglob("*") if path.is_file()}


def changed_stages(project):
    """Stages that DVC would run again."""
    status = json.loads(project("dvc", "status", "--json", PIPELINE))
    return {address.rpartition(":")[2] for address in status}


def test_a_changed_variant_is_the_only_one_to_run_again(project):
    assert changed_stages(project) == set()
    saved = (project.folder / "experiments" / "smoke.yaml").read_text()
    try:
        project.edit(lambda suite: suite["variants"]["ddpmpp-vp"].update(train={"clip": 2.0}))
        assert changed_stages(project) == {"train-smoke@ddpmpp-vp", "evaluate-smoke@ddpmpp-vp"}
        (project.folder / "experiments" / "smoke.yaml").write_text(saved)
        project.edit(lambda suite: suite["defaults"]["evaluate"].update(nelbo_times=5))
        assert changed_stages(project) == {
            *(f"evaluate-smoke@{variant}" for variant in VARIANTS),
            f"evaluate-smoke-{GUIDED}@{GUIDED}",
        }
    finally:
        (project.folder / "experiments" / "smoke.yaml").write_text(saved)


def test_a_failing_variant_loses_no_other_and_the_report_marks_it(project):
    """A new variant is one entry of the suite's file: no pipeline file changes. This one cannot but diverge."""
    hopeless = {"train": {"learning_rates": {"score": 1e30}, "clip": None}}
    project.edit(lambda suite: suite["variants"].update(hopeless=hopeless))
    code, said = project.repro()
    assert code == 1 and "not finite" in said and "report of smoke from the runs that succeeded" in said
    rows = {(row["dataset"], row["variant"]): row for row in project.table("nll_nelbo_gap")}
    assert rows["digits", "ddpmpp-vp"]["nelbo_corrected_mean"]
    assert not rows["digits", "hopeless"]["nelbo_corrected_mean"]
    assert "hopeless" in (project.folder / "reports" / "smoke" / "nll_nelbo_gap.md").read_text()


def test_clock():
    assert [repro.clock(seconds) for seconds in (0.4, 59.4, 59.6, 125)] == ["0 s", "59 s", "1 min 00 s", "2 min 05 s"]
