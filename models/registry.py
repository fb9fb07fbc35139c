"""Names to components: the one place a new variant adds a line to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.base import Model
from models.flows import Identity, ResidualFlow
from models.indm import INDM
from models.score.mlp import ScoreMLP
from models.score.ncsnpp import NCSNpp
from models.sde import VESDE, VPSDE, SubVPSDE

COMPONENTS: dict[str, dict[str, type]] = {
    "sde": {"vp": VPSDE, "subvp": SubVPSDE, "ve": VESDE},
    "score": {"ncsnpp": NCSNpp, "mlp": ScoreMLP},
    # a learned forward drift is a network of the same kind
    "drift": {"ncsnpp": NCSNpp, "mlp": ScoreMLP},
    "flow": {"identity": Identity, "residual": ResidualFlow},
}
MODELS: dict[str, type[Model]] = {"indm": INDM}


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
