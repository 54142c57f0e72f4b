"""The output head of a model whose config.json ties it to the embedding."""

from __future__ import annotations

import dataclasses
import logging
from typing import Protocol

import numpy as np

from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.weights import TensorSource

logger = logging.getLogger(__name__)

_CHUNK_ROWS = 4096


class EditableSource(TensorSource, Protocol):
    def take(self, name: str, new_name: str | None = None) -> None:
        """Give the tensor ``name`` the ``new_name``, or take it out."""
        ...


def settle(source: EditableSource, config: ModelConfig, family: Family) -> ModelConfig:
    """``config``, tied or not as its files are, whatever it says: transformers 5's tie_weights.

    A head in the files that differs from the embedding is used. One that is the same is taken out of ``source``, and
    one without an embedding becomes it. Reads both tensors where both are there, up to the first difference.
    """
    if not config.tie_word_embeddings:
        return config
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    weights = family.weights(untied)
    (embedding,), (head,) = weights["embedding"], weights["lm_head"]
    names = source.names()
    if head.name not in names:
        return config
    if embedding.name not in names:
        source.take(head.name, embedding.name)
        return config
    if _same(source.read(embedding.name), source.read(head.name)):
        source.take(head.name)
        return config
    logger.warning(
        "tie_word_embeddings is true, but the files have %s, which differs from %s: it is used",
        head.name,
        embedding.name,
    )
    return untied


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether all values are, in chunks that take little memory."""
    if one.shape != other.shape:
        return False
    kind = np.dtype(np.float32) if one.dtype != other.dtype else one.dtype
    chunks = (
        (array[first : first + _CHUNK_ROWS] for array in (one, other)) for first in range(0, len(one), _CHUNK_ROWS)
    )
    return all(np.array_equal(a.astype(kind, copy=False), b.astype(kind, copy=False)) for a, b in chunks)
