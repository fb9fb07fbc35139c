"""The folder of an imported checkpoint, written and loaded; and whatever else is measured without training it here.

``config.yaml`` says how to build the model (``Imported``), ``weights/model.safetensors`` holds the network by the names
of its class in `models.score`, ``weights/flow.safetensors`` an INDM's flow, ``provenance.json`` the source's sha256.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import models
from bench.checkpoint import file_hash, save_weights
from bench.errors import InputError
from bench.files import read_json, write_json, write_text_atomic
from bench.importing import diffusers_unet, indm_flow, score_sde
from bench.importing.networks import Condition, ForeignNetwork, OfficialFourier, SampleOnly, chain_times
from bench.options import Invalid, Schema, accepted, dotted, locate, resolve_component, show, validate
from bench.overrides import merge, parse_overrides
from bench.provenance import record
from bench.settings import Count
from bench.untrusted import bounded_modules, check_parameters
from bench.yaml_files import dump_yaml, read_yaml
from models import registry
from models.base import Model
from models.ddpm import DDPM
from models.flows import Identity
from models.indm import INDM
from models.score.adapter import NetworkScore
from models.sde import VPSDE

WEIGHTS = Path("weights") / "model.safetensors"
FLOW_WEIGHTS = Path("weights") / "flow.safetensors"
# settings that decide how the weights are to be used; sizes may differ from the published ones
FIXED = (
    ("name",),
    ("sde", "name"),
    ("flow", "name"),
    ("preconditioning",),
    ("score", "name"),
    ("score", "embedding"),
    ("score", "centered"),
)
ACCEPTED = "a folder written by import-checkpoint or export, or one that diffusers saved"


class Imported(Schema):
    """`config.yaml` of an imported checkpoint.

    ``kind`` and ``config``: its family and its official configuration; ``weights``: averaged or of the last step;
    ``shape`` [C, H, W] of an image; ``space``: what its score is of; ``condition``: how the network is told the noise
    (:data:`bench.importing.networks.CONVENTIONS`); ``model``: as in a suite, with every default filled in.
    """

    kind: Literal["score_sde", "indm"]
    config: str
    weights: Literal["ema", "raw"]
    shape: tuple[Count, Count, Count]
    space: Literal["data", "latents"]
    condition: Condition
    model: Annotated[dict, Field(min_length=1)]


@dataclass(frozen=True)
class Pretrained:
    """A model ready to be measured: ``description`` (plain data) says which, ``source`` where its weights came from."""

    model: Model
    shape: tuple[int, ...]
    description: dict[str, Any]
    weights_sha256: str
    source: dict[str, Any]


# Writing -----------------------------------------------------------------------------------------------------------


def import_checkpoint(
    file: Path,
    out: Path,
    config: str,
    kind: str = "score_sde",
    weights: str = "ema",
    shape: Sequence[int] = (3, 32, 32),
    settings: Sequence[str] = (),
    flow: Path | None = None,
) -> Imported:
    """Write the folder ``out`` from a checkpoint of the official code.

    ``flow``: the file of an INDM's flow, whose own weights are read; ``settings``: texts ``model.<key>=<value>`` over
    the configuration, for a network of another size. InputError, in one line, for a file, a name or a setting that
    cannot be used; nothing is written then.
    """
    chosen = score_sde.official(kind, config)
    if flow is not None:
        if chosen.space != "latents":
            raise InputError(f"--flow {flow}: accepted: only with --kind indm, whose score is of a flow's latents")
        chosen = score_sde.with_flow(chosen)
    if weights not in ("ema", "raw"):
        raise InputError(f"--weights {weights}: unknown; accepted: ema, raw")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists and is not an empty folder; accepted: a new one")
    overrides = parse_overrides(settings)
    if set(overrides) - {"model"}:
        raise InputError(f"--set {next(iter(set(overrides) - {'model'}))}: unknown key; accepted: model.*")
    try:
        model = _resolved(merge(chosen.model, overrides.get("model", {})), chosen.model)
        values = {"kind": kind, "config": config, "weights": weights, "shape": list(shape), "space": chosen.space}
        imported = validate(Imported, values | {"condition": chosen.condition, "model": model})
    except Invalid as error:
        raise InputError(f"import-checkpoint: {dotted(error.path)}{error.problem}") from error
    with torch.device("meta"):
        net = _network(imported)
        transform = _flow(imported) if flow is not None else None
    checkpoint = score_sde.read_checkpoint(file, weights)
    score_sde.check_sigmas(file, checkpoint.tensors, model, score_sde.LEVELS)
    state = score_sde.convert(file, checkpoint.tensors, net, config)
    source = _source(file) | checkpoint.training
    if flow is not None:
        held = score_sde.read_checkpoint(flow, "raw")
        flow_state = indm_flow.convert(flow, held.tensors, transform, config)
        source["flow"] = _source(flow) | held.training

    content = imported.model_dump(mode="json")
    save_weights(out / WEIGHTS.parent, state, content)
    hashes = {"weights_sha256": file_hash(out / WEIGHTS)}
    if flow is not None:
        save_weights(out / WEIGHTS.parent, flow_state, content, FLOW_WEIGHTS.name)
        hashes["flow_sha256"] = file_hash(out / FLOW_WEIGHTS)
    write_text_atomic(out / "config.yaml", dump_yaml(content))
    # written last: without it the folder is not loaded
    write_json(out / "provenance.json", record("cpu") | {"source": source} | hashes)
    return imported


def _source(file: Path) -> dict[str, Any]:
    """What names a file wherever it lies."""
    return {"file": file.name, "sha256": file_hash(file), "bytes": file.stat().st_size}


def _resolved(model: Mapping[str, Any], official: Mapping[str, Any]) -> dict[str, Any]:
    """The model with every default, checked against the schema of its parts and the official one. Raises Invalid."""
    kinds = {**registry.COMPONENTS, "model": registry.MODELS}
    wanted = resolve_component(kinds, "model", official, ("model",))
    resolved = resolve_component(kinds, "model", model, ("model",))
    for path in FIXED:
        value, only = locate(resolved, path)[1], locate(wanted, path)
        if only[0] == path and value != only[1]:
            raise Invalid(("model", *path), f" = {show(value)}: {accepted([only[1]])}, as the network was trained")
    return resolved


def _network(imported: Imported) -> nn.Module:
    """The bare network; InputError where its options do not go together."""
    options = imported.model["score"]
    try:
        net = registry.component("score", options, shape=list(imported.shape))
    except ValueError as error:
        raise InputError(f"model.score: {' '.join(str(error).split())}") from error
    if options.get("embedding") == "fourier":
        net.encode = OfficialFourier(options["nf"], options["fourier_scale"])
    return net


def _flow(imported: Imported) -> nn.Module:
    """The bare flow; InputError where its options do not go together."""
    options = imported.model["flow"]
    try:
        return registry.component("flow", options, shape=list(imported.shape))
    except ValueError as error:
        raise InputError(f"model.flow: {' '.join(str(error).split())}") from error


# Loading -----------------------------------------------------------------------------------------------------------


def load_pretrained(path: Path, device: str | torch.device = "cpu", dataset: str | None = None) -> Pretrained:
    """The model of a folder: of import-checkpoint, of export or of a run, or of diffusers.

    In evaluation mode, without gradients of its weights. ``dataset``: the one it is to be measured on. InputError, in
    one line, for anything else.
    """
    if path.is_file():
        raise InputError(f"--pretrained {path}: a file; accepted: {ACCEPTED} (see import-checkpoint)")
    if (path / "config.yaml").is_file():
        content = read_yaml(path / "config.yaml")
        foreign = isinstance(content, dict) and "kind" in content
        loaded = _load_imported(path, content) if foreign else _load_own(path, dataset)
    elif diffusers_unet.unet_folder(path) is not None:
        loaded = _load_diffusers(path)
    else:
        raise InputError(f"--pretrained {path}: no config.yaml, unet/config.json or config.json; accepted: {ACCEPTED}")
    loaded.model.to(device).eval().requires_grad_(False)
    return loaded


def _load_imported(path: Path, content: Any) -> Pretrained:
    where = path / "config.yaml"
    try:
        imported = validate(Imported, content)
        chosen = score_sde.official(imported.kind, imported.config)
        flowing = imported.space == "data" and chosen.space == "latents"
        model = _resolved(imported.model, (score_sde.with_flow(chosen) if flowing else chosen).model)
    except Invalid as error:
        raise InputError(f"{where}: {dotted(error.path)}{error.problem}") from error
    if imported.space != "data":
        raise InputError(
            f"{where}: space = {imported.space}: the score is of the latents of a flow that was not imported; "
            "accepted: data (import it with --flow; an INDM run without a flow is one of --kind score_sde)"
        )
    try:
        source = read_json(path / "provenance.json")
        wanted = source["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: provenance.json is missing or damaged; accepted: a finished import") from error
    imported = imported.model_copy(update={"model": model})
    _check_size(imported, _network, path / WEIGHTS)
    if flowing:
        _check_size(imported, _flow, path / FLOW_WEIGHTS)
    net, flow = _network(imported), Identity()
    _load_state(net, path / WEIGHTS, wanted)
    if flowing:
        flow = _flow(imported)
        _load_state(flow, path / FLOW_WEIGHTS, source.get("flow_sha256"))
    built = _assemble(model, net, imported.condition, imported.shape, not model["score"]["centered"], flow)
    return Pretrained(built, imported.shape, imported.model_dump(mode="json"), wanted, source.get("source") or {})


def _check_size(imported: Imported, build: Callable[[Imported], nn.Module], weights: Path) -> None:
    """Refuse a network larger than its weights' file, before it takes memory."""
    try:
        with torch.device("meta"), bounded_modules():
            check_parameters(build(imported), weights.stat().st_size if weights.is_file() else 0)
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise InputError(f"{weights}: the model of config.yaml {' '.join(str(error).split())[:300]}") from error


def _assemble(
    model: Mapping[str, Any],
    net: nn.Module,
    condition: str,
    shape: Sequence[int],
    unit_data: bool = False,
    flow: nn.Module | None = None,
) -> Model:
    """The model around a foreign network: DDPM with its chain, or INDM, which without a flow is a linear diffusion."""
    options = {key: value for key, value in model.items() if key not in ("name", "score", "flow", "preconditioning")}
    if model["name"] == "ddpm":
        process = VPSDE(options["beta_min"], options["beta_max"])
        times = chain_times(options["steps"], options["beta_min"], options["beta_max"])
        score = NetworkScore(ForeignNetwork(net, condition, unit_data, times), process)
        return DDPM(score, shape, **options)
    process = registry.component("sde", options.pop("sde"))
    if unit_data and not isinstance(flow, Identity):
        flow = indm_flow.UnitDataFlow(flow)
    score = NetworkScore(ForeignNetwork(net, condition, unit_data, levels=score_sde.LEVELS), process)
    return INDM(process, score, flow, shape=shape, **options)


def _load_diffusers(path: Path) -> Pretrained:
    folder = diffusers_unet.load_folder(path)
    options = {"name": "ddpm", **folder.chain}
    try:
        built = _assemble(options, SampleOnly(folder.net), "level", folder.shape)
    except ValueError as error:
        raise InputError(f"{path}: scheduler: {' '.join(str(error).split())}") from error
    description = {"kind": "diffusers", "shape": list(folder.shape), "space": "data", "condition": "level"}
    description |= {"model": options, "network": folder.configuration["unet"]}
    digest = file_hash(folder.weights)
    return Pretrained(built, folder.shape, description, digest, _source(folder.weights))


def _load_own(path: Path, dataset: str | None) -> Pretrained:
    """A model that this harness trained: an exported folder, or a run's own."""
    from bench.config import read_run
    from bench.run_config import FACTS

    run = read_run(path)
    weights = next((path / name for name in (WEIGHTS, Path(WEIGHTS.name)) if (path / name).is_file()), None)
    if weights is None:
        raise InputError(f"{path}: {WEIGHTS} is missing; accepted: {ACCEPTED}")
    if run.dataset in FACTS:
        shape = FACTS[run.dataset][0]
    else:
        from bench.data import load

        if run.dataset != dataset:  # a configuration from elsewhere may not have any folder read
            raise InputError(f"{path / 'config.yaml'}: dataset = {run.dataset!r}: accepted: {dataset}, as in the suite")
        shape = load(run.dataset).shape
    try:
        with torch.device("meta"), bounded_modules():
            check_parameters(models.build({**run.model, "shape": list(shape)}), weights.stat().st_size)
        built = models.build({**run.model, "shape": list(shape)})
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise InputError(f"{path / 'config.yaml'}: model: {' '.join(str(error).split())[:300]}") from error
    _load_state(built, weights, _recorded(path))
    digest = file_hash(weights)
    description = {"kind": "indm-bench", "weights": "ema", "shape": list(shape), "model": run.model}
    description |= {"suite": run.suite, "variant": run.variant, "dataset": run.dataset, "seed": run.seed}
    return Pretrained(built, tuple(shape), description, digest, _source(weights))


def _recorded(path: Path) -> str | None:
    """The weights' sha256 by the record of their training, None where no record came with them."""
    try:
        return read_json(path / "provenance.json")["weights_sha256"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / 'provenance.json'}: damaged; accepted: an undamaged copy") from error


def _load_state(module: nn.Module, weights: Path, wanted: str | None = None) -> None:
    """Fill a module from a file, of the sha256 ``wanted`` where one is known."""
    digest = file_hash(weights) if weights.is_file() else None
    if digest is None or wanted not in (None, digest):
        raise InputError(f"{weights}: sha256 {digest}: accepted: {wanted}, that of provenance.json")
    try:
        module.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{weights}: not the weights of config.yaml ({reason}); accepted: those") from error
