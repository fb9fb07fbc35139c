"""Validation in one line: pydantic models, those made from a constructor's signature included.

The signature of a component's constructor is the schema of its options: annotations are the types, defaults the
defaults. So a new model, flow or network needs no second description of itself here.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from bench.errors import InputError

# arguments that the harness or the model supplies; a component may name more in an attribute ``supplied``
SUPPLIED = ("self", "shape")
LARGEST_SIZE = 1_000_000


class Schema(BaseModel):
    """Base of every configuration record: unknown keys, conversions between types, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Invalid(InputError):
    """A value refused at ``path`` (keys from the top); the caller turns the path into a place in a file."""

    def __init__(self, path: Sequence[str | int], problem: str):
        self.path = tuple(path)
        self.problem = problem
        super().__init__(f"{dotted(self.path)}{problem}")


def dotted(path: Sequence[str | int]) -> str:
    """``("train", "samplers", 0)`` -> ``train.samplers[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def validate(schema: type[BaseModel], value: Any, path: Sequence[str | int] = ()) -> Any:
    """An instance of ``schema`` from plain data; Invalid with the first problem, placed below ``path``.

    Data passes through JSON, whose strict mode takes a list for a tuple but no text for a number.
    """
    if not isinstance(value, Mapping):
        raise Invalid(path, f" = {show(value)}: must be a mapping of keys to values")
    try:
        return schema.model_validate_json(json.dumps(value))
    except TypeError as error:
        raise Invalid(
            path, f" = {show(value)}: holds a value that is neither text, number, truth, list nor mapping"
        ) from error
    except ValidationError as error:
        where, problem = _first_problem(schema, value, error)
        raise Invalid((*path, *where), problem) from error


def show(value: Any) -> str:
    """A value for a one-line message, shortened."""
    text = " ".join(json.dumps(value, default=str).split())
    return text if len(text) <= 60 else text[:57] + "..."


def accepted(names: Any) -> str:
    """``accepted: a, b, c``."""
    return "accepted: " + (", ".join(str(name) for name in names) or "none")


def _first_problem(schema: type[BaseModel], value: Any, error: ValidationError) -> tuple[tuple[str | int, ...], str]:
    # unknown keys first: a misspelt key also shows up as a missing one, and the misspelling is the news
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    if first["type"] == "extra_forbidden":
        return first["loc"], f": unknown key; {accepted(_fields_at(schema, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return first["loc"], ": missing, and it has no default"
    where, found = locate(value, first["loc"])
    # one value of several permitted types has one message for each of them
    messages = dict.fromkeys(_message(detail) for detail in details if locate(value, detail["loc"])[0] == where)
    return where, f" = {show(found)}: {' or '.join(messages)}"


def locate(value: Any, path: Sequence[str | int]) -> tuple[tuple[str | int, ...], Any]:
    """The part of ``path`` that exists in the data, and what is there (pydantic's paths also name unions' members)."""
    where: list[str | int] = []
    for part in path:
        known = (isinstance(value, Mapping) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if not known:
            break
        value = value[part]
        where.append(part)
    return tuple(where), value


def _message(detail: Mapping[str, Any]) -> str:
    text = detail["msg"]
    for long, short in (
        ("Value error, ", ""),
        ("Input should be a valid ", "must be a "),
        ("Input should be ", "must be "),
        ("must be a integer", "must be an integer"),
        ("must be an object", "must be a mapping"),
        ("a boolean", "true or false"),
    ):
        text = text.replace(long, short)
    return text[0].lower() + text[1:]


def _fields_at(schema: Any, loc: Sequence[str | int]) -> list[str]:
    """Keys that a nested record accepts."""
    for part in loc:
        if isinstance(part, str) and part in getattr(schema, "model_fields", {}):
            schema = schema.model_fields[part].annotation
        while not isinstance(schema, type) or not issubclass(schema, BaseModel):
            inner = [a for a in typing.get_args(schema) if a is not type(None)]
            if not inner:
                return []
            schema = inner[0]
    return list(schema.model_fields)


def signature_fields(factory: Callable, skip: Sequence[str] = ()) -> dict[str, inspect.Parameter]:
    """Options of a class or function: its named parameters, without those the harness supplies."""
    unwanted = {*SUPPLIED, *skip}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p for p in parameters if p.name not in unwanted and p.kind not in variadic}


def signature_schema(factory: Callable, skip: Sequence[str] = ()) -> type[BaseModel]:
    """A pydantic model of a constructor's options; TypeError for one without an annotation (the component's bug)."""
    callee = factory.__init__ if inspect.isclass(factory) else factory
    hints = typing.get_type_hints(callee, include_extras=True)
    fields = {}
    for name, parameter in signature_fields(factory, skip).items():
        if name not in hints:
            raise TypeError(
                f"{factory.__qualname__}: parameter {name!r} needs a type annotation, it is the configuration schema"
            )
        fields[name] = (hints[name], ... if parameter.default is inspect.Parameter.empty else parameter.default)
    return create_model(factory.__name__, __base__=Schema, **fields)


def resolve_component(
    registries: Mapping[str, Mapping[str, Callable]], kind: str, value: Any, path: Sequence[str | int]
) -> dict[str, Any]:
    """A component's mapping ``{name: ..., options...}`` with every default filled in.

    ``registries[kind]`` maps names to constructors. A parameter whose name is itself a kind holds a nested component.
    Raises Invalid below ``path``.
    """
    registry = registries[kind]
    if not isinstance(value, Mapping) or "name" not in value:
        problem = ": missing" if value is None else f" = {show(value)}: must be a mapping with a name"
        raise Invalid(path, f"{problem}; {accepted(registry)}")
    name = value["name"]
    if not isinstance(name, str) or name not in registry:
        raise Invalid((*path, "name"), f" = {show(name)}: unknown {kind}; {accepted(registry)}")
    # a model is built from options and parts by a classmethod, a component by its constructor
    factory = getattr(registry[name], "from_options", registry[name])
    supplied = getattr(registry[name], "supplied", ())
    parameters = signature_fields(factory, skip=supplied)
    nested = [parameter for parameter in parameters if parameter in registries]
    own = {key: item for key, item in value.items() if key != "name" and key not in nested}
    schema = signature_schema(factory, skip=[*supplied, *nested])
    unknown = [key for key in own if key not in schema.model_fields]
    if unknown:
        raise Invalid((*path, unknown[0]), f": unknown key; {accepted(['name', *parameters])}")
    resolved: dict[str, Any] = {"name": name}
    for part in nested:
        if part in value or parameters[part].default is inspect.Parameter.empty:
            resolved[part] = resolve_component(registries, part, value.get(part), (*path, part))
    options = validate(schema, own, path).model_dump(mode="json")
    _check_sizes(options, path)
    return resolved | options


def _check_sizes(value: Any, path: Sequence[str | int]) -> None:
    """Refuse whole numbers that only ask for memory: every integer of a component is a width, a depth or a count."""
    if isinstance(value, int) and abs(value) > LARGEST_SIZE:
        raise Invalid(path, f" = {show(value)}: must be at most {LARGEST_SIZE}")
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_sizes(item, (*path, key))
