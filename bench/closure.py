"""Which files of `models/` decide what a configuration computes, found by following imports.

A variant's results depend on its own model and components, not on every file of the package: adding a model must not
make finished runs of the others stale. Registries name classes and compute nothing, so they are left out.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from pathlib import Path

from bench.run_config import RunConfig

ROOT = Path(__file__).parents[1]
PACKAGE = "models"
REGISTRY = "models.registry"


def model_files(runs: Iterable[RunConfig]) -> list[str]:
    """Paths, relative to the repository's root, of all code in `models/` that these runs' models execute."""
    wanted = {"models.samplers"}  # chosen by the evaluation, whatever the model
    for run in runs:
        wanted |= _modules(run.model)
    seen: set[str] = set()
    while wanted:
        module = wanted.pop()
        if module in seen or module == REGISTRY:
            continue
        seen.add(module)
        wanted |= set(_imports(module)) - seen
    return sorted(_file(module).relative_to(ROOT).as_posix() for module in seen)


def _modules(model: dict) -> set[str]:
    """Modules of a configuration's model and components."""
    from models.registry import COMPONENTS, MODELS

    classes: list[type] = [MODELS[model["name"]]]
    classes += [COMPONENTS[kind][model[kind]["name"]] for kind in COMPONENTS if kind in model]
    return {inspect.getmodule(cls).__name__ for cls in classes}


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imports(module: str) -> Iterable[str]:
    """Modules of the package that a module's code imports anywhere; a package's re-exports lead to where they live."""
    for node in ast.walk(ast.parse(_file(module).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            for alias in node.names:
                yield _home(node.module, alias.name)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)


def _home(module: str, name: str) -> str:
    """The module that defines what `from module import name` gives."""
    if _file(f"{module}.{name}").is_file():
        return f"{module}.{name}"
    if _file(module).name != "__init__.py":
        return module
    for node in ast.walk(ast.parse(_file(module).read_text())):
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            return _home(node.module, name)
    return module
