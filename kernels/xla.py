"""Paged attention in plain jax.numpy: the CPU backend, and the twin that GPU kernels are compared with.

Both loops are bounded by the work list, that is by real lengths, never by max_model_len.
Softmax statistics are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.kernels.backend import AttentionShape, Backend, Target
from jaxserve.kernels.cache import KVCache, is_quantised
from jaxserve.kernels.inputs import AttentionInputs, Rotation
from jaxserve.kernels.plan import AttentionPlan, Tiling
from jaxserve.kernels.reach import Reach

DECODE_GROUP = 16
"""Decode items that one iteration handles together."""
PREFILL_TILE_TOKENS = 256
"""KV tokens that one iteration of a prefill item handles."""
MASKED = -1e30


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first dimensions of ``[T, ..., head_dim]``, in the two-halves layout of Hugging Face.

    cos, sin: ``float32[T, rotated dims / 2]``.
    """
    half = cos.shape[-1]
    cos, sin = (jnp.expand_dims(table, tuple(range(1, x.ndim - 1))) for table in (cos, sin))
    x32 = x.astype(jnp.float32)
    first, second, rest = x32[..., :half], x32[..., half : 2 * half], x32[..., 2 * half :]
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


@dataclass(frozen=True)
class Xla(Backend):
    """Serves every device. What is masked is read all the same, and multiplied by 0."""

    name = "xla"

    @staticmethod
    def needs(target: Target, shape: AttentionShape) -> str | None:
        return None

    def rotate_and_write(
        self, qkv: jax.Array, rotation: Rotation, cache: KVCache[jax.Array], inputs: AttentionInputs, layer: jax.Array
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        rows, kv_heads, width, dim = qkv.shape
        slots = inputs.slots + layer * inputs.limits.num_pages * cache.k.shape[1]
        scales = cache.scales[layer]
        group = width - len(cache.pages)
        q, (k, *values) = qkv[:, :, :group], (qkv[:, :, i] for i in range(group, width))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        stored = [k, *values]
        if is_quantised(cache.k.dtype):
            most = float(jnp.finfo(cache.k.dtype).max)
            stored = [jnp.clip(x / scale, -most, most) for x, scale in zip(stored, scales, strict=True)]
        written = [_write_rows(pages, x, slots) for pages, x in zip(cache.pages, stored, strict=True)]
        return q.reshape(rows, kv_heads * group, dim), cache.with_pages(written)

    def attend(
        self,
        q: jax.Array,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
        sinks: jax.Array | None,
        *,
        scale: float,
        reach: Reach,
        softcap: float | None,
    ) -> jax.Array:
        rows, heads, dim = q.shape
        kv_heads, quantised = cache.k.shape[2], is_quantised(cache.k.dtype)
        plan, tiling = inputs.plan, inputs.limits.tiling
        tables, scales = inputs.block_tables + layer * inputs.limits.num_pages, cache.scales[layer]
        q = (q * (scale * scales[0] if quantised else scale)).astype(q.dtype)
        q = q.reshape(rows, kv_heads, heads // kv_heads, dim)
        sinks = None if sinks is None else sinks.reshape(kv_heads, -1)
        keys, values = cache.k, cache.pages[-1]
        decoded = _decode(q, keys, values, tables, plan, tiling, reach, softcap, sinks)
        out = jnp.zeros_like(q).at[plan.combine[:, 0]].set(decoded, mode="drop")
        out = _prefill(q, keys, values, tables, plan, tiling, out, reach, softcap, sinks)
        return (out * scales[-1] if quantised else out).astype(q.dtype).reshape(rows, heads, dim)


def _write_rows(pages: jax.Array, rows: jax.Array, slots: jax.Array) -> jax.Array:
    """Scatter ``rows`` ``[T, kv_heads, head_dim]`` into ``pages`` ``[pages, page_size, kv_heads, head_dim]``."""
    flat = pages.reshape(-1, *pages.shape[2:])
    return flat.at[slots].set(rows.astype(pages.dtype)).reshape(pages.shape)


def _visible(keys: jax.Array, queries: jax.Array, reach: Reach) -> jax.Array:
    """Which keys each query sees, by their positions; the shapes broadcast."""
    causal = keys <= queries
    return causal & (keys >= reach.first_key(queries)) if reach.is_bounded else causal


def _softmax_tile(
    scores: jax.Array, visible: jax.Array, softcap: float | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maximum, sum and unnormalised weights of one tile's scores over the last axis; sum 0 where nothing is visible."""
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible, scores, MASKED)
    top = scores.max(axis=-1)
    weights = jnp.where(visible, jnp.exp(scores - top[..., None]), 0.0)
    return top, weights.sum(axis=-1), weights


def _decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tables: jax.Array,
    plan: AttentionPlan[jax.Array],
    tiling: Tiling,
    reach: Reach,
    softcap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Single-row queries: partial softmax for each KV tile, then one combine (split-KV, as in Flash-Decoding).

    q ``[T, kv_heads, group, head_dim]`` -> ``[max_combines, kv_heads, group, head_dim]``, in the order of
    ``plan.combine``; its unused entries give values that nobody reads.
    """
    page_size, kv_heads, dim = k_pages.shape[1:]
    group = q.shape[2]
    tile_pages = tiling.decode_pages(page_size)
    tile = tile_pages * page_size
    num_items = -(-plan.decode.shape[0] // DECODE_GROUP) * DECODE_GROUP
    items = jnp.pad(plan.decode, ((0, num_items - plan.decode.shape[0]), (0, 0)))
    tables = jnp.pad(tables, ((0, 0), (0, tile_pages)))

    def one_group(i: jax.Array, partials: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start = i * DECODE_GROUP
        item = jax.lax.dynamic_slice_in_dim(items, start, DECODE_GROUP)
        sequence, row, first_page, end_page, kv_len = (item[:, field] for field in (0, 1, 4, 5, 6))
        pages = tables[sequence[:, None], first_page[:, None] + jnp.arange(tile_pages)]
        shape = (DECODE_GROUP, tile, kv_heads, dim)
        k, v = (array[pages].reshape(shape).astype(q.dtype) for array in (k_pages, v_pages))
        scores = jnp.einsum("nkgd,ntkd->nkgt", q[row], k, preferred_element_type=jnp.float32)
        position = first_page[:, None] * page_size + jnp.arange(tile)
        visible = _visible(position, kv_len[:, None] - 1, reach) & (position < end_page[:, None] * page_size)
        top, total, weights = _softmax_tile(scores, visible[:, None, None], softcap)
        value = jnp.einsum("nkgt,ntkd->nkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)
            for whole, part in zip(partials, (top, total, value), strict=True)
        )

    statistics = jnp.zeros((num_items, kv_heads, group), jnp.float32)
    empty = (statistics + MASKED, statistics, jnp.zeros((num_items, kv_heads, group, dim), jnp.float32))
    num_groups = (plan.counts[0] + DECODE_GROUP - 1) // DECODE_GROUP
    top, total, value = jax.lax.fori_loop(0, num_groups, one_group, empty)

    # Combine by one small matrix product: which item is a part of which result.
    first, parts = plan.combine[:, 2, None], plan.combine[:, 3, None]
    number = jnp.arange(num_items)
    owned = (number >= first) & (number < first + parts)
    result_top = jnp.where(owned[..., None, None], top, MASKED).max(axis=1)
    result_top = result_top if sinks is None else jnp.maximum(result_top, sinks)
    owner = jnp.argmax(owned, axis=0)
    rescale = jnp.exp(jnp.minimum(top - result_top[owner], 0.0))
    shares = owned.astype(jnp.float32)
    combined = shares @ (value * rescale[..., None]).reshape(num_items, -1)
    totals = shares @ (total * rescale).reshape(num_items, -1)
    combined, totals = combined.reshape(-1, kv_heads, group, dim), totals.reshape(-1, kv_heads, group)
    totals = totals if sinks is None else totals + jnp.exp(sinks - result_top)
    return (combined / jnp.maximum(totals, 1e-30)[..., None]).astype(q.dtype)


def _prefill(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tables: jax.Array,
    plan: AttentionPlan[jax.Array],
    tiling: Tiling,
    out: jax.Array,
    reach: Reach,
    softcap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Tiles of query rows, each with an online softmax over its pages (as in FlashAttention); fills ``out``."""
    num_rows, kv_heads, group, dim = q.shape
    page_size = k_pages.shape[1]
    tile_rows = tiling.tile_rows(num_rows)
    tile_pages = max(1, PREFILL_TILE_TOKENS // page_size)
    tile = tile_pages * page_size
    # Room for the last tile's slice: dynamic_slice would otherwise shift it back.
    tables = jnp.pad(tables, ((0, 0), (0, tile_pages)))
    q = jnp.pad(q, ((0, tile_rows), (0, 0), (0, 0), (0, 0)))
    out = jnp.pad(out, ((0, tile_rows), (0, 0), (0, 0), (0, 0)))

    def one_item(i: jax.Array, out: jax.Array) -> jax.Array:
        sequence, row, num_item_rows, position, first_page, end_page = (plan.prefill[i, field] for field in range(6))
        if reach.is_bounded:
            first_page = jnp.maximum(first_page, reach.first_key(position) // page_size)
        q_tile = jax.lax.dynamic_slice_in_dim(q, row, tile_rows).transpose(1, 2, 0, 3)
        q_position = position + jnp.arange(tile_rows)[:, None]

        def one_tile(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, value = state
            page = first_page + j * tile_pages
            pages = jax.lax.dynamic_slice(tables, (sequence, page), (1, tile_pages))[0]
            k, v = (array[pages].reshape(tile, kv_heads, dim).astype(q.dtype) for array in (k_pages, v_pages))
            scores = jnp.einsum("kgrd,tkd->kgrt", q_tile, k, preferred_element_type=jnp.float32)
            visible = _visible(page * page_size + jnp.arange(tile), q_position, reach)
            tile_top, tile_total, weights = _softmax_tile(scores, visible, softcap)
            new_top = jnp.maximum(top, tile_top)
            old_scale, tile_scale = jnp.exp(top - new_top), jnp.exp(tile_top - new_top)
            tile_value = jnp.einsum("kgrt,tkd->kgrd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (
                new_top,
                total * old_scale + tile_total * tile_scale,
                value * old_scale[..., None] + tile_value * tile_scale[..., None],
            )

        statistics = jnp.zeros((kv_heads, group, tile_rows), jnp.float32)
        # A sink is a key that has been seen before all others.
        top, total = (MASKED, 0.0) if sinks is None else (sinks[..., None], 1.0)
        empty = (statistics + top, statistics + total, jnp.zeros((kv_heads, group, tile_rows, dim), jnp.float32))
        num_tiles = (end_page - first_page + tile_pages - 1) // tile_pages
        _, total, value = jax.lax.fori_loop(0, num_tiles, one_tile, empty)
        # Rows past the item, which belong to the next one, may have seen nothing. Keep what is there.
        attended = (value / jnp.maximum(total, 1e-30)[..., None]).transpose(2, 0, 1, 3).astype(q.dtype)
        current = jax.lax.dynamic_slice_in_dim(out, row, tile_rows)
        mine = (jnp.arange(tile_rows) < num_item_rows)[:, None, None, None]
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, attended, current), row, axis=0)

    return jax.lax.fori_loop(0, plan.counts[1], one_item, out)[:num_rows]
