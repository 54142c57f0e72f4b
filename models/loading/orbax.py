"""Sharded Orbax checkpoints: a self-contained folder that restores straight onto any mesh.

::

    jaxserve_config.json    dimensions, ids that end an output, sampling defaults, scales of an fp8 KV cache; written
                            last, it makes the folder a checkpoint
    parameters/             Orbax: every parameter as the model holds it (fused), by its path
    tokenizer.json, tokenizer_config.json, chat_template.jinja
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.errors import ModelError
from jaxserve.models.config import (
    ClampedSwiGLU,
    Experts,
    Latent,
    LocalHeads,
    ModelConfig,
    OwnEmbedding,
    Recurrent,
    Rope,
    SharedExpert,
    Temperature,
)
from jaxserve.models.fields import Fields
from jaxserve.models.loading import eos, generation
from jaxserve.models.loading.assemble import placement, report
from jaxserve.models.loading.files import read_json
from jaxserve.tokenizer import Tokenizer

CONFIG = "jaxserve_config.json"
_PARAMETERS = "parameters"


def save(
    folder: Path,
    parameters: Mapping[str, jax.Array],
    config: ModelConfig,
    *,
    eos_token_ids: tuple[int, ...],
    sampling_defaults: Mapping[str, Any],
    tokenizer: Tokenizer,
    kv_scales: np.ndarray | None = None,
) -> None:
    """Write a checkpoint into ``folder``, which must be new or empty (ModelError otherwise)."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder}: already exists, expected a new or empty folder")
    import orbax.checkpoint as ocp  # here: it takes half a second that the other formats need not pay

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / _PARAMETERS, dict(parameters))
    described = {
        "model": dataclasses.asdict(config),
        "eos_token_ids": eos_token_ids,
        "sampling_defaults": dict(sampling_defaults),
        "kv_scales": None if kv_scales is None else kv_scales.tolist(),
    }
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> tuple[ModelConfig, eos.Declared]:
    """The dimensions and the ids that end an output. Raises ModelError."""
    raw = read_json(folder / CONFIG)
    try:
        eos_token_ids = eos.declared(Fields({"eos_token_id": raw["eos_token_ids"]}, folder / CONFIG))
        return _made(ModelConfig, raw["model"]), eos_token_ids
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / CONFIG}: not a configuration of this version of jaxserve: {error}") from error


_PARTS = {
    "rope": Rope, "local_rope": Rope, "temperature": Temperature, "experts": Experts, "shared": SharedExpert,
    "gate": ClampedSwiGLU, "recurrent": Recurrent, "local_heads": LocalHeads, "own_embedding": OwnEmbedding,
    "latent": Latent,
}  # fmt: skip
"""Fields that are objects themselves."""


def _made[T](kind: Callable[..., T], values: Mapping[str, Any]) -> T:
    """What ``dataclasses.asdict`` made ``values`` of, through JSON."""
    fields = dict(values)
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = tuple(value)
        elif name in _PARTS and value is not None:
            fields[name] = _made(_PARTS[name], value)
    return kind(**fields)


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """As ``save`` got them, none where a folder is older than they are. Raises ModelError."""
    path = folder / CONFIG
    found = read_json(path).get("sampling_defaults", {})
    if not isinstance(found, dict):
        raise ModelError(f"{path}: sampling_defaults must be a JSON object, found {found!r}")
    return generation.checked(path, found, {name: name for name in generation.FIELDS})


def kv_scales(folder: Path, num_layers: int) -> np.ndarray | None:
    """As ``save`` got them. Raises ModelError."""
    path = folder / CONFIG
    found = read_json(path).get("kv_scales")
    if found is None:
        return None
    scales = np.zeros(0, np.float32)
    with suppress(TypeError, ValueError):
        scales = np.array(found, np.float32)
    if scales.shape != (num_layers, 2) or not (np.isfinite(scales).all() and (scales > 0).all()):
        raise ModelError(f"{path}: kv_scales must be two positive numbers for each of {num_layers} layers")
    return scales


def check(folder: Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raise one ModelError with every parameter that does not fit; reads names and shapes only."""
    import orbax.checkpoint as ocp

    path = folder.absolute() / _PARAMETERS
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.metadata(path).item_metadata
    if found is None:
        raise ModelError(f"{path}: not a readable Orbax checkpoint")
    shapes = {name: tuple(array.shape) for name, array in found.tree.items()}
    problems = [f"missing {name}" for name in sorted(abstract.keys() - shapes.keys())]
    problems += [f"unexpected {name}" for name in sorted(shapes.keys() - abstract.keys())]
    problems += [
        f"mis-shaped {name} {shapes[name]}, expected {spec.shape}"
        for name, spec in abstract.items()
        if name in shapes and shapes[name] != spec.shape
    ]
    report(folder, problems)


def restore(folder: Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read every parameter of ``abstract``, which ``check`` has passed, onto its devices, cast to its type.

    Each process reads its own shards only, whatever mesh the checkpoint was written from. Raises ModelError.
    """
    import orbax.checkpoint as ocp

    path = folder.absolute() / _PARAMETERS
    placed = {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=placement(spec)) for name, spec in abstract.items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(path, placed)
    except Exception as error:  # bare Exception is what a truncated data file gives
        raise ModelError(f"{path}: cannot be read: {str(error).splitlines()[0]:.200}") from error
    return {name: restored[name] for name in abstract}
