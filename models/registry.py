"""Names to components and models. A model registers itself: any module of this package may define one.

A model is a subclass of :class:`models.base.Model` with a ``name`` and a ``from_options`` whose signature is the schema
of its settings; its module is found by being there, so that a new model is one new file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.base import Model
from models.flows import GlobalLatentFlow, Glow, Identity, ResidualFlow
from models.score.ddpm_unet import DDPMUNet
from models.score.mlp import ScoreMLP
from models.score.ncsnpp import NCSNpp
from models.sde import VESDE, VPSDE, SubVPSDE

COMPONENTS: dict[str, dict[str, type]] = {
    "sde": {"vp": VPSDE, "subvp": SubVPSDE, "ve": VESDE},
    "score": {"ncsnpp": NCSNpp, "ddpm_unet": DDPMUNet, "mlp": ScoreMLP},
    # a learned forward drift is a network of the same kind
    "drift": {"ncsnpp": NCSNpp, "mlp": ScoreMLP},
    "flow": {"identity": Identity, "residual": ResidualFlow, "residual_global": GlobalLatentFlow, "glow": Glow},
}


def _discover() -> dict[str, type[Model]]:
    """Every named model of this package, the modules in alphabetical order. ValueError for a name given twice."""
    found: dict[str, type[Model]] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)]) if not info.ispkg):
        if module == "registry":
            continue
        for _, value in inspect.getmembers(importlib.import_module(f"models.{module}"), inspect.isclass):
            name = vars(value).get("name")
            if not issubclass(value, Model) or value.__module__ != f"models.{module}" or name is None:
                continue
            if name in found:
                raise ValueError(f"model name {name!r}: taken by {found[name].__name__}, wanted by {value.__name__}")
            found[name] = value
    return found


MODELS = _discover()


def component(kind: str, options: Mapping[str, Any], **supplied: Any) -> Any:
    """Build one component from {"name": ..., **options}; ``supplied`` are arguments the model itself gives.

    Raises ValueError naming the kind, the name and the accepted names.
    """
    options = dict(options)
    name = options.pop("name", None)
    if name not in COMPONENTS[kind]:
        raise ValueError(f"{kind}.name = {name!r}: accepted are {', '.join(COMPONENTS[kind])}")
    return COMPONENTS[kind][name](**supplied, **options)


def build(config: Mapping[str, Any]) -> Model:
    """The model of a configuration: {"name": "indm", "shape": [3, 32, 32], "sde": {"name": "vp"}, ...}."""
    options = dict(config)
    name = options.pop("name", None)
    if name not in MODELS:
        raise ValueError(f"model.name = {name!r}: accepted are {', '.join(MODELS)}")
    return MODELS[name].from_options(shape=tuple(options.pop("shape")), **options)
