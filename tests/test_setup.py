"""The set-up: everything locked by hash, installed once, and refused clearly where it cannot work."""

import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bench import pipeline
from bench.config import load_suite, suite_files
from bench.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
LOCKS = ["requirements.lock", "requirements-uv.lock"]
REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.M)


def normal(name):
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(name="requirements.lock"):
    """Requirement -> version of a lock."""
    return {normal(key): version for key, version in REQUIREMENT.findall((ROOT / name).read_text())}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_a_hash_and_no_host_is_named(lock):
    text = (ROOT / lock).read_text()
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.M)[1:]
    assert entries and all("--hash=sha256:" in entry and "==" in entry.split()[0] for entry in entries)
    assert not re.search(r"https?:|file:|index-url|find-links|@ ", text)


def test_the_lock_covers_every_direct_dependency_and_is_what_is_installed():
    lines = (ROOT / "requirements.in").read_text().splitlines()
    direct = {normal(re.match(r"[A-Za-z0-9._-]+", line)[0]): line for line in lines if line and line[0] != "#"}
    versions = locked()
    for name, line in direct.items():
        assert name in versions, name
        if "==" in line:
            assert line.endswith(f"=={versions[name]}")
        assert importlib.metadata.version(name).split("+")[0] == versions[name]


def test_the_project_names_all_its_packages_and_its_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {path.parent.relative_to(ROOT) for top in ("bench", "models") for path in (ROOT / top).rglob("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == {".".join(path.parts) for path in found}
    assert project["project"]["scripts"] == {"indm-bench": "bench.cli:main"}
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


@pytest.fixture
def empty_machine(tmp_path):
    """A copy of what set-up reads, on a machine with a few basic tools; a Python can be added to its bin folder."""
    for name in ("Makefile", "requirements.in", "pyproject.toml", *LOCKS):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "cksum", "cut", "dirname", "mkdir", "rm", "touch"):
        (tools / tool).symlink_to(shutil.which(tool))
    make = shutil.which("make")

    def run():
        environment = {"PATH": str(tools), "HOME": str(tmp_path)}
        return subprocess.run(
            [make, "setup"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return tmp_path, run


def script(path, text):
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_without_a_python_or_with_an_old_one_setup_says_what_is_needed(empty_machine):
    folder, make = empty_machine
    done = make()
    assert done.returncode and "Python 3.11 or newer is needed" in done.stderr
    script(folder / "bin" / "python3", 'case "$1" in --version) echo Python 3.8.1;; *) exit 1;; esac')
    done = make()
    assert (
        done.returncode and "Python 3.11 or newer is needed: no python3.11, and python3 is Python 3.8.1" in done.stderr
    )
    assert not (folder / ".venv").exists()


def test_setup_installs_from_the_locks_once_and_again_when_they_change(empty_machine):
    folder, make = empty_machine
    log = folder / "log"
    tool = f'echo "${{0##*/}} $*" >> {log}'
    fake = 'mkdir -p .venv/bin; for n in python uv; do printf "%s" "$TOOL" > .venv/bin/$n; chmod +x .venv/bin/$n; done'
    (folder / "bin" / "chmod").symlink_to(shutil.which("chmod"))
    script(
        folder / "bin" / "python3.11",
        f"TOOL='#!{shutil.which('bash')}\n{tool}'\ncase \"$*\" in '-m venv .venv') {fake};; esac",
    )
    done = make()
    assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()
    assert any("--require-hashes -r requirements-uv.lock" in call for call in calls)
    assert any(call.startswith("uv pip install") and "--require-hashes -r requirements.lock" in call for call in calls)
    assert "--no-deps" in calls[-1] and calls[-1].endswith("-e .")

    make()
    assert log.read_text().splitlines() == calls, "the second run installed something"

    with open(folder / "requirements.lock", "a") as lock:
        lock.write("# changed\n")
    make()
    assert len(log.read_text().splitlines()) == 2 * len(calls)
    assert len(list((folder / ".venv").glob("installed-*"))) == 1


def test_where_uv_fails_pip_installs_the_same_lock(empty_machine):
    folder, make = empty_machine
    log = folder / "log"
    fake = (
        'mkdir -p .venv/bin; printf "%s" "$PIP" > .venv/bin/python; '
        'printf "%s" "$UV" > .venv/bin/uv; chmod +x .venv/bin/*'
    )
    (folder / "bin" / "chmod").symlink_to(shutil.which("chmod"))
    bash = shutil.which("bash")
    script(
        folder / "bin" / "python3.11",
        f"PIP='#!{bash}\necho \"$*\" >> {log}'\nUV='#!{bash}\nexit 1'\ncase \"$*\" in '-m venv .venv') {fake};; esac",
    )
    assert make().returncode == 0
    assert any(call.endswith("install --require-hashes -r requirements.lock") for call in log.read_text().splitlines())


def test_ci_is_a_runnable_script():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert "set -euo pipefail" in path.read_text()


# DVC ------------------------------------------------------------------------------------------------------------------


def test_pipeline_files_are_what_the_suites_ask_for(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert pipeline.outdated() == []


def test_every_suite_has_its_pipeline_and_every_variant_its_stages(monkeypatch):
    monkeypatch.chdir(ROOT)
    for suite in suite_files():
        file = "dvc.yaml" if suite in pipeline.LAPTOP else f"experiments/pipelines/{suite}/dvc.yaml"
        stages = read_yaml(file)["stages"]
        assert {f"references-{suite}", f"report-{suite}"} <= set(stages)
        for kind in ("train", "evaluate"):
            prefix = f"{kind}-{suite}"
            own = [stage for name, stage in stages.items() if name == prefix or name.startswith(f"{prefix}-")]
            assert sorted(v for stage in own for v in stage["matrix"]["variant"]) == sorted(load_suite(suite).variants)


def test_dependencies_of_every_stage_exist_or_are_made_by_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = read_yaml("dvc.yaml")["stages"]
    outs = []

    def expanded(name, paths):
        variants = stages[name]["matrix"]["variant"] if "matrix" in stages[name] else [""]
        return [path.replace("${item.variant}", variant) for path in paths for variant in variants]

    for name, stage in stages.items():
        outs += expanded(name, [next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"]])
    for name, stage in stages.items():
        for dependency in expanded(name, stage["deps"]):
            made = any(out == dependency or out.startswith(f"{dependency}/") for out in outs)
            assert made or Path(dependency).exists(), f"{name}: {dependency}"


def test_python_is_new_enough():
    assert sys.version_info >= (3, 11)
