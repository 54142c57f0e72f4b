"""Random hybrid batches for attention kernels alone: what they hold, what attention over them is, and chains of calls.

A batch is a sequence of (context, rows): ``rows`` query rows after ``context`` cached tokens; one row is a decode.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.evaluation.device_bench import Work
from jaxserve.kernels.attention import paged_attention, rotate_and_write
from jaxserve.kernels.backend import AttentionShape, Backend
from jaxserve.kernels.cache import KVCache, KVCacheShape, is_quantised
from jaxserve.kernels.inputs import AttentionInputs, Rotation
from jaxserve.kernels.plan import PlanLimits, make_plan, new_plan
from jaxserve.scheduler.buckets import bucket_of, token_buckets
from jaxserve.scheduler.step_time import num_seen_keys

MAX_NUM_SEQS = 128
LARGEST_BUCKET = 4096
LEAST_CACHE_BYTES = 2**28
"""Of all layers together: five times what an H100's L2 cache holds, so that no call finds its keys there."""
MOST_LAYERS = 32
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
"""Of the compiler: everything is launched by itself."""


@dataclass(frozen=True)
class RandomBatch:
    sequences: Sequence[tuple[int, int]]
    shape: AttentionShape
    num_layers: int
    qkv: jax.Array
    """``[T, kv_heads, group + 2, head_dim]``"""
    rotation: Rotation
    cache: KVCache[jax.Array]
    """Of ``num_layers``; everything in it is random, also what no sequence owns."""
    inputs: AttentionInputs
    window: int | None = None
    """Of all layers."""
    chunk: int | None = None
    softcap: float | None = None
    sinks: jax.Array | None = None

    @property
    def q(self) -> jax.Array:
        """``[T, heads, head_dim]``"""
        return self.qkv[:, :, :-2].reshape(len(self.qkv), self.shape.num_heads, self.shape.head_dim)

    @property
    def masking(self) -> dict[str, Any]:
        """What is special about the layers' attention, as kernels.attention.paged_attention takes it."""
        names = "window", "chunk", "softcap", "sinks"
        return {"scale": self.shape.head_dim**-0.5} | {name: getattr(self, name) for name in names}

    @property
    def num_rows(self) -> int:
        """Of all sequences; the batch's other rows are padding."""
        return sum(rows for _, rows in self.sequences)


def random_batch(
    sequences: Sequence[tuple[int, int]],
    shape: AttentionShape,
    backend: Backend,
    *,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    has_sinks: bool = False,
    rotated: int | None = None,
    poison: float | None = None,
    cache_bytes: int = LEAST_CACHE_BYTES,
    seed: int = 0,
) -> RandomBatch:
    """On the default device, with a work list as ``backend`` wants it, in pages that lie anywhere.

    There are as many layers as make ``cache_bytes``, but between 2 and MOST_LAYERS. rotated: dimensions that are,
    all by default. poison: what lies in the cache where no sequence has a token, random numbers by default.
    """
    random = np.random.default_rng(seed)
    page_size, num_rows = shape.page_size, bucket_of(sum(n for _, n in sequences), token_buckets(LARGEST_BUCKET))
    lengths = np.array([context + rows for context, rows in sequences])
    pages_each = -(-lengths // page_size)
    num_pages = 1 + int(pages_each.sum())
    limits = PlanLimits(
        num_rows, max(MAX_NUM_SEQS, len(sequences)), int(lengths.max()), page_size, num_pages, backend.tiling, window
    )
    free = random.permutation(np.arange(1, num_pages))
    tables = np.zeros((limits.max_num_seqs, pages_each.max()), np.int32)
    slots, row = np.zeros(num_rows, np.int32), 0
    owned = np.zeros(num_pages * page_size, bool)
    for table, (context, rows), last in zip(tables, sequences, np.cumsum(pages_each), strict=False):
        count = -(-(context + rows) // page_size)
        table[:count] = free[last - count : last]
        page, offset = np.divmod(np.arange(context + rows), page_size)
        places = table[page] * page_size + offset
        owned[places] = True
        slots[row : row + rows] = places[context:]
        row += rows
    plan = new_plan(limits)
    query_lens = np.array([rows for _, rows in sequences])
    make_plan(limits, np.arange(len(sequences)), query_lens, lengths, plan)
    on_device = jax.device_put((slots, tables, plan))
    inputs = AttentionInputs(on_device[0], on_device[1], on_device[2], limits, backend, mesh=None)

    kv_heads, dim = shape.num_kv_heads, shape.head_dim
    one_layer = KVCacheShape(1, kv_heads, dim, page_size, shape.cache_dtype)
    num_layers = min(max(2, -(-cache_bytes // (num_pages * one_layer.block_bytes))), MOST_LAYERS)
    keys = jax.random.split(jax.random.key(seed), 4)
    sinks = jax.random.normal(keys[3], (shape.num_heads,)) if has_sinks else None
    qkv = jax.random.normal(keys[0], (num_rows, kv_heads, shape.num_heads // kv_heads + 2, dim), shape.dtype)
    angles = jax.random.uniform(keys[1], (num_rows, (dim if rotated is None else rotated) // 2), maxval=2 * math.pi)
    rotation = (jnp.cos(angles), jnp.sin(angles)) if angles.size else None
    cache_shape = dataclasses.replace(one_layer, num_layers=num_layers)
    value_width = math.sqrt(int(lengths.min()) / (2 * math.e))
    cache = _random_cache(keys[2], cache_shape, num_pages, shape.dtype, value_width)
    if poison is not None:
        everywhere = jnp.tile(owned.reshape(num_pages, page_size), (num_layers, 1))[:, :, None, None]
        k, v = (jnp.where(everywhere, pages, jnp.asarray(poison, pages.dtype)) for pages in cache.pages)
        cache = cache._replace(k=k, v=v)
    return RandomBatch(sequences, shape, num_layers, qkv, rotation, cache, inputs, window, chunk, softcap, sinks)


def _random_cache(
    key: jax.Array, shape: KVCacheShape, num_pages: int, dtype: jnp.dtype, value_width: float
) -> KVCache[jax.Array]:
    """Keys of standard deviation 1; values so wide that a call's output, the next one's queries, does not fade away."""
    widths, scales = (1.0, value_width), (1.0, 1.0)
    if is_quantised(shape.dtype):
        widths, scales = scales, widths

    @partial(jax.jit, static_argnums=1)
    def make(key: jax.Array, width: float) -> jax.Array:
        values = jax.random.normal(key, shape.pages_shape(num_pages), dtype) * jnp.asarray(width, dtype)
        return values.astype(shape.dtype)

    k, v = (make(key, width) for key, width in zip(jax.random.split(key), widths, strict=True))
    return KVCache(k, v, jnp.tile(jnp.array(scales, jnp.float32), (shape.num_layers, 1)))


def attention_work(sequences: Sequence[tuple[int, int]], shape: AttentionShape, window: int | None = None) -> Work:
    """Every key and value that is seen is read once, queries too, and outputs are written."""
    pairs = sum(num_seen_keys(context, rows, window) for context, rows in sequences)
    tokens = sum(min(context, math.inf if window is None else window - 1) + rows for context, rows in sequences)
    cached = 2 * tokens * shape.num_kv_heads * shape.cache_dtype.itemsize
    rows = 2 * sum(rows for _, rows in sequences) * shape.num_heads * shape.dtype.itemsize
    return Work(4 * pairs * shape.num_heads * shape.head_dim, (cached + rows) * shape.head_dim)


def rotation_work(num_rows: int, shape: AttentionShape) -> Work:
    """Queries, keys and values are read once and written once."""
    heads, cached = shape.num_heads + 2 * shape.num_kv_heads, 2 * shape.num_kv_heads
    item, cache_item = shape.dtype.itemsize, shape.cache_dtype.itemsize
    num_bytes = num_rows * shape.head_dim * ((heads + shape.num_heads) * item + cached * cache_item)
    return Work(3 * num_rows * shape.head_dim * (shape.num_heads + shape.num_kv_heads), num_bytes)


def attention_error(batch: RandomBatch) -> float:
    """Relative to dense attention in float64, over all rows; infinite where the kernel leaves a row out."""
    return attention_errors(batch, 1)[0]


def attention_errors(batch: RandomBatch, runs: int) -> list[float]:
    """The same of several runs of one program. Errors that differ are a race's."""
    layer = batch.num_layers - 1
    with jax.enable_x64(True):
        exact = _exact_attention(batch, batch.q, layer)

    # The output takes the place of the donated operand, so a row that nobody writes stays NaN.
    @partial(jax.jit, donate_argnums=0, keep_unused=True)
    def attend(poison: jax.Array, q: jax.Array, cache: KVCache[jax.Array], inputs: AttentionInputs) -> jax.Array:
        return paged_attention(q, cache, inputs, jnp.int32(layer), **batch.masking)

    def error() -> float:
        out = attend(jnp.full_like(q, jnp.nan), q, batch.cache, batch.inputs)
        padding = out[batch.num_rows :]
        if not bool(jnp.isfinite(out).all()) or bool(padding.any()):
            return math.inf
        with jax.enable_x64(True):
            return _relative_error(out[: batch.num_rows], exact)

    q = batch.q
    return [error() for _ in range(runs)]


def rotation_error(batch: RandomBatch) -> float:
    """Relative to float64, of queries, keys and values together; infinite where anything else in the cache changes."""
    layer, rows = batch.num_layers - 1, batch.num_rows
    rotate = jax.jit(partial(rotate_and_write, layer=jnp.int32(layer)))
    q, cache = rotate(batch.qkv, batch.rotation, batch.cache, batch.inputs)
    slots = batch.inputs.slots + layer * batch.inputs.limits.num_pages * batch.shape.page_size
    written = []
    for before, after, scale in zip(batch.cache.pages, cache.pages, batch.cache.scales[layer], strict=True):
        flat_before, flat_after = (pages.reshape(-1, *pages.shape[2:]) for pages in (before, after))
        same = flat_before.at[slots].set(flat_after[slots]) == flat_after
        if not bool((same | jnp.isnan(flat_after)).all()):  # poison is not equal to itself
            return math.inf
        written.append(flat_after[slots][:rows].astype(jnp.float32) * scale)
    exact = np.asarray(batch.qkv, np.float64)[:rows]
    if batch.rotation is not None:
        cos, sin = (np.asarray(table, np.float64)[:rows, None, None] for table in batch.rotation)
        turned = exact[:, :, :-1, : 2 * cos.shape[-1]]
        first, second = np.split(turned, 2, axis=-1)
        turned[:] = np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    got = np.concatenate(
        (np.asarray(q, np.float64)[:rows].reshape(exact[:, :, :-2].shape), *(_heads(array) for array in written)),
        axis=2,
    )
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def _heads(array: jax.Array) -> np.ndarray:
    return np.asarray(array, np.float64)[:, :, None]


def attention_chain(batch: RandomBatch, num_calls: int, *, graphs: bool = True) -> Callable[[], jax.Array]:
    """Starts a program of ``num_calls`` attentions in a row: each has its own layer's keys, and the output of the one
    before as its queries, so none can begin before that one ends. ``graphs``: on a GPU it is a CUDA graph."""

    # Donated, for the same buffers in every launch: else XLA captures its CUDA graph anew.
    @partial(jax.jit, donate_argnums=0, compiler_options=None if graphs else NO_GRAPHS)
    def chain(q: jax.Array, cache: KVCache[jax.Array], inputs: AttentionInputs) -> jax.Array:
        for call in range(num_calls):
            q = paged_attention(q, cache, inputs, jnp.int32(call % batch.num_layers), **batch.masking)
        return q

    q = batch.q

    def launch() -> jax.Array:
        nonlocal q
        q = chain(q, batch.cache, batch.inputs)
        return q

    return launch


def rotation_chain(batch: RandomBatch, num_calls: int) -> Callable[[], list[jax.Array]]:
    """Starts a program of ``num_calls`` rotations, each of other rows into another layer of one cache.

    ``batch`` loses its cache.
    """

    @partial(jax.jit, donate_argnums=0)
    def chain(
        cache: KVCache[jax.Array], all_qkv: list[jax.Array], rotation: Rotation, inputs: AttentionInputs
    ) -> tuple[KVCache[jax.Array], list[jax.Array]]:
        queries = []  # returned, or XLA would not rotate them
        for call, qkv in enumerate(all_qkv):
            q, cache = rotate_and_write(qkv, rotation, cache, inputs, jnp.int32(call % batch.num_layers))
            queries.append(q)
        return cache, queries

    cache = batch.cache
    all_qkv = [jnp.roll(batch.qkv, call, axis=0) for call in range(num_calls)]

    def launch() -> list[jax.Array]:
        nonlocal cache
        cache, queries = chain(cache, all_qkv, batch.rotation, batch.inputs)
        return queries

    return launch


def _exact_attention(batch: RandomBatch, q: jax.Array, layer: int) -> jax.Array:
    """``float64[num_rows, heads, head_dim]``. Decodes share one program and chunks another: compiling is what takes
    long."""
    pages = batch.inputs.block_tables + layer * batch.inputs.limits.num_pages
    length = max(context + rows for context, rows in batch.sequences)
    most_rows = max(rows for _, rows in batch.sequences)
    q = jnp.concatenate((q, jnp.zeros((most_rows, *q.shape[1:]), q.dtype)))
    masking = {**batch.masking, "length": length}
    outs, row = [], 0
    for slot, (context, rows) in enumerate(batch.sequences):
        out = _exact_sequence(
            q, batch.cache, pages[slot], batch.cache.scales[layer], row, context, rows,
            num_rows=1 if rows == 1 else most_rows, **masking,
        )  # fmt: skip
        outs.append(out[:rows])
        row += rows
    return jnp.concatenate(outs)


@partial(jax.jit, static_argnames=("num_rows", "length", "scale", "window", "chunk", "softcap"))
def _exact_sequence(
    q: jax.Array,
    cache: KVCache[jax.Array],
    pages: jax.Array,
    scales: jax.Array,
    first_row: jax.Array,
    context: jax.Array,
    rows: jax.Array,
    *,
    num_rows: int,
    length: int,
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Dense attention of one sequence of at most ``num_rows`` rows and ``length`` keys, a KV head at a time: the scores
    of all would fill the device."""
    _, page_size, kv_heads, dim = cache.k.shape
    table = pages[: -(-length // page_size)]
    queries = jax.lax.dynamic_slice_in_dim(q, first_row, num_rows).reshape(num_rows, kv_heads, -1, dim)
    key, position = jnp.arange(length), context + jnp.arange(num_rows)[:, None]
    visible, held = key <= position, (key < context + rows)[:, None]
    if window is not None:
        visible &= key > position - window
    if chunk is not None:
        visible &= key // chunk == position // chunk

    def one_head(head: jax.Array) -> jax.Array:
        k, v = (
            jnp.where(held, array[table, :, head].reshape(-1, dim)[:length], 0).astype(jnp.float64) * scales[i]
            for i, array in enumerate(cache.pages)
        )
        scores = jnp.einsum("rgd,td->grt", queries[:, head].astype(jnp.float64), k) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(visible, scores, -jnp.inf)
        if sinks is not None:
            sink = sinks.astype(jnp.float64).reshape(kv_heads, -1)[head]
            scores = jnp.concatenate((scores, jnp.broadcast_to(sink[:, None, None], (*scores.shape[:2], 1))), axis=-1)
        return jnp.einsum("grt,td->rgd", jax.nn.softmax(scores)[..., :length], v)

    out = jax.lax.map(one_head, jnp.arange(kv_heads))
    return out.transpose(1, 0, 2, 3).reshape(num_rows, -1, dim)


def _relative_error(got: jax.Array, exact: jax.Array) -> float:
    difference = got.astype(jnp.float64) - exact
    return float(jnp.sqrt((difference**2).sum() / (exact**2).sum()))
