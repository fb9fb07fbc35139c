"""Suites, `--set` and the YAML beneath them: damaged text, hostile values at every place, bombs, tags."""

from __future__ import annotations

import os
from pathlib import Path

import harness
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench.config import load_suite, read_run
from bench.errors import InputError
from bench.overrides import parse_overrides
from bench.yaml_files import dump_yaml, parse_yaml, read_yaml

ROOT = Path(__file__).parents[2] / "experiments"
TEXT = {name: (ROOT / f"{name}.yaml").read_text() for name in ("toy2d", "digits", "smoke")}


def single(name: str, variant: str) -> dict:
    """A real suite with one of its variants and data sets."""
    content = read_yaml(ROOT / f"{name}.yaml")[name]
    own = content["variants"] | (content.get("more") or {}).get("variants", {})
    chosen = {key: value for key, value in (own[variant] or {}).items() if key != "datasets"}
    few = {"variants": {variant: chosen}, "datasets": dict(list(content["datasets"].items())[:1])}
    return {key: value for key, value in content.items() if key != "more"} | few


SUITES = [
    single(name, variant)
    for name, variants in (
        ("smoke", ("indm-vp-nll", "ddpmpp-vp", "diffflow", "sbp-dsb", "ddpm", "ncsn")),
        ("toy2d", ("indm-vp-nll", "sbp-fbsde")),
        ("digits", ("indm-ve",)),
    )
    for variant in variants
    if variant in read_yaml(ROOT / f"{name}.yaml")[name]["variants"]
    or variant in (read_yaml(ROOT / f"{name}.yaml")[name].get("more") or {}).get("variants", {})
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    return tmp_path


def resolve(text: str | bytes, overrides: tuple[str, ...] = ()) -> None:
    Path("experiments/fuzzed.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "replace"))
    suite = load_suite("fuzzed", overrides)
    suite.count()
    for run in suite.runs(suite.variants[0], None, suite.datasets[0])[:1]:
        assert run.hash and run.training_hash and run.folder
        run.resolved()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)
MERGES = "a: &a {k0: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a}, *{a}, *{a}, *{a}], {b}: 1}}\n"
    for a, b in zip("abcdefghijklmnopqrstu", "bcdefghijklmnopqrstuv")
)


@harness.cases(1.5)
@given(content=st.sampled_from(SUITES).flatmap(harness.mutated))
def test_hostile_values_in_suites(content):
    try:
        text = dump_yaml({"fuzzed": content})
    except Exception:  # noqa: BLE001 - what cannot be written as YAML cannot be read either
        return
    harness.attempt("configuration values", lambda: resolve(text))


@harness.cases(0.5)
@given(
    text=st.sampled_from(sorted(TEXT)).flatmap(
        lambda name: harness.damaged(TEXT[name].replace(f"{name}:", "fuzzed:", 1).encode())
    )
)
@example(text=b"fuzzed: " + b"[" * 5000)
@example(text=b"fuzzed: " + b"{a: " * 80 + b"}" * 80)
@example(text=BOMB.encode())
@example(text=MERGES.encode())
@example(text=b"fuzzed: &a [*a]")
@example(text=b"fuzzed: !!int x")
@example(text=b"fuzzed: !!timestamp x")
@example(text=b"fuzzed: !!bool x")
@example(text=b"fuzzed: !!float x")
@example(text=b"fuzzed: !!binary '*'")
@example(text=b"fuzzed: !!omap [1]")
@example(text=b"fuzzed: !!python/object/apply:os.system [touch executed]")
@example(text=b"fuzzed: !!python/name:os.system")
@example(text=b"fuzzed: " + b"9" * 5000)
@example(text=b"\xff\xfe\0")
@example(text=b"? {a: 1}\n: 2\n")
@example(text=b"? [a]\n: 2\n")
@example(text=b"fuzzed:\n  a: 1\n  a: 2\n")
@example(text=b"--- 1\n--- 2\n")
@example(text=b"#" * 2**19)
def test_damaged_suites(text):
    harness.attempt("configuration text", lambda: resolve(text))
    assert not os.path.exists("executed")


KEYS = st.sampled_from(
    ["train.steps", "model.name", "model.flow.name", "model.score.width", "model.sde.beta_max", "evaluate.samplers"]
    + ["evaluate.studies.gap_split.steps", "train.learning_rates.score", "evaluate.probes", "train.betas", "model"]
    + ["train", "..", "", "a.b", "train.steps.x", "model.flow.blocks", "model.score.depth", "evaluate.quality"]
)
SETTINGS = st.builds(
    lambda key, equals, value: f"{key}{equals}{value}",
    KEYS,
    st.sampled_from(["=", "=", "=", "==", "", " = "]),
    harness.VALUES.map(repr) | harness.TEXTS | st.sampled_from(["[1, 2", "{a: b", "&a [*a]", ".nan", "1_000", "0x10"]),
)


@harness.cases(1.0)
@given(texts=st.lists(SETTINGS, min_size=1, max_size=3).map(tuple))
@example(texts=("model.flow.blocks=1000000000",))
@example(texts=("model.score.depth=1000000000",))
@example(texts=("model.score.width=1000000000000",))
@example(texts=("train.learning_rates.score=1" + "0" * 400,))
@example(texts=("train.steps=" + "9" * 5000,))
@example(texts=("train.steps=!!python/object/apply:os.system [true]",))
def test_overrides(texts):
    harness.attempt("--set", lambda: parse_overrides(texts))
    harness.attempt("--set", lambda: resolve(dump_yaml({"fuzzed": SUITES[0]}), texts))


@pytest.fixture(scope="module")
def run_text():
    old = os.getcwd()
    try:
        os.chdir(ROOT.parent)
        return load_suite("smoke").runs("indm-vp-nll")[0].resolved()
    finally:
        os.chdir(old)


@harness.cases(0.5)
@given(data=st.data())
def test_a_runs_own_configuration(run_text, data):
    content = data.draw(harness.mutated(run_text))
    Path("run").mkdir(exist_ok=True)
    try:
        Path("run/config.yaml").write_text(dump_yaml(content))
    except Exception:  # noqa: BLE001 - what cannot be written as YAML cannot be read either
        return
    harness.attempt("run configuration", lambda: read_run(Path("run")).hash)


def test_bombs_are_refused_before_they_unfold():
    for text in (BOMB, MERGES, "a: &a [*a]", "a: &a {b: [*a]}"):
        with pytest.raises(InputError, match="^bomb.yaml: "):
            with harness.limited(5.0):
                parse_yaml(text, "bomb.yaml")
    assert parse_yaml("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: [*a, *a]}", "fine") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": [{"b": 1}, {"b": 1}]},
    }
