"""Checkpoints as other code writes them, for the tests of bench.importing.

tests/data/score_sde.safetensors was written by the official repository, github.com/yang-song/score_sde_pytorch at
cb1f359, on a CPU with its pure-PyTorch resampling. Three networks of its class ncsnpp at nf = 4, ch_mult = (1, 2), one
block a level, attention at 4, images 3x8x8, all else as in the configuration that is named: `net/<network>/<name>` is
the state that the averaged parameters give, every weight redrawn (N(0, 1 / fan-in), biases N(0, 0.01), normalisation
1 + N(0, 0.01)) so that all of them matter. `case/<configuration>/`: input, in the units of the official data; told, the
labels or sigmas that the network was given; output, its own; time, the t of the SDE; score, that of the official
get_score_fn, and for discrete VP -output / std with std its sqrt_1m_alphas_cumprod. The metadata hold the names in the
order of the official state dict.

tests/data/indm_flow.safetensors was written by github.com/byeonghu-na/INDM at 0ef0626 likewise: its flow of CIFAR-10
with blocks 2-1, 6 hidden channels, images 3x8x8, an encoder of widths 4 and 6 and 2 channels, a prior of 8 hidden
units, every weight and every statistic redrawn. `net/<name>` is its state; `case/`: input, mean and log_var of q(h|x),
a draw h, kl of that draw, and z, the latents for that h.
"""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bench import cli
from bench.errors import InputError
from bench.importing.pretrained import import_checkpoint
from bench.importing.score_sde import layout
from models.score import NCSNpp

GOLDEN = Path(__file__).parent / "data" / "score_sde.safetensors"
TINY = ["nf=4", "ch_mult=[1, 2]", "num_res_blocks=1", "attn_resolutions=[4]"]
SETTINGS = [f"model.score.{setting}" for setting in TINY]
SHAPE = (3, 8, 8)
CONTINUOUS = "vp/cifar10_ddpmpp_continuous"
EVALUATION = [
    "evaluate.images=2",
    "evaluate.rtol=0.1",
    "evaluate.atol=0.1",
    "evaluate.nelbo_times=2",
    "evaluate.samples=4",
    "evaluate.quality=[]",
    "evaluate.features=null",
    "evaluate.studies.latents=null",
    "evaluate.samplers=[{name: ddim, steps: [2, 3]}]",
    "train.curve_samples=0",
]

with safe_open(GOLDEN, "pt") as stream:
    NETS = json.loads(stream.metadata()["nets"])
    ORDER = {net: json.loads(stream.metadata()[f"order/{net}"]) for net in set(NETS.values())}
NUMBERS = load_file(GOLDEN)


FLOW = load_file(GOLDEN.with_name("indm_flow.safetensors"))
FLOW_SETTINGS = ["blocks=[2, 1]", "hidden=6", "encoder_widths=[4, 6]", "encoder_out=2", "prior_hidden=8"]
FLOW_SETTINGS = [f"model.flow.{setting}" for setting in FLOW_SETTINGS]


def flow_checkpoint() -> dict:
    """As INDM saves it; the averages are never read."""
    state = {name.removeprefix("net/"): value for name, value in FLOW.items() if name.startswith("net/")}
    return {"optimizer": {}, "model": OrderedDict(state), "ema": {"shadow_params": []}, "step": 7}


def case(config: str) -> dict[str, torch.Tensor]:
    start = f"case/{config}/"
    return {name.removeprefix(start): value for name, value in NUMBERS.items() if name.startswith(start)}


def official_checkpoint(net: str) -> dict:
    """As the official code saves it: averaged parameters as a list, those of the last step (here zero) by name."""
    state = OrderedDict((name, NUMBERS[f"net/{net}/{name}"]) for name in ORDER[net])
    fixed = ("module.sigmas", "module.all_modules.0.W")
    shadows = [value for name, value in state.items() if name not in fixed]
    raw = OrderedDict((name, value if name in fixed else torch.zeros_like(value)) for name, value in state.items())
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(2)}}
    return {
        "optimizer": {"state": moments, "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.999), "params": [0]}]},
        "model": raw,
        "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": shadows},
        "step": 7,
    }


def saved(folder: Path, content, name: str = "checkpoint_7.pth", **options) -> Path:
    path = folder / name
    torch.save(content, path, **options)
    return path


def imported(folder: Path, config: str, **options):
    path = saved(folder, official_checkpoint(NETS.get(config, "ddpmpp")))
    out = folder / "imported"
    import_checkpoint(path, out, config, shape=SHAPE, settings=SETTINGS, **options)
    return out


def refused(function, *arguments, **options) -> str:
    """The one line of an InputError."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text and "accepted" in text
    return text


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def digits_checkpoint(folder: Path) -> tuple[Path, NCSNpp]:
    """An untrained network for digits in the official format, and the network."""
    torch.manual_seed(0)
    net = NCSNpp((1, 8, 8), nf=4, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), init_scale=1.0).eval()
    state, model = net.state_dict(), OrderedDict()
    for entry in layout(net):
        for name, part in zip(entry.official, state[entry.own].chunk(len(entry.official)), strict=True):
            model[f"module.{name}"] = part.T.contiguous() if entry.transposed else part.clone()
    shadows = list(model.values())
    return saved(folder, {"model": model, "ema": {"shadow_params": shadows}, "step": 0, "optimizer": {}}), net


def indm_bench(capsys, *arguments):
    code = cli.execute(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def settings(texts) -> list[str]:
    return [word for text in texts for word in ("--set", text)]
