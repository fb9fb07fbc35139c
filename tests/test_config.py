"""A suite is refused in one line that names key, value and what is accepted; a good one resolves to what it says."""

import json
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import config
from bench.config import load_suite
from bench.errors import InputError
from bench.options import Invalid, resolve_component, signature_schema, validate
from bench.overrides import merge, parse_overrides
from bench.settings import LEARNING_RATES, TrainConfig
from bench.yaml_files import dump_yaml, parse_yaml

SUITE = """\
tiny:
  title: "Tiny"
  seeds: [0, 3]
  datasets:
    checkerboard: {model: {score: {name: mlp, width: 8, depth: 1}}, evaluate: {quality: [energy]}}
    digits:
      model: {score: {name: ncsnpp, nf: 8, ch_mult: [1, 1], num_res_blocks: 1, attn_resolutions: []}}
      evaluate: {quality: [fd], features: classifier, samples: 64}
  defaults:
    model: {name: indm, sde: {name: vp}, flow: {name: identity}}
    train: {batch_size: 10, steps: 100, learning_rates: {score: 1e-3}}
    evaluate: {samplers: [{name: ddim, steps: [4]}]}
  variants:
    plain:
    flowing:
      datasets:
        checkerboard: {model: {flow: {name: residual, blocks: 1, hidden: 4}}}
        digits: {model: {flow: {name: residual, blocks: [1, 1], hidden: 4}}}
    exploding: {model: {sde: {name: ve}}}
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Write a suite into an empty project; returns a function (text, overrides) -> Suite."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()

    def write(text=SUITE, overrides=()):
        (tmp_path / "experiments" / "tiny.yaml").write_text(text)
        return load_suite("tiny", overrides)

    return write


def refusal(action):
    """The message of the InputError that ``action`` must raise; always one line."""
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_runs_are_the_grid_of_variants_seeds_and_data_sets(suite):
    runs = suite().runs()
    assert len(runs) == 3 * 2 * 2
    assert len({run.hash for run in runs}) == len({run.folder for run in runs}) == len(runs)
    assert [run.folder.as_posix() for run in suite().runs("plain", 3)] == [
        "runs/tiny/plain/3/checkerboard",
        "runs/tiny/plain/3/digits",
    ]
    assert [run.seed for run in suite().runs("plain", dataset="digits")] == [0, 3]


def test_folder_of_a_single_data_set_and_another_root(suite, monkeypatch):
    monkeypatch.setenv("INDM_BENCH_RUNS", "elsewhere")
    text = SUITE.replace("checkerboard: {model: {score", "swissroll: {model: {score").split("    digits:")[0]
    text += "  defaults:" + SUITE.split("  defaults:")[1].split("    flowing:")[0]
    assert suite(text).runs()[0].folder.as_posix() == "elsewhere/tiny/plain/0"


def test_layers_merge_in_order_and_a_new_name_replaces_the_component(suite):
    plain, _, flowing, digits = suite().runs("plain", 0) + suite().runs("flowing", 0)
    assert plain.model["flow"] == {"name": "identity"}
    assert flowing.model["flow"]["blocks"] == 1 and digits.model["flow"]["blocks"] == [1, 1]
    assert plain.model["score"]["width"] == 8 and plain.train.learning_rates == LEARNING_RATES | {"score": 1e-3}
    exploding = suite(SUITE, ["model.sde.sigma_max=9"]).runs("exploding", 0)[0]
    # no beta of the default VP process survives the change of name
    assert exploding.model["sde"] == {"name": "ve", "sigma_min": 0.01, "sigma_max": 9.0, "eps": 1e-5}


def test_hash_follows_the_meaning_not_the_spelling(suite):
    def run(text=SUITE, overrides=()):
        return suite(text, overrides).runs("plain", 0)[0]

    one = run()
    assert (
        run(SUITE.replace("learning_rates: {score: 1e-3}", "ema: 0.999, learning_rates: {score: 0.001}")).hash
        == one.hash
    )
    assert run(overrides=["train.steps=100"]).hash == one.hash
    assert run(overrides=["train.steps=101"]).hash != one.hash
    other = run(overrides=["evaluate.rtol=1e-3"])
    assert other.hash != one.hash and other.training_hash == one.training_hash


def test_a_written_configuration_reads_back_equal(suite):
    run = suite(overrides=["train.learning_rates.score=1e-5"]).runs("flowing", 0)[1]
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(config.dump_config(run))
    back = config.read_run(run.folder)
    assert back == run and back.hash == run.hash and back.folder == run.folder


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stpes=3", "--set train.stpes: unknown key; accepted: batch_size, steps, warmup"),
        ("train.learning_rates.score=-0.1", "--set train.learning_rates.score = -0.1: must be greater than 0"),
        (
            "train.learning_rates.sorce=0.1",
            "--set train.learning_rates.sorce: unknown key; accepted: score, drift, flow",
        ),
        ("train.steps=1.5", "--set train.steps = 1.5: must be an integer"),
        ("train.steps='7'", '--set train.steps = "7": must be an integer'),
        ("train.steps=true", "--set train.steps = true: must be an integer"),
        ("train.ema=1.0", "--set train.ema = 1.0: must be less than 1"),
        ("train.clip=.inf", "--set train.clip = Infinity: must be a finite number"),
        ("train=3", "--set train = 3: must be a mapping"),
        ("train.batch_size=1501", "--set train.batch_size = 1501: must be at most 1500, the training images of digits"),
        ("evaluate.images=298", "--set evaluate.images = 298: must be at most 297, the test images of digits"),
        ("evaluate.probes=all", "--set evaluate.probes = \"all\": must be 'exact' or must be an integer"),
        ("evaluate.samples=31", "--set evaluate.samples = 31: must be at least 32"),
        ("train.curve_samples=31", "--set train.curve_samples = 31: must be at least 32"),
        ("evaluate.quality=[kid]", "not defined for points; accepted: sliced_wasserstein, energy"),
        ("evaluate.features=inception", "needs RGB images"),
        ("evaluate.samplers=[{name: dimm, steps: [4]}]", 'name = "dimm": unknown sampler; accepted: euler_maruyama, '),
        ("evaluate.samplers=[{name: ddim}]", "evaluate.samplers[0].steps: missing"),
        ("evaluate.samplers=[{name: ddim, steps: [4], eat: 1}]", "samplers[0].eat: unknown key; accepted: name, steps"),
        (
            "evaluate.samplers=[{name: ddim, steps: [4], eta: 2}]",
            "samplers[0].eta = 2: must be less than or equal to 1",
        ),
        ("evaluate.samplers=[{name: ode, steps: [4]}]", "ode chooses its own steps"),
        ("model.name=undm", '--set model.name = "undm": unknown model; accepted: bridge, ddpm, diffflow, indm, ncsn'),
        ("model.sde.name=pv", '--set model.sde.name = "pv": unknown sde; accepted: vp, subvp, ve'),
        ("model.sde.beta_mxa=1", "--set model.sde.beta_mxa: unknown key; accepted: name, beta_min, beta_max, eps"),
        ("model.flow=residual", '--set model.flow = "residual": must be a mapping with a name; accepted: identity'),
        ("model.setting=fad", "--set model.setting = \"fad\": must be 'nll' or 'fid'"),
        ("optimiser.name=adam", "--set optimiser.name=adam: unknown key 'optimiser'; accepted: model.*, train.*"),
        ("train.steps", "--set train.steps: must be key=value"),
        ("train.steps=[1", "--set train.steps=[1: line 1: not valid YAML"),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(suite, override, said):
    assert said in refusal(lambda: suite(overrides=[override]).runs())


def test_a_resolution_that_the_network_cannot_halve_is_refused(suite):
    text = SUITE.replace("ch_mult: [1, 1]", "ch_mult: [1, 1, 1, 1, 1]")
    said = refusal(lambda: suite(text).runs())
    assert said.startswith("experiments/tiny.yaml: ") and "ch_mult" in said and "8" in said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds: [0, 3]", "seeds: [3, 3]", "seeds = [3, 3]: seed 3 is given twice"),
        ("seeds: [0, 3]", "seeds: []", "seeds = []: "),
        ("seeds: [0, 3]", "seeds: [-1]", "seeds[0] = -1: must be greater than or equal to 0"),
        ('title: "Tiny"', 'titel: "Tiny"', "titel: unknown key; accepted: title, description, seeds"),
        ("digits:\n", "digit:\n", "datasets.digit: unknown data set; accepted: checkerboard"),
        (
            "    plain:",
            "    plain: {modle: {}}",
            "variants.plain.modle: unknown key; accepted: model, train, evaluate, datasets",
        ),
        ("    plain:", "    plain: 3", "variants.plain = 3: must be a mapping"),
        ("    plain:", "    features:", "variants.features: this name is taken"),
        ("    plain:", "    a b:", "variants"),
        ("checkerboard: {model: {flow", "swissroll: {model: {flow", "variants.flowing.datasets.swissroll: unknown key"),
        ("batch_size: 10", "batch_size: 0", "defaults.train.batch_size = 0: must be greater than or equal to 1"),
        ("width: 8", "width: eight", 'datasets.checkerboard.model.score.width = "eight": must be an integer'),
        ("model: {sde: {name: ve}}", "model: {sde: {name: v}}", 'variants.exploding.model.sde.name = "v": unknown sde'),
        ("steps: 100, ", "", "variant plain: train.steps: missing"),
        ("tiny:\n", "tiny:\n  title: x\n", "line 3: 'title' is given twice"),
        ("tiny:", "tony:", "must have the one top-level key 'tiny', has: tony"),
        ("seeds: [0, 3]", "seeds: [0, 3", "not valid YAML"),
    ],
)
def test_a_bad_suite_is_refused_with_the_place_in_its_file(suite, old, new, said):
    assert old in SUITE
    message = refusal(lambda: suite(SUITE.replace(old, new, 1)).runs())
    assert message.startswith("experiments/tiny.yaml: ") and said in message


def test_unknown_names_list_the_known_ones(suite):
    good = suite()
    assert "accepted: tiny" in refusal(lambda: load_suite("tni"))
    assert "accepted: plain, flowing, exploding" in refusal(lambda: good.runs("plian"))
    assert "accepted: 0, 3" in refusal(lambda: good.runs(seed=1))
    assert "accepted: checkerboard, digits" in refusal(lambda: good.runs(dataset="cifar10"))


def test_numbers_of_yaml_1_2():
    values = parse_yaml("[1e-4, 1.0e-4, 5E3, -2e0, .5, 1e4, on, 010]", "here")
    assert values[:6] == [1e-4, 1e-4, 5000.0, -2.0, 0.5, 10000.0] and all(type(v) is float for v in values[:6])
    assert values[6] == "on" and values[7] == 10


_words = st.text(st.characters(min_codepoint=32, max_codepoint=126))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _words,
        lambda inner: st.lists(inner) | st.dictionaries(_words, inner),
        max_leaves=8,
    )
)
def test_yaml_round_trip(value):
    assert parse_yaml(dump_yaml(value), "here") == value


_leaves = st.integers(0, 3) | st.none()
_layers = st.dictionaries(
    st.sampled_from("abc"), st.recursive(_leaves, lambda i: st.dictionaries(st.sampled_from("abc"), i), max_leaves=6)
)


def leaves(layer, path=()):
    """(path, value) of every scalar or empty mapping."""
    if not isinstance(layer, dict) or not layer:
        return {path: layer}
    return {key: value for name, inner in layer.items() for key, value in leaves(inner, (*path, name)).items()}


@given(_layers, _layers)
def test_merge_keeps_all_that_is_said_later_and_what_it_does_not_touch(under, over):
    before = json.dumps([under, over])
    merged = leaves(merge(under, over))
    later = {path: value for path, value in leaves(over).items() if value != {}}
    assert later.items() <= merged.items()
    heads = {path[:1] for path in leaves(over)}
    untouched = {path: value for path, value in leaves(under).items() if path and path[:1] not in heads}
    assert untouched.items() <= merged.items()
    assert merge(merge(under, over), over) == merge(under, over) and merge(under, under) == under
    assert json.dumps([under, over]) == before


def test_overrides_merge_and_the_last_wins():
    found = parse_overrides(["train.steps=1", "model.sde.eps=1e-3", "train.steps=2", "train.clip=null"])
    assert found == {"train": {"steps": 2, "clip": None}, "model": {"sde": {"eps": 1e-3}}}


# A component's signature is its schema -------------------------------------------------------------------------------


class _Inner:
    def __init__(self, shape: tuple[int, ...], size: int = 2, kind: Literal["a", "b"] = "a"):
        pass


class _Outer:
    supplied = ("device",)

    def __init__(self):
        pass

    @classmethod
    def from_options(cls, shape: list[int], device: str, inner: dict, ratio: float, sizes: tuple[int, int] = (1, 2)):
        pass


_REGISTRY = {"outer": {"o": _Outer}, "inner": {"i": _Inner}}


def test_component_options_come_from_the_signature():
    found = resolve_component(_REGISTRY, "outer", {"name": "o", "ratio": 1, "inner": {"name": "i", "kind": "b"}}, ())
    assert found == {"name": "o", "inner": {"name": "i", "size": 2, "kind": "b"}, "ratio": 1.0, "sizes": [1, 2]}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"name": "o", "ratio": 1}, "inner: missing; accepted: i"),
        ({"name": "o", "inner": {"name": "i"}}, "ratio: missing"),
        ({"name": "o", "ratio": 1, "device": "cpu", "inner": {"name": "i"}}, "device: unknown key"),
        ({"name": "o", "ratio": 1, "shape": [2], "inner": {"name": "i"}}, "shape: unknown key"),
        ({"name": "o", "ratio": 1, "inner": {"name": "i", "size": 2.5}}, "inner.size = 2.5: must be an integer"),
        ({"name": "o", "ratio": 1, "sizes": [1, 2, 3], "inner": {"name": "i"}}, "sizes"),
        ({"ratio": 1}, "must be a mapping with a name; accepted: o"),
    ],
)
def test_component_options_are_refused_by_the_signature(value, said):
    assert said in refusal(lambda: resolve_component(_REGISTRY, "outer", value, ()))


def test_a_component_without_annotations_is_the_programmers_error():
    def build(width=3):
        pass

    with pytest.raises(TypeError, match="parameter 'width' needs a type annotation"):
        signature_schema(build)


def test_values_that_no_configuration_can_hold():
    with pytest.raises(Invalid, match="must be a mapping"):
        validate(TrainConfig, [1], ("train",))
    with pytest.raises(Invalid, match="neither text, number"):
        validate(TrainConfig, parse_yaml("steps: 2020-01-01", "here"), ("train",))


MORE = """  more:
    seeds: [0]
    defaults: {train: {steps: 7}}
    variants:
      later: {model: {sde: {name: ve}}, datasets: {checkerboard: {train: {batch_size: 5}}}}
"""


def test_more_variants_have_seeds_and_defaults_of_their_own(suite):
    suite = suite(SUITE + MORE)
    assert (suite.core, suite.more) == (["plain", "flowing", "exploding"], ["later"])
    assert suite.seeds_of("later") == [0] and suite.seeds_of("plain") == [0, 3]
    runs = suite.runs("later")
    assert [run.seed for run in runs] == [0] * len(suite.datasets)
    assert {run.train.steps for run in runs} == {7}
    assert {run.dataset: run.train.batch_size for run in runs}["checkerboard"] == 5
    assert suite.runs("plain")[0].train.steps != 7
    assert {(run.variant, run.seed) for run in suite.runs(seed=3)} == {("plain", 3), ("flowing", 3), ("exploding", 3)}
    assert "seed 3 is not in suite tiny" in refusal(lambda: suite.runs("later", 3))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("later:", "plain:", "more.variants.plain: this name is taken"),
        ("[0]", "[2, 2]", "more.seeds = [2, 2]: seed 2 is given twice"),
        ("train: {steps", "trian: {steps", "more.defaults.trian: unknown key"),
        ("{steps: 7}", "{steps: 0}", "more.defaults.train.steps = 0: must be"),
        ("{name: ve}", "{name: vee}", 'more.variants.later.model.sde.name = "vee": unknown sde'),
    ],
)
def test_more_variants_are_checked_like_the_others(suite, old, new, message):
    assert message in refusal(lambda: suite(SUITE + MORE.replace(old, new)).runs("later"))
