"""From the tensors of a checkpoint to the parameters that layers have: other shapes and orders, views all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from jaxserve.models.config import ModelConfig
from jaxserve.models.weights import Part, Weight, unchanged, whole


def outer_weights(
    config: ModelConfig, *, embedding: str = "model.embed_tokens", norm: str = "model.norm", head: str = "lm_head"
) -> dict[str, Weight]:
    """Everything but the layers, from the tensors of these names."""
    found = {"embedding": whole(f"{embedding}.weight"), **norm_weights(config, "norm", norm)}
    if not config.tie_word_embeddings:
        found["lm_head"] = whole(f"{head}.weight")
    if config.head_bias:
        found["lm_head_bias"] = whole(f"{head}.bias")
    return found


def norm_weights(config: ModelConfig, ours: str, theirs: str) -> dict[str, Weight]:
    """The weights of a norm at ``ours`` from tensors named ``theirs``."""
    kinds = ("weight", "bias") if config.norm == "layer" else ("weight",)
    return {f"{ours}.{kind}": whole(f"{theirs}.{kind}") for kind in kinds}


def head_norm_weights(config: ModelConfig, ours: str, theirs: str) -> dict[str, Weight]:
    """The weights of Attention's ``q_norm`` and ``k_norm`` at ``ours``, from tensors of these names."""
    if config.qk_norm == "head":
        return norm_weights(config, f"{ours}.q_norm", f"{theirs}.q_norm") | norm_weights(
            config, f"{ours}.k_norm", f"{theirs}.k_norm"
        )
    if config.qk_norm == "all_heads":
        held, group, dim = config.num_held_kv_heads, config.group_size, config.head_dim

        def queries(tensor: np.ndarray) -> np.ndarray:
            return tensor.reshape(held, group, dim)

        def keys(head: int, tensor: np.ndarray) -> np.ndarray:
            return tensor.reshape(config.num_kv_heads, 1, dim)[head : head + 1]

        heads = (Part(f"{theirs}.k_norm.weight", partial(keys, i // config.kv_copies), (i,)) for i in range(held))
        return {
            f"{ours}.q_norm.weight": whole(f"{theirs}.q_norm.weight", queries),
            f"{ours}.k_norm.weight": tuple(heads),
        }
    return {}


def separate_qkv(config: ModelConfig, prefix: str, kind: str = "weight") -> Weight:
    """Attention.qkv, or its bias, from ``{prefix}.q_proj``, ``k_proj`` and ``v_proj``.

    Where attention has a gate, q_proj has of each head its query and then its gate."""
    q_rows = partial(_query_or_gate, config, 0) if config.attention_gate else unchanged
    q, k, v = (f"{prefix}.{part}_proj.{kind}" for part in "qkv")
    return _qkv(config, (q, q_rows), (k, unchanged), (v, unchanged))


def queries_and_keys(config: ModelConfig, prefix: str) -> Weight:
    """Attention.qkv where values are made as keys are, before either is normed."""
    keys = f"{prefix}.k_proj.weight", unchanged
    return _qkv(config, (f"{prefix}.q_proj.weight", unchanged), keys, keys)


def queries(config: ModelConfig, prefix: str) -> Weight:
    """ReadingAttention.qkv."""

    def rows(tensor: np.ndarray) -> np.ndarray:
        return _grouped(config.num_held_kv_heads, _by_head(config.num_heads, config.head_dim, tensor))

    return whole(f"{prefix}.q_proj.weight", rows)


def query_gate(config: ModelConfig, name: str) -> Weight:
    """Attention.gate from a q_proj."""

    def gates(tensor: np.ndarray) -> np.ndarray:
        heads = _by_head(config.num_heads, config.head_dim, _query_or_gate(config, 1, tensor))
        return _grouped(config.num_held_kv_heads, heads)

    return whole(name, gates)


def _query_or_gate(config: ModelConfig, which: int, tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(config.num_heads, 2, config.head_dim, *tensor.shape[1:])[:, which]


def consecutive_qkv(config: ModelConfig, name: str, outputs_last: bool = False) -> Weight:
    """Attention.qkv, or its bias, from one tensor of all query rows, then all key rows, then all value rows."""
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def rows(begin: int, end: int, tensor: np.ndarray) -> np.ndarray:
        tensor = tensor.T if outputs_last else tensor
        if len(tensor) != q_rows + 2 * kv_rows:
            raise ValueError(f"{len(tensor)} rows, expected {q_rows + 2 * kv_rows}")
        return tensor[begin:end]

    ends = q_rows, q_rows + kv_rows, q_rows + 2 * kv_rows
    return _qkv(config, *((name, partial(rows, begin, end)) for begin, end in pairwise((0, *ends))))


def fused_qkv(config: ModelConfig, name: str) -> Weight:
    """Attention.qkv, or its bias, from one tensor that is ordered by KV head already: query rows, key, value."""
    group = config.num_heads // config.num_kv_heads
    split = partial(_by_head, config.num_kv_heads * (group + 2), config.head_dim)
    if config.kv_copies == 1:
        return whole(name, lambda tensor: _grouped(config.num_kv_heads, split(tensor)))

    def heads(first: int, count: int, tensor: np.ndarray) -> np.ndarray:
        return split(tensor)[None, first : first + count]

    parts = []
    for held in range(config.num_held_kv_heads):
        head, copy = divmod(held, config.kv_copies)
        begin, share = head * (group + 2), config.group_size
        parts.append(Part(name, partial(heads, begin + copy * share, share), (held, 0)))
        parts.append(Part(name, partial(heads, begin + group, 2), (held, share)))
    return tuple(parts)


def _qkv(config: ModelConfig, *tensors: tuple[str, Callable[[np.ndarray], np.ndarray]]) -> Weight:
    """From tensors of query, key and value rows, each by its name and the view of it that holds the rows."""
    (q_name, q_rows), (k_name, k_rows), (v_name, v_rows) = tensors
    held, group, dim = config.num_held_kv_heads, config.group_size, config.head_dim

    def queries(dims: slice, tensor: np.ndarray) -> np.ndarray:
        return _grouped(held, _by_head(config.num_heads, dim, q_rows(tensor)))[:, :, dims]

    def heads(rows: Callable[[np.ndarray], np.ndarray], picked: slice, dims: slice, tensor: np.ndarray) -> np.ndarray:
        return _by_head(config.num_kv_heads, dim, rows(tensor))[picked, None, dims]

    parts = [Part(q_name, partial(queries, dims), (0, 0, start)) for dims, start in _rotated_dims(config)]
    everything = [(slice(None), 0)]
    for column, name, rows, places in (
        (group, k_name, k_rows, _rotated_dims(config)),
        (group + 1, v_name, v_rows, everything),
    ):
        for dims, start in places:
            if config.kv_copies == 1:
                parts.append(Part(name, partial(heads, rows, slice(None), dims), (0, column, start)))
                continue
            for place in range(held):
                head = place // config.kv_copies
                parts.append(Part(name, partial(heads, rows, slice(head, head + 1), dims), (place, column, start)))
    return tuple(parts)


def _rotated_dims(config: ModelConfig) -> list[tuple[slice, int]]:
    """Which of a query's or a key's dimensions in a file lie at which place of a head here, where the two that are
    rotated together are half of the rotated ones apart."""
    rope = config.rope
    if rope is None or not rope.interleaved:
        return [(slice(None), 0)]
    places = [(slice(0, rope.dim, 2), 0), (slice(1, rope.dim, 2), rope.dim // 2)]
    return places if rope.dim == config.head_dim else [*places, (slice(rope.dim, None), rope.dim)]


def split_heads(config: ModelConfig, out: np.ndarray) -> np.ndarray:
    """Hugging Face's o_proj ``[hidden, heads * head_dim]`` as Attention.out."""
    return out.reshape(-1, config.num_held_kv_heads, config.group_size, config.head_dim)


def by_kv_head(config: ModelConfig, tensor: np.ndarray) -> np.ndarray:
    """``[heads]`` -> ``[kv_heads, group]``."""
    return tensor.reshape(config.num_held_kv_heads, config.group_size)


def _by_head(num_heads: int, head_dim: int, rows: np.ndarray) -> np.ndarray:
    """Of rows, or of what has them by head already."""
    return rows.reshape(num_heads, head_dim, *rows.shape[1:][-1:])


def _grouped(num_groups: int, heads: np.ndarray) -> np.ndarray:
    return heads.reshape(num_groups, -1, *heads.shape[1:])


Piece = tuple[int, int, int]
"""Rows of a tensor by heads: where they begin, how many each head has, and where they begin in the parameter's."""


def by_head(name: str, num_heads: int, pieces: Sequence[Piece]) -> Weight:
    """Parts of a parameter ``[heads, rows, ...]``, from a tensor ``[rows, ...]`` that has rows of one kind, the first
    head's first, and behind all heads' those of the next kind."""

    def view(first: int, each: int, tensor: np.ndarray) -> np.ndarray:
        return tensor[first : first + num_heads * each].reshape(num_heads, each, *tensor.shape[1:])

    return tuple(Part(name, partial(view, first, each), (0, place)) for first, each, place in pieces)


def convolution(name: str, num_heads: int, pieces: Sequence[Piece]) -> Weight:
    """The same of a convolution's filters, which see one channel each: ``[channels, 1, width]``."""

    def view(part: Part, tensor: np.ndarray) -> np.ndarray:
        return part.view(tensor[:, 0])

    return tuple(Part(name, partial(view, part), part.start) for part in by_head(name, num_heads, pieces))
