"""No path leaves its folder, no page runs a script, nothing is fetched unasked, and what is fetched is verified."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from synthetic_runs import Page, expected, write, write_run
from untrusted_files import OWN, ROOT, SOURCES, put, saved

from bench import cli
from bench.config import load_suite, read_run
from bench.data import load
from bench.errors import InputError
from bench.fidelity import INCEPTION_SHA256, image_quality
from bench.importing.pretrained import load_pretrained
from bench.report import report_index, suite
from bench.yaml_files import parse_yaml

# --- paths


def test_names_from_configurations_stay_below_their_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "experiments" / "smoke.yaml").read_text()
    for old, new in (("indm-vp-nll:", "../../escaped:"), ("indm-vp-nll:", "a/b:"), ("checkerboard:", "../escaped:")):
        put(tmp_path / "experiments" / "smoke.yaml", text.replace(old, new, 1).encode())
        with pytest.raises(InputError):
            load_suite("smoke").runs()
    put(tmp_path / "experiments" / "smoke.yaml", text.encode())
    for name in ("../smoke", str(tmp_path / "experiments" / "smoke"), "smoke/../smoke", "."):
        assert cli.execute(["train", name, "indm-vp-nll"]) == 2
    for key, value in (("suite", "../../s"), ("variant", "../v"), ("variant", "/v"), ("seed", "-1")):
        lines = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in OWN.splitlines()]
        put(tmp_path / "run" / "config.yaml", "\n".join(lines).encode())
        with pytest.raises(InputError, match=key):
            read_run(tmp_path / "run")
    capsys.readouterr()
    for name in ("../x", "/x", "a/b", ""):
        line = ["evaluate", "smoke", "--pretrained", str(tmp_path), "--name", name, "--dataset", "checkerboard"]
        assert cli.execute(line) == 2
        assert "--name" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experiments", "run"]


def test_a_configuration_from_elsewhere_reads_no_folder_of_its_choice(tmp_path):
    put(tmp_path / "own" / "config.yaml", OWN.replace("gaussians", f"folder:{tmp_path}").encode())
    put(tmp_path / "own" / "model.safetensors", b"x")
    with pytest.raises(InputError, match="dataset = .*accepted"):
        load_pretrained(tmp_path / "own")


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_archives_write_nothing(tmp_path, kind):
    outside = tmp_path / "outside.png"
    data = tmp_path / "data"
    data.mkdir()
    with tarfile.open(data / "cifar10-jpeg.tar.xz", "w:xz") as archive:
        for name in ("../outside.png", str(outside), "link.png"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member, io.BytesIO())
    with pytest.raises(InputError):
        load("cifar10-jpeg", data)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "cifar10-jpeg.tar.xz"]


# --- the report

NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> | a\n# [x](javascript:alert(1)) `y` {{ 7*7 }}"


def test_the_report_shows_hostile_words_as_words(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "draw_all", lambda *_: [])
    grid = expected("digits", ["digits"], ("ddpmpp-vp", NASTY), (0,))
    folder = tmp_path / "runs" / "digits" / "ddpmpp-vp" / "0"
    write_run(folder, "digits", "digits", "ddpmpp-vp", 0, False)
    broken = tmp_path / "runs" / "digits" / "broken" / "0"
    broken.mkdir(parents=True)
    write(broken, "failure.json", {"status": NASTY})
    header = "model,dataset,metric,value,detail,source,trust,note\n"
    cell = '"' + NASTY.replace('"', '""') + '"'
    put(tmp_path / "reports" / "reference.csv", f"{header}INDM,CIFAR-10,nll,3,{cell},{cell},primary,{cell}\n".encode())
    references = {"digits": {NASTY: {"nll": 2.5, "units": "bits/dim", "note": NASTY}}}
    put(tmp_path / "reports" / "digits" / "references.json", json.dumps(references).encode())
    suite.report_suite("digits", tmp_path / "runs", tmp_path / "reports", grid, NASTY, NASTY)
    report_index(tmp_path / "reports")
    text = (tmp_path / "reports" / "index.html").read_text()
    page = Page(text)
    assert "alert(1)" in "".join(page.text) and "49" not in [part.strip() for part in page.text]
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form"), tag
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "src"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    policy = [a for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and "default-src 'none'" in policy[0]["content"]
    for path in (tmp_path / "reports" / "digits").glob("*.md"):
        written = path.read_text()
        assert "<script" not in written and "<img" not in written, path.name
        assert not re.search(r"(?<!\\)\]\(javascript", written), path.name
        for line in written.splitlines():
            assert not line.startswith("# [x]")


# --- the network


def test_nothing_is_fetched_unasked(tmp_path, monkeypatch, capsys):
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setenv("INDM_BENCH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("INDM_BENCH_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(suite, "draw_all", lambda *_: [])
    monkeypatch.chdir(ROOT)
    assert cli.execute(["list"]) == 0
    assert load_suite("smoke").runs("ddpmpp-vp")
    write_run(tmp_path / "runs" / "digits" / "ddpmpp-vp" / "0", "digits", "digits", "ddpmpp-vp", 0, False)
    suite.report_suite("digits", tmp_path / "runs", tmp_path / "reports", [])
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    assert "not found" in image_quality(images, images, "inception")["status"]
    with pytest.raises(InputError):
        image_quality(images, images, "vgg16")
    with pytest.raises(InputError, match="nothing found"):
        load("cifar10", tmp_path)
    with pytest.raises(InputError):
        load_pretrained(Path("google/ddpm-cifar10-32"))
    assert not asked


def test_imports_fetch_nothing():
    """Every module, in a process whose sockets are taken away."""
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in SOURCES]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = (
        "import socket, importlib, sys\n"
        "def refuse(*a, **k): sys.exit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
        f"for name in {names}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_downloads_and_published_weights_are_verified_by_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **options: asked.append(options))
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    image_quality(images, images, "inception", weights="download")
    assert asked[0]["hash_prefix"] == INCEPTION_SHA256 and len(INCEPTION_SHA256) == 64
    put(tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth", saved({"a": torch.zeros(1)}))
    with pytest.raises(InputError, match=f"sha256 .*accepted: {INCEPTION_SHA256}"):
        image_quality(images, images, "inception")


def test_aliases_of_yaml_are_still_read():
    assert parse_yaml("a: &a {b: 1}\nc: *a\n", "text") == {"a": {"b": 1}, "c": {"b": 1}}


# --- the audit of the locked packages


def audit_script():
    loader = importlib.machinery.SourceFileLoader("audit", str(ROOT / ".ci" / "audit"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("audit", loader))
    loader.exec_module(module)
    return module


def test_the_audit_fails_on_a_vulnerability_and_goes_on_without_network(monkeypatch, capsys):
    module = audit_script()
    found = {"id": "PYSEC-1", "fix_versions": ["2"]}
    skipped = {"name": "b", "skip_reason": "not found"}
    for reach, packages, code, words in (
        (False, [], 0, "not audited: no network"),
        (True, [skipped], 0, "not audited: no network"),
        (True, [skipped, {"name": "a", "version": "1", "vulns": []}], 0, "audited 1 of 2"),
        (True, [skipped, {"name": "a", "version": "1", "vulns": [found]}], 1, "1 vulnerable"),
    ):
        monkeypatch.setattr(module, "reachable", lambda url, reach=reach: reach)
        monkeypatch.setattr(module, "audited", lambda service, packages=packages: packages)
        assert module.main() == code
        assert words in capsys.readouterr().out
    monkeypatch.setattr(module, "audited", lambda service: json.loads("no JSON"))
    assert module.main() == 1
