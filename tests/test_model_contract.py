"""Every registered model keeps the contract of models.base, and lacks what it is known to lack."""

import pytest
import torch

import models
from models.base import NotDefined
from models.noise import StepRandom
from models.registry import MODELS
from models.samplers import SAMPLERS

MLP = {"name": "mlp", "width": 16, "depth": 1}
FLOW = {"name": "residual", "blocks": 2, "hidden": 8}
# a tiny configuration of every model; a new one adds its line
TINY = {
    "indm": {"sde": {"name": "vp"}, "score": MLP, "flow": FLOW},
    "diffflow": {"drift": MLP, "score": MLP, "steps": 4},
    "bridge": {"drift": MLP, "score": MLP, "steps": 4, "warm_steps": 1, "stage_steps": 1},
    "ddpm": {"score": MLP, "steps": 24},
    "ncsn": {"score": MLP, "levels": 4},
}
# and what each lacks, by its own account: quantities, and samplers that are made for linear diffusions
LINEAR_SAMPLERS = set(SAMPLERS) - {"euler_maruyama", "ode"}
LACKING = {
    "indm": {"chain", "discrete"},
    "diffflow": {"discrete", *LINEAR_SAMPLERS},
    "bridge": {"discrete", *LINEAR_SAMPLERS},
    "ddpm": set(),
    "ncsn": {"nelbo", "discrete"},
}


def defined(quantity):
    """The value of a quantity, or None where the model says, with a reason, that it has none."""
    try:
        return quantity()
    except NotDefined as reason:
        assert str(reason).startswith("not defined: ")
        return None


@pytest.mark.parametrize("name", MODELS)
def test_every_model_honours_the_contract(name):
    assert name in TINY and name in LACKING, f"give {name} a tiny configuration here, and say what it lacks"
    torch.manual_seed(0)
    model = models.build({"name": name, "shape": [2], **TINY[name]})
    x, levels = torch.randn(8, 2), torch.randint(0, 16, (8, 2))
    values = {
        "nelbo": defined(lambda: model.nelbo(x)),
        "nll": defined(lambda: model.nll(x, rtol=1e-3, atol=1e-3)),
        "chain": defined(lambda: sum(model.chain_parts(x).values())),
        "discrete": defined(lambda: sum(model.discrete_parts(levels, 16).values())),
    }
    drawn = {s: defined(lambda s=s: model.sample(3, steps=0 if s == "ode" else 2, sampler=s)) for s in SAMPLERS}
    assert {key for key, value in (values | drawn).items() if value is None} == LACKING[name]
    for found, shape in ((values, (8,)), (drawn, (3, 2))):
        made = [value for value in found.values() if value is not None]
        assert all(value.shape == shape and bool(torch.isfinite(value).all()) for value in made)
    assert (model.chain_steps is None) == ("chain" in LACKING[name])
    assert model.sample(3, steps=2, sampler=model.curve_sampler).shape == (3, 2) and model.nfe > 0
    path = model.trajectory(x, [0.0, 1.0])
    assert path.shape == (2, 8, 2) and torch.allclose(path[0], x, atol=0.1)
    steps = range(3)
    assert all(any(phase.due(step) for phase in model.phases()) for step in steps)
    for phase in model.phases():
        step = next(filter(phase.due, steps))
        loss, terms = phase.loss_fn(x, StepRandom(0, step, 8))
        assert loss.ndim == 0 and terms and all(v.ndim == 0 for v in terms.values())
        loss.backward()
        weights = [p for group in phase.parameters.values() for p in group]
        assert weights and any(p.grad is not None for p in weights)
