"""Options that came later leave old results as they are: no trace in files and hashes while they have their default."""

import inspect

import pytest

from bench.config import dump_config, load_suite, read_run
from bench.errors import InputError
from bench.options import validate
from bench.run_config import QUIET_DEFAULTS, RunConfig, without_quiet
from bench.settings import TrainConfig
from bench.yaml_files import read_yaml
from models import registry

# of the results committed before there were quiet defaults
HASHES = {"ddpmpp-vp": "48b5667d0bf0", "indm-vp-nll": "e8e240c1792b"}


def plain(run):
    return run.model_dump(mode="json")


def test_keys_are_left_out_wherever_they_stand():
    content = {
        "model": {"flow": {"name": "a", "new": False, "deep": {"new": [1]}}, "new": 1},
        "evaluate": {"samplers": [{"name": "x", "heat": 1.0}, {"name": "y", "heat": 2.0}, "z"]},
    }
    quiet = {"model.flow.new": False, "model.*.deep.new": [1], "evaluate.samplers.*.heat": 1.0, "absent.key": 0}
    assert without_quiet(content, quiet) == {
        "model": {"flow": {"name": "a", "deep": {}}, "new": 1},
        "evaluate": {"samplers": [{"name": "x"}, {"name": "y", "heat": 2.0}, "z"]},
    }
    assert content["model"]["flow"]["new"] is False  # the content itself is as it was


@pytest.mark.parametrize(("value", "default"), [(0, False), (1, 1.0), ("", None), ([], {}), (True, 1)])
def test_only_the_very_default_is_left_out(value, default):
    assert without_quiet({"a": {"b": value}}, {"a.b": default}) == {"a": {"b": value}}


def test_quiet_values_are_the_options_own_defaults():
    for key, default in QUIET_DEFAULTS.items():
        section, _, rest = key.partition(".")
        if section == "train":
            field = TrainConfig.model_fields[rest]
            assert field.get_default(call_default_factory=True) == default, key
        elif section == "model":
            *_, option = rest.split(".")
            classes = [*registry.MODELS.values(), *(c for kind in registry.COMPONENTS.values() for c in kind.values())]
            signatures = [inspect.signature(getattr(c, "from_options", c)).parameters for c in classes]
            defaults = [options[option].default for options in signatures if option in options]
            assert defaults and all(value == default for value in defaults), key


def test_a_hash_changes_with_a_new_option_only_where_it_is_set(tmp_path):
    (run,) = load_suite("digits").runs("indm-vp-nll", 0)
    for options in ({"compile": True}, {"raw_groups": ["flow"]}, {"ema_rates": {"flow": 0.99}}, {"tf32": True}):
        other = run.model_copy(update={"train": run.train.model_copy(update=options)})
        other = validate(RunConfig, plain(other))
        assert other.hash != run.hash and other.training_hash != run.training_hash
        assert plain(other)["train"] == other.resolved()["train"] | {
            key.removeprefix("train."): value
            for key, value in QUIET_DEFAULTS.items()
            if key.startswith("train.") and key.removeprefix("train.") not in options
        }
    # a file without the new keys, as old results have, is read as the same run
    (tmp_path / "config.yaml").write_text(dump_config(run))
    assert not {"compile", "raw_groups", "tf32"} & set(read_yaml(tmp_path / "config.yaml")["train"])
    again = read_run(tmp_path)
    assert again.hash == run.hash and plain(again) == plain(run)


@pytest.mark.parametrize("variant", sorted(HASHES))
def test_the_hashes_of_committed_results_stand(variant):
    (run,) = load_suite("digits").runs(variant, 0)
    assert run.training_hash == HASHES[variant]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.raw_groups=[flows]", 'train.raw_groups: "flows": unknown group; accepted: score, drift, flow'),
        ("train.ema_rates={flows: 0.9}", 'train.ema_rates: "flows": unknown group; accepted: score, drift, flow'),
        ("train.ema_rates={flow: 1.0}", "train.ema_rates.flow = 1.0: must be less than 1"),
        ("train.memory_format=nhwc", "train.memory_format = \"nhwc\": must be 'contiguous' or 'channels_last'"),
    ],
)
def test_refused_options(setting, said):
    with pytest.raises(InputError) as refused:
        load_suite("digits", [setting]).runs("indm-vp-nll", 0)
    assert said in str(refused.value)
