"""From a scheduled batch to the packed arrays of one step.

Everything that varies between steps travels in one int32 array and one small float32 array, so a step costs two
host-to-device copies and its program is keyed by the token bucket alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np

from jaxserve.config import ResolvedConfig
from jaxserve.kernels.plan import AttentionPlan, PlanLimits, Tiling, empty_plan, make_plan, plan_shapes
from jaxserve.request import Request
from jaxserve.scheduler import Chunk
from jaxserve.scheduler.blocks import BlockManager
from jaxserve.scheduler.buckets import token_buckets

FLOAT_FIELDS = ("temperature", "top_p", "min_p")


@dataclass(frozen=True)
class StepLayout:
    """Where each field of a step lies in the packed int32 array.

    Rows are the flat ragged batch, T of them; slots are running sequences, S of them.
    Per row: ``token_ids``, ``positions``, ``kv_slots``; ``feedback``, the sequence slot whose last sample is the row's
    token, or -1. Per slot: ``block_tables``; ``sample_rows``, the row whose logits to sample, or -1;
    ``sample_positions``, ``top_k``, ``seeds``.
    ``want_logprobs``: 1 when a sample's log-probabilities are asked for.
    """

    limits: PlanLimits

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows, slots = self.limits.num_rows, self.limits.max_num_seqs
        pages = -(-self.limits.max_model_len // self.limits.page_size)
        per_row = dict.fromkeys(("token_ids", "positions", "kv_slots", "feedback"), (rows,))
        per_slot = dict.fromkeys(("sample_rows", "sample_positions", "top_k", "seeds"), (slots,))
        plan = plan_shapes(self.limits)
        return {**per_row, **per_slot, "block_tables": (slots, pages), "want_logprobs": (1,), **plan}

    @cached_property
    def num_ints(self) -> int:
        return sum(_aligned(math.prod(shape)) for shape in self.shapes.values())

    @property
    def float_shape(self) -> tuple[int, int]:
        return len(FLOAT_FIELDS), self.limits.max_num_seqs

    def split[Array: (np.ndarray, jax.Array)](self, packed: Array) -> dict[str, Array]:
        """The fields of a packed array: views of a numpy array, static slices of a jax one."""
        fields, offset = {}, 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            fields[name] = packed[offset : offset + size].reshape(shape)
            offset += _aligned(size)
        return fields


def step_layouts(config: ResolvedConfig, num_blocks: int, tiling: Tiling, window: int | None) -> dict[int, StepLayout]:
    """By token bucket. ``window``: the widest of the model's layers, if all have one."""
    limits = config.max_num_seqs, config.max_model_len, config.block_size, num_blocks, tiling, window
    return {rows: StepLayout(PlanLimits(rows, *limits)) for rows in token_buckets(config.token_budget)}


def _aligned(num_ints: int) -> int:
    """XLA copies what kernels of other compilers read, unless it begins at a multiple of 128 bytes."""
    return -(-num_ints // 32) * 32


@dataclass(frozen=True)
class PackedStep:
    ints: np.ndarray
    """``int32[layout.num_ints]``"""
    floats: np.ndarray
    """``float32[3, S]``: temperature, top_p, min_p."""
    sequences: np.ndarray
    """``int[3, n]``: slot, query length and KV length of each chunk, which the attention plan is made of."""

    def moved(self, layout: StepLayout, to: StepLayout) -> PackedStep:
        """The same step, packed as ``layout`` says, for another program that has rows for all its tokens."""
        if to is layout:
            return self
        ints = _blank(to)
        fields = to.split(ints)
        for name, values in layout.split(self.ints).items():
            if name not in AttentionPlan._fields:
                num_common = min(len(values), len(fields[name]))
                fields[name][:num_common] = values[:num_common]
        _add_plan(to, fields, self.sequences)
        return PackedStep(ints, self.floats, self.sequences)


def plan_of[Array](fields: dict[str, Array]) -> AttentionPlan[Array]:
    return AttentionPlan(*(fields[name] for name in AttentionPlan._fields))


def _blank(layout: StepLayout) -> np.ndarray:
    ints = np.zeros(layout.num_ints, np.int32)
    fields = layout.split(ints)
    fields["feedback"].fill(-1)
    fields["sample_rows"].fill(-1)
    empty_plan(layout.limits, plan_of(fields))
    return ints


def _add_plan(layout: StepLayout, fields: dict[str, np.ndarray], sequences: np.ndarray) -> None:
    slots, query_lens, kv_lens = sequences
    make_plan(layout.limits, slots, query_lens, kv_lens, plan_of(fields))


def empty_step(layout: StepLayout) -> PackedStep:
    """A step of padding only: its rows go to the dummy page and nothing is sampled."""
    ints, sequences = _blank(layout), np.zeros((3, 0), int)
    _add_plan(layout, layout.split(ints), sequences)
    return PackedStep(ints, np.zeros(layout.float_shape, np.float32), sequences)


class Packer:
    """Packs the batches of one engine.

    What a request brings to every batch, its sampling parameters, is kept by slot until another request has the slot;
    so are the blocks, in the BlockManager. A large batch is mostly decodes, for which nothing is left to do one by one.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        max_num_seqs = len(blocks.tables)
        self._requests: list[Request | None] = [None] * max_num_seqs
        self._floats = np.zeros((len(FLOAT_FIELDS), max_num_seqs), np.float32)
        self._top_k, self._seeds = np.zeros((2, max_num_seqs), np.int32)
        self._wants_logprobs = np.zeros(max_num_seqs, bool)

    def pack(self, layout: StepLayout, chunks: Sequence[Chunk]) -> PackedStep:
        """Write ``chunks``, one after the other, into fresh arrays."""
        requests, *numbers = zip(*chunks, strict=True)
        starts, num_tokens, slots, samples = (np.array(column) for column in numbers)
        ints, floats = _blank(layout), np.zeros(layout.float_shape, np.float32)
        fields = layout.split(ints)
        stops, end_rows = starts + num_tokens, np.cumsum(num_tokens)
        self._pack_tokens(fields, requests, starts, stops, end_rows, slots)
        self._pack_places(fields, starts, num_tokens, end_rows, slots)
        self._note(requests, slots)
        sampling = slots[samples]
        fields["sample_rows"][sampling] = end_rows[samples] - 1
        fields["sample_positions"][sampling] = stops[samples]
        fields["top_k"][sampling], fields["seeds"][sampling] = self._top_k[sampling], self._seeds[sampling]
        floats[:, sampling] = self._floats[:, sampling]
        fields["want_logprobs"][0] = self._wants_logprobs[sampling].any()
        sequences = np.array((slots, num_tokens, stops))
        _add_plan(layout, fields, sequences)
        return PackedStep(ints, floats, sequences)

    def _pack_tokens(
        self,
        fields: dict[str, np.ndarray],
        requests: Sequence[Request],
        starts: np.ndarray,
        stops: np.ndarray,
        end_rows: np.ndarray,
        slots: np.ndarray,
    ) -> None:
        num_known = np.array([request.num_known_tokens for request in requests])
        # The last token was sampled by the step before, which the host has not seen yet.
        pending = stops > num_known
        fields["feedback"][end_rows[pending] - 1] = slots[pending]
        first_rows = end_rows - (stops - starts)
        for i in np.flatnonzero(starts < num_known).tolist():
            token_ids = requests[i].known_token_ids(int(starts[i]), int(stops[i]))
            fields["token_ids"][first_rows[i] : first_rows[i] + len(token_ids)] = token_ids

    def _pack_places(
        self,
        fields: dict[str, np.ndarray],
        starts: np.ndarray,
        num_tokens: np.ndarray,
        end_rows: np.ndarray,
        slots: np.ndarray,
    ) -> None:
        tables, block_size = self._blocks.tables, self._blocks.block_size
        fields["block_tables"][slots] = tables[slots]
        rows = np.arange(end_rows[-1])
        positions = rows + np.repeat(starts - end_rows + num_tokens, num_tokens)
        page, offset = np.divmod(positions, block_size)
        fields["positions"][: len(rows)] = positions
        fields["kv_slots"][: len(rows)] = tables[np.repeat(slots, num_tokens), page] * block_size + offset

    def _note(self, requests: Sequence[Request], slots: np.ndarray) -> None:
        """Keep the sampling parameters of requests that have a slot for the first time."""
        for request, slot in zip(requests, slots.tolist(), strict=True):
            if self._requests[slot] is request:
                continue
            params = request.params
            self._requests[slot] = request
            self._floats[:, slot] = params.temperature, params.top_p, params.min_p
            self._top_k[slot], self._seeds[slot] = max(params.top_k, 0), request.seed
            self._wants_logprobs[slot] = params.logprobs is not None


def prefills_of(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Those that hold a part of the prompt."""
    return [chunk for chunk in chunks if chunk.start < chunk.request.num_prompt_tokens]


def wants_prompt_logprobs(chunk: Chunk) -> bool:
    """True when rows of the chunk predict prompt tokens whose logprobs were asked for."""
    request = chunk.request
    return request.params.prompt_logprobs is not None and chunk.start < request.num_prompt_tokens - 1


def prompt_targets(num_rows: int, chunks: Iterable[Chunk]) -> np.ndarray:
    """``int32[num_rows]``: the prompt token that follows each row of the batch, 0 where there is none."""
    targets = np.zeros(num_rows, np.int32)
    row = 0
    for chunk in chunks:
        following = chunk.request.prompt_token_ids[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
        targets[row : row + len(following)] = following
        row += chunk.num_tokens
    return targets
