"""Provenance says what ran, and says nothing about who ran it or where."""

import getpass
import json
import os
import platform
import shutil
from pathlib import Path

import torch

from bench import provenance
from bench.files import write_json
from bench.step_costs import count_flops


def test_record_is_strict_json_with_all_fields(tmp_path):
    write_json(tmp_path / "p.json", provenance.record())
    found = json.loads((tmp_path / "p.json").read_text())
    assert set(found) == {
        *(
            "schema",
            "commit",
            "dirty",
            "packages",
            "device",
            "cpu",
            "cores",
            "threads",
            "python",
            "started",
            "peak_memory_mb",
        )
    }
    assert torch.__version__.startswith(found["packages"]["torch"].split("+")[0])
    assert found["packages"]["dvc"].startswith("3.")
    assert found["peak_memory_mb"] > 10 and found["cores"] >= 1 and found["threads"] == torch.get_num_threads()


def test_record_names_no_machine_no_user_no_path():
    text = json.dumps(provenance.record())
    for secret in (platform.node(), os.getcwd(), str(Path.home()), str(Path(provenance.__file__).parents[1])):
        assert secret not in text
    assert f'"{getpass.getuser()}"' not in text


def test_outside_git_the_commit_is_null(tmp_path, monkeypatch):
    copy = tmp_path / "bench" / "provenance.py"
    copy.parent.mkdir()
    shutil.copy(provenance.__file__, copy)
    monkeypatch.setattr(provenance, "__file__", str(copy))
    provenance.code_version.cache_clear()
    try:
        assert provenance.code_version() == (None, None)
    finally:
        provenance.code_version.cache_clear()


def test_a_changed_file_makes_the_version_dirty_and_a_report_does_not(tmp_path, monkeypatch):
    code, report = tmp_path / "bench" / "provenance.py", tmp_path / "reports" / "table.md"
    for path in (code, report):
        path.parent.mkdir()
        path.write_text("one")

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        assert provenance._git(tmp_path, *identity, *arguments) is not None

    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(code))

    def dirty():
        provenance.code_version.cache_clear()
        commit, changed = provenance.code_version()
        assert len(commit) == 40
        return changed

    try:
        assert dirty() is False
        report.write_text("two")
        assert dirty() is False
        code.write_text("two")
        assert dirty() is True
    finally:
        provenance.code_version.cache_clear()


def test_flops_of_a_linear_layer_forward_and_backward():
    # out = x W^T with x (5, 7), W (3, 7): 2*5*7*3 forward; backward once for W, once for x where it needs a gradient
    layer = torch.nn.Linear(7, 3, bias=False)
    assert count_flops(lambda: layer(torch.ones(5, 7))) == 2 * 5 * 7 * 3
    assert count_flops(lambda: layer(torch.ones(5, 7)).sum().backward()) == 2 * (2 * 5 * 7 * 3)
    x = torch.ones(5, 7, requires_grad=True)
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * (2 * 5 * 7 * 3)


def test_training_code_ignores_comments_but_no_change_of_meaning(tmp_path, monkeypatch):
    for name in ("models/sde.py", *(f"bench/{module}.py" for module in provenance.TRAINING_MODULES)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "bench" / "provenance.py"))

    def code(text):
        (tmp_path / "models" / "sde.py").write_text(text)
        provenance.training_code.cache_clear()
        return provenance.training_code()

    try:
        first = code("x = 1\n")
        assert code("x  =  1  # one\n") == first
        assert code("x = 2\n") != first
    finally:
        provenance.training_code.cache_clear()
