"""Options of components: annotated types, since a constructor's signature is its schema, and checks of their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]

T = TypeVar("T")


def require(condition: bool, key: str, value: object, accepted: str) -> None:
    """Raise ValueError in one line, naming the option, its value and what is accepted, unless the condition holds."""
    if not condition:
        raise ValueError(f"{key} = {value!r}: accepted {accepted}")


def choose(options: Mapping[str, T], key: str, name: str) -> T:
    """The option called ``name``; ValueError with the accepted names otherwise."""
    require(name in options, key, name, f"are {', '.join(options)}")
    return options[name]
