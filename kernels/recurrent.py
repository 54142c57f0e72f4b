"""Layers whose memory of a sequence does not grow, over a hybrid batch.

Of each sequence such a layer has a matrix M per value head, ``[key_dim, value_dim]``, and the last few inputs of a
short convolution, both in the sequence's slot. A token with query q, key k, value v, decay a and rate b makes

    M <- a M;  M <- M + k (b v)            of state spaces (Mamba-2, arXiv 2405.21060), or
    M <- a M;  M <- M + k (b (v - k M))    by the gated delta rule (arXiv 2412.06464), which corrects what M has of k

and reads q M. Tokens that are alone in their step, decodes, do that. A prompt's chunk is cut into tiles, and what its
tokens change is found for all of a tile at once (section 3.3 of the latter, its WY form), so that a tile is a few
products and M is read and written once. Whoever comes first in a sequence finds M empty, whatever the slot's last owner
has left there.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxserve.kernels.cache import recurrent_specs
from jaxserve.kernels.shards import per_shard

TILE_ROWS = 64
"""Of a chunk, that are solved at once: the paper's choice, too."""
STEP_ROWS = 16
"""Decodes that are computed at once."""


class Segments(NamedTuple):
    """A batch's rows as chunks of sequences, whose rows follow each other. Lists end in what is of no row."""

    slots: jax.Array
    """``int32[T]``: of each row's sequence; of padding one that does not exist."""
    places: jax.Array
    """``int32[T]``: of each row in its chunk."""
    is_first: jax.Array
    """``bool[T]``: whether the row's chunk is its sequence's first."""
    ends: jax.Array
    """``int32[min(T, S)]``: the chunks' last rows."""
    edges: jax.Array
    """``int32[min(T, S * reach)]``: rows whose convolution reaches back over their chunk's begin, ``reach`` rows."""
    singles: jax.Array
    """``int32[min(T, S)]``: rows that are alone in their chunk."""
    num_singles: jax.Array
    tiles: jax.Array
    """``int32[n, 2]``: of the other chunks the first row and the number of rows of each tile, in their order."""
    num_tiles: jax.Array


def segments_of(seqs: jax.Array, positions: jax.Array, is_token: jax.Array, *, num_slots: int, reach: int) -> Segments:
    """From a step's rows, ``[T]`` each: the slots of their sequences, their positions, whether they are of any."""
    total = len(seqs)
    rows = jnp.arange(total, dtype=jnp.int32)
    slots = jnp.where(is_token, seqs, num_slots)
    begins = (slots != jnp.roll(slots, 1)) | (rows == 0)
    ends = (slots != jnp.roll(slots, -1)) | (rows == total - 1)
    places = rows - jax.lax.cummax(jnp.where(begins, rows, 0))
    left = jax.lax.cummin(jnp.where(ends, rows, total), reverse=True) + 1 - rows

    def listed(chosen: jax.Array, most: int) -> jax.Array:
        return jnp.nonzero(chosen & is_token, size=most, fill_value=total)[0].astype(jnp.int32)

    single = begins & ends
    begins_tile = (places % TILE_ROWS == 0) & ~single
    firsts = listed(begins_tile, max(1, total // 2))
    lengths = jnp.minimum(left.at[firsts].get(mode="fill", fill_value=0), TILE_ROWS)
    return Segments(
        slots=slots,
        places=places,
        is_first=positions == places,
        ends=listed(ends, min(total, num_slots)),
        edges=listed(places < reach, min(total, num_slots * reach)),
        singles=listed(single, min(total, num_slots)),
        num_singles=(single & is_token).sum(),
        tiles=jnp.stack((firsts, lengths), axis=1),
        num_tiles=(begins_tile & is_token).sum(),
    )


REPLICATED, HEADS, KERNEL = PartitionSpec(), PartitionSpec(None, "tensor"), PartitionSpec("tensor")
STATE = recurrent_specs(tensor="tensor").memory
"""How arrays lie on a mesh: key heads are divided, and value heads with them."""


class RuleRows(NamedTuple):
    """What rows bring to the rule, in float32: ``[T, key_heads, key_dim]``, then ``[T, key_heads, values_per_key]``, of
    values with another axis."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    decay: jax.Array
    """log a"""
    rate: jax.Array


class RunRows(Protocol):
    """Runs a rule on one device's heads."""

    def __call__(
        self, rows: RuleRows, memory: jax.Array, segments: Segments, layer: jax.Array, corrects: bool
    ) -> tuple[jax.Array, jax.Array]:
        """What the rows read, ``float32[T, key_heads, values_per_key, value_dim]``, and the memory with them in it.

        memory: of all layers, as RecurrentState has it; ``layer``: a scalar, the number of this one. corrects: whether
        the rule is the gated delta rule.
        """
        ...


def recur(
    run: RunRows,
    rows: RuleRows,
    memory: jax.Array,
    segments: Segments,
    layer: jax.Array,
    *,
    corrects: bool,
    mesh: Mesh | AbstractMesh | None,
) -> tuple[jax.Array, jax.Array]:
    """``run`` of a backend, on each device's own heads."""
    specs = HEADS, STATE, REPLICATED, REPLICATED
    function = per_shard(partial(run, corrects=corrects), mesh, specs, (HEADS, STATE))
    return function(rows, memory, segments, layer)


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    inputs: jax.Array,
    segments: Segments,
    layer: jax.Array,
    *,
    mesh: Mesh | AbstractMesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Each channel's causal convolution over its sequence, ``float32[T, key_heads, channels]``, and the new inputs.

    x: ``[T, key_heads, channels]``; kernel: ``[key_heads, channels, conv_width]``; inputs: as RecurrentState has them.
    """
    specs = HEADS, KERNEL, STATE, REPLICATED, REPLICATED
    return per_shard(_convolve, mesh, specs, (HEADS, STATE))(x, kernel, inputs, segments, layer)


def run_rows(
    rows: RuleRows, memory: jax.Array, segments: Segments, layer: jax.Array, corrects: bool
) -> tuple[jax.Array, jax.Array]:
    """See RunRows; on any device."""
    out = jnp.zeros(rows.value.shape, jnp.float32)
    memory, out = _run_tiles(rows, memory, out, segments, layer, corrects)
    memory, out = _run_singles(rows, memory, out, segments, layer, corrects)
    return out, memory


def _convolve(
    x: jax.Array, kernel: jax.Array, inputs: jax.Array, segments: Segments, layer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each channel's causal convolution over its sequence, ``float32[T, key_heads, channels]``, and the new inputs."""
    width, num_slots = kernel.shape[-1], inputs.shape[1]
    weights = kernel.astype(jnp.float32)

    def input_before(rows: jax.Array, back: int) -> jax.Array:
        """Of each row the input so many tokens back: of this step, or of those before, or nothing."""
        place, is_first = segments.places[rows], segments.is_first[rows]
        here = x.at[jnp.maximum(rows - back, 0)].get(mode="fill", fill_value=0)
        kept = inputs[layer, segments.slots[rows], :, :, jnp.clip(width - 1 - back + place, 0, width - 2)]
        earlier = jnp.where(is_first[:, None, None], 0, kept)
        return jnp.where((place >= back)[:, None, None], here, earlier)

    # Most rows have all they need above them; what the roll brings to the others is replaced. One sum serves all, so it
    # does not depend on where a prompt is cut.
    edges = segments.edges
    taken = [x, *(jnp.roll(x, n, axis=0).at[edges].set(input_before(edges, n), mode="drop") for n in range(1, width))]
    products = [x.astype(jnp.float32) * weights[..., width - 1 - back] for back, x in enumerate(taken)]
    y = jnp.stack(products).sum(axis=0)
    last = jnp.stack([input_before(segments.ends, back) for back in reversed(range(width - 1))], axis=-1)
    owners = segments.slots.at[segments.ends].get(mode="fill", fill_value=num_slots)
    return y, inputs.at[layer, owners].set(last, mode="drop")


def _run_tiles(
    rows: RuleRows, memory: jax.Array, out: jax.Array, segments: Segments, layer: jax.Array, corrects: bool
) -> tuple[jax.Array, jax.Array]:
    """The memory with all tiles in it, and ``out`` with what their rows read."""
    total = len(out)
    size = min(TILE_ROWS, total)

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, size), *[(0, 0)] * (x.ndim - 1)])

    def cut(x: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, first, size)

    everything, out = jax.tree.map(padded, rows), padded(out)

    def run(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        memory, out = carry
        first, num_rows = segments.tiles[number]
        slot = segments.slots[first]
        is_row = jnp.arange(size) < num_rows
        mine = jax.tree.map(
            lambda x: jnp.where(_beside(is_row, x), x, 0), RuleRows(*(cut(x, first) for x in everything))
        )
        is_new = segments.is_first[first] & (segments.places[first] == 0)
        read, after = _tile(mine, jnp.where(is_new, 0, memory[layer, slot]), corrects)
        read = jnp.where(_beside(is_row, read), read, cut(out, first))
        return memory.at[layer, slot].set(after), jax.lax.dynamic_update_slice_in_dim(out, read, first, axis=0)

    memory, out = jax.lax.fori_loop(0, segments.num_tiles, run, (memory, out))
    return memory, out[:total]


def _tile(rows: RuleRows, memory: jax.Array, corrects: bool) -> tuple[jax.Array, jax.Array]:
    """What consecutive tokens of a sequence read, and the memory behind the last; rows of zeros change nothing."""
    query, key, value, decay, rate = rows
    size = len(query)
    decayed = jnp.cumsum(decay, axis=0).transpose(1, 2, 0)[..., None]  # [key heads, values, rows, 1], up to each row
    rates, values = rate.transpose(1, 2, 0)[..., None], value.transpose(1, 2, 0, 3)
    keys, queries = key.swapaxes(0, 1)[:, None], query.swapaxes(0, 1)[:, None]  # [key heads, 1, rows, key_dim]
    is_causal = jnp.tril(jnp.ones((size, size), bool))
    fading = jnp.exp(jnp.where(is_causal, decayed - decayed.swapaxes(-1, -2), -jnp.inf))
    changes = rates * values
    if corrects:
        # The changes D of all tokens solve (I + L) D = B V - B exp(G) K M: below its diagonal, L has how much of a
        # token's key is in the later ones. Of the matrix that part is read.
        overlap = _einsum("ihd,jhd->hij", key, key)[:, None] * fading * rates
        wanted = jnp.concatenate((changes, rates * jnp.exp(decayed) * keys), axis=-1)
        solved = solve_triangular(overlap, wanted, lower=True, unit_diagonal=True)
        of_values, of_keys = jnp.split(solved, (values.shape[-1],), axis=-1)
        changes = of_values - _einsum("hvtk,hvkd->hvtd", of_keys, memory)
    seen = _einsum("ihd,jhd->hij", query, key)[:, None] * fading
    read = _einsum("hvtk,hvkd->hvtd", queries * jnp.exp(decayed), memory) + _einsum("hvij,hvjd->hvid", seen, changes)
    last = decayed[:, :, -1:]
    after = memory * jnp.exp(last) + _einsum("hvtk,hvtd->hvkd", keys * jnp.exp(last - decayed), changes)
    return read.transpose(2, 0, 1, 3), after


def _run_singles(
    rows: RuleRows, memory: jax.Array, out: jax.Array, segments: Segments, layer: jax.Array, corrects: bool
) -> tuple[jax.Array, jax.Array]:
    """The memory with the rows in it that are alone in their chunk, and ``out`` with what they read."""
    num_slots, at_once = memory.shape[1], min(STEP_ROWS, len(segments.singles))
    singles = jnp.pad(segments.singles, (0, -len(segments.singles) % at_once), constant_values=len(out))

    def run(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        memory, out = carry
        picked = jax.lax.dynamic_slice_in_dim(singles, number * at_once, at_once)
        query, key, value, decay, rate = (x[picked] for x in rows)
        slots = segments.slots.at[picked].get(mode="fill", fill_value=num_slots)
        found = memory[layer, slots]
        before = jnp.where(_beside(segments.is_first[picked], found), 0, found) * jnp.exp(decay)[..., None, None]
        known = _einsum("nhk,nhvkd->nhvd", key, before) if corrects else 0
        changes = rate[..., None] * (value - known)
        after = before + _einsum("nhk,nhvd->nhvkd", key, changes)
        out = out.at[picked].set(_einsum("nhk,nhvkd->nhvd", query, after), mode="drop")
        return memory.at[layer, slots].set(after, mode="drop"), out

    return jax.lax.fori_loop(0, -(-segments.num_singles // at_once), run, (memory, out))


def _beside(mask: jax.Array, x: jax.Array) -> jax.Array:
    """A mask of rows with the axes of ``x``."""
    return mask.reshape(-1, *[1] * (x.ndim - 1))


# A memory gathers the errors of all tokens: no TensorFloat-32.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
