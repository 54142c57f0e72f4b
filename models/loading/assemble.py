"""From a checkpoint's tensors to parameters on the devices."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxserve.errors import ModelError
from jaxserve.models.weights import Part, TensorSource, Weight

# Rotary tables that old checkpoints carry.
_HARMLESS = re.compile(r".*rotary_emb\.inv_freq")

_UNTIED = " (tie_word_embeddings is false, so the model needs a head of its own)"

STAGING_BYTES = 2**30


def assemble(
    source: TensorSource, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]
) -> dict[str, jax.Array]:
    """Build every parameter of ``abstract`` from ``source``, cast it, and put it on the devices of its sharding.

    A parameter without a sharding goes to the first device. What ``check`` would complain of must not be there.
    """
    staging = Staging(STAGING_BYTES)

    def load(item: tuple[str, jax.ShapeDtypeStruct]) -> jax.Array:
        name, spec = item
        with staging.reserve(math.prod(spec.shape) * spec.dtype.itemsize):
            sharding = placement(spec)
            bounds_of = partial(_bounds, spec.shape)
            places = map(bounds_of, sharding.addressable_devices_indices_map(spec.shape).values())
            # Always fresh copies: JAX may keep using the host's memory, which must not be a file that others replace.
            shards = {at: np.empty([end - first for first, end in at], spec.dtype) for at in places}
            # Tensor by tensor, for a quantised one is read into memory of its own.
            for tensor_name in dict.fromkeys(part.name for part in weights[name]):
                tensor = source.read(tensor_name)
                for part in weights[name]:
                    if part.name == tensor_name:
                        _copy(part, tensor, shards)
            array = jax.make_array_from_callback(spec.shape, sharding, lambda index: shards[bounds_of(index or ())])
            return array.block_until_ready()

    # Reading, dequantising and casting run without Python's lock.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(abstract, pool.map(load, abstract.items()), strict=True))


class Staging:
    """Bounds the host memory of parameters that are on their way to a device; a larger one goes alone."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used_bytes or self._used_bytes + num_bytes <= self._limit_bytes)
            self._used_bytes += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used_bytes -= num_bytes
                self._changed.notify_all()


_Bounds = tuple[tuple[int, int], ...]
"""Of a shard, where it begins and ends in each dimension."""


def _bounds(shape: tuple[int, ...], index: tuple[slice, ...]) -> _Bounds:
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))


def _copy(part: Part, tensor: np.ndarray, shards: Mapping[_Bounds, np.ndarray]) -> None:
    """Fill what is the part's in each shard of a parameter, reading those bytes of its view only."""
    view = part.view(tensor)
    for bounds, shard in shards.items():
        ours, theirs = [], []
        for (first, end), place in zip(bounds, part.place(view.shape), strict=True):
            low, high = max(first, place.start), max(first, min(end, place.stop))
            ours.append(slice(low - first, high - first))
            theirs.append(slice(low - place.start, high - place.start))
        if all(axis.stop > axis.start for axis in ours):
            shard[tuple(ours)] = view[tuple(theirs)]


def placement(spec: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    return spec.sharding or SingleDeviceSharding(jax.local_devices()[0])


def check(
    where: object, source: TensorSource, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]
) -> None:
    """Raise ModelError with every missing, unexpected and mis-shaped tensor; reads names and shapes, and biases that
    the model does not have.

    ``where`` is the checkpoint's name in it.
    """
    names = source.names()
    wanted = {part.name for parameter in abstract for part in weights[parameter]}
    head = {part.name for part in weights.get("lm_head", ())}
    problems = [f"missing {name}{_UNTIED if name in head else ''}" for name in sorted(wanted - names)]
    problems += [f"unexpected {name}" for name in sorted(names - wanted) if not _is_harmless(source, name)]
    for parameter, spec in abstract.items():
        used = {part.name: None for part in weights[parameter]}  # ordered, each once
        if names.issuperset(used) and not _fits(weights[parameter], source, spec.shape):
            found = ", ".join(f"{name} {source.shape(name)}" for name in used)
            problems.append(f"mis-shaped {found} for {parameter} {spec.shape}")
    report(where, problems)


def _is_harmless(source: TensorSource, name: str) -> bool:
    """A rotary table, or a bias of zeros, which AutoGPTQ gives to layers that have none."""
    return bool(_HARMLESS.fullmatch(name)) or (name.endswith(".bias") and not source.read(name).any())


def report(where: object, problems: list[str]) -> None:
    if problems:
        raise ModelError(f"{where} does not fit the model: " + "; ".join(problems))


def _fits(weight: Weight, source: TensorSource, wanted: tuple[int, ...]) -> bool:
    """Whether the parts fill ``wanted``, tried on stand-ins that take no memory."""
    filled = 0
    for part in weight:
        try:
            shape = part.view(np.broadcast_to(np.int8(0), source.shape(part.name))).shape
            place = part.place(shape)
        except (ValueError, IndexError):  # numpy's, from reshaping what does not fit
            return False
        if len(place) != len(wanted) or any(axis.stop > size for axis, size in zip(place, wanted, strict=True)):
            return False
        filled += math.prod(shape)
    return filled == math.prod(wanted)
