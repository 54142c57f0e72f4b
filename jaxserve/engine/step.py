"""A step: the one carrier of a batch from the schedule to its outputs, and the one array that its programs read.

Everything that varies between steps travels in one int32 array, so a step costs one host-to-device copy and its
programs are keyed by the token bucket alone. ``FIELDS`` says what is in it; nothing else spells a field's place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxserve.config import ResolvedConfig
from jaxserve.engine.metrics import StepRecord
from jaxserve.engine.sampler import TokenLogprobs
from jaxserve.kernels.plan import AttentionPlan, PlanLimits, Tiling, empty_plan, expand, make_plan, plan_shapes
from jaxserve.request import Request
from jaxserve.scheduler import Chunk
from jaxserve.scheduler.blocks import BlockManager
from jaxserve.scheduler.buckets import token_buckets


class Field(NamedTuple):
    """One field of a step."""

    name: str
    axis: Literal["row", "sequence", "draw", "step"]
    dtype: type[np.int32 | np.float32] = np.int32
    """Floats lie in the int32 array bit by bit."""
    fill: int = 0
    """What a row, sequence or draw has that the batch does not use."""
    of: Callable[[Request], float] | None = None
    """What a request brings to each of its draws."""


FIELDS = (
    Field("row_seqs", "row", fill=-1),
    Field("row_positions", "row"),
    Field("block_tables", "sequence"),
    Field("draw_rows", "draw", fill=-1),
    Field("draw_seqs", "draw", fill=-1),
    Field("draw_positions", "draw"),
    Field("temperature", "draw", np.float32, of=lambda request: request.params.temperature),
    Field("top_p", "draw", np.float32, of=lambda request: request.params.top_p),
    Field("min_p", "draw", np.float32, of=lambda request: request.params.min_p),
    Field("top_k", "draw", of=lambda request: request.params.top_k),
    Field("seeds", "draw", of=lambda request: request.seed),
    Field("want_logprobs", "step"),
)
"""Rows are the flat ragged batch, T of them: each has a sequence and its position there, -1 for that of the sequence's
last token, wherever that is by then, -2 for that of the first draft behind it, and so on. Sequences are slots, S of
them, each with the pages of its tokens. Draws are the tokens to sample, R of them: the row that is followed, the
sequence that gets the token, the token's position (with drafts, behind a row whose position is negative, that same
number), and the request's sampling parameters. ``want_logprobs``: 1 when log-probabilities of a draw are asked for."""
SAMPLED_AXES = ("draw", "step")
"""Of the fields that sampling reads. They lie side by side."""
_DTYPES = {known.name: known.dtype for known in FIELDS}


def _aligned(num_ints: int) -> int:
    """XLA copies what kernels of other compilers read, unless it begins at a multiple of 128 bytes."""
    return -(-num_ints // 32) * 32


def _split[Array: (np.ndarray, jax.Array)](packed: Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """The fields of a packed array: views of a numpy array, static slices of a jax one."""
    fields, offset = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        fields[name] = packed[offset : offset + size].view(_DTYPES.get(name, np.int32)).reshape(shape)
        offset += _aligned(size)
    return fields


@dataclass(frozen=True)
class StepLayout:
    """Where each field of a step lies in the packed int32 array of a token bucket: ``FIELDS``, then the plan's."""

    limits: PlanLimits

    @property
    def num_rows(self) -> int:
        """T"""
        return self.limits.num_rows

    @property
    def num_draws(self) -> int:
        """R: every sequence draws once, from a row of its own, and behind every draft."""
        return min(self.limits.num_rows, self.limits.max_decodes)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        limits = self.limits
        tables = limits.max_num_seqs, -(-limits.max_model_len // limits.page_size)
        axes = {"row": (self.num_rows,), "sequence": tables, "draw": (self.num_draws,), "step": (1,)}
        return {known.name: axes[known.axis] for known in FIELDS} | plan_shapes(limits)

    @cached_property
    def num_ints(self) -> int:
        return sum(_aligned(math.prod(shape)) for shape in self.shapes.values())

    @cached_property
    def draw_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the fields that sampling reads."""
        return {known.name: self.shapes[known.name] for known in FIELDS if known.axis in SAMPLED_AXES}

    @cached_property
    def num_draw_ints(self) -> int:
        return sum(_aligned(math.prod(shape)) for shape in self.draw_shapes.values())

    @cached_property
    def blank(self) -> np.ndarray:
        """``int32[num_ints]``: of a batch that is still to be packed."""
        packed = np.zeros(self.num_ints, np.int32)
        fields = self.split(packed)
        for known in FIELDS:
            fields[known.name].fill(known.fill)
        empty_plan(self.limits, plan_of(fields))
        return packed

    def split[Array: (np.ndarray, jax.Array)](self, packed: Array) -> dict[str, Array]:
        """The fields of a packed array: views of a numpy array, static slices of a jax one."""
        return _split(packed, self.shapes)

    def draws_of(self, packed: jax.Array) -> jax.Array:
        """``int32[num_draw_ints]``: the part of a packed array that sampling reads."""
        names = list(self.shapes)
        before = names[: names.index(next(iter(self.draw_shapes)))]
        begin = sum(_aligned(math.prod(self.shapes[name])) for name in before)
        return packed[begin : begin + self.num_draw_ints]

    def split_draws(self, packed: jax.Array) -> dict[str, jax.Array]:
        """The fields in what ``draws_of`` gives."""
        return _split(packed, self.draw_shapes)


def step_layouts(config: ResolvedConfig, num_blocks: int, tiling: Tiling, window: int | None) -> dict[int, StepLayout]:
    """By token bucket. ``window``: the widest of the model's layers, if all have one."""
    if window is not None:  # a plan reaches as far back as it must where no draft holds
        window += config.max_seq_drafts
    limits = (
        config.max_num_seqs, config.max_model_len, config.block_size, num_blocks, tiling, window, config.max_drafts
    )  # fmt: skip
    return {rows: StepLayout(PlanLimits(rows, *limits)) for rows in token_buckets(config.token_budget)}


def plan_of[Array](fields: dict[str, Array]) -> AttentionPlan[Array]:
    return AttentionPlan(*(fields[name] for name in AttentionPlan._fields))


def _add_plan(layout: StepLayout, fields: dict[str, np.ndarray], sequences: np.ndarray) -> None:
    slots, query_lens, kv_lens = sequences
    make_plan(layout.limits, slots, query_lens, kv_lens, plan_of(fields))


class StepOutputs(NamedTuple):
    """Results of a step, still on the device."""

    tokens: jax.Array
    """``int32[R]``: the sampled token of each draw; see ``verify`` of engine/speculation.py."""
    logprobs: TokenLogprobs[jax.Array]
    """Of the draws, R rows."""


class Admission(NamedTuple):
    """A sequence that gets a slot: what its history on the device begins with."""

    slot: int
    token_ids: list[int]


@dataclass
class Step:
    """A batch on its way: chosen, packed, launched, left the device."""

    layout: StepLayout
    ints: np.ndarray
    """``int32[layout.num_ints]``"""
    chunks: list[Chunk]
    sequences: np.ndarray
    """``int[3, n]``: slot, query length and KV length of each chunk, which the attention plan is made of."""
    admissions: Sequence[Admission] = ()
    last_tokens: np.ndarray | None = None
    """For a draft model, packed: of each sequence that draws, the token behind."""
    suggestions: np.ndarray | None = None
    """The host's, to sequences that have rows for drafts: as ``suggested`` of engine/speculation.py has them."""
    record: StepRecord = field(default_factory=StepRecord)
    outputs: StepOutputs | None = None
    """Of the draws; None before the launch, and where no chunk samples."""
    hidden: jax.Array | None = None
    """Once launched, for ``ModelRunner.score``: the hidden states of the batch's rows."""
    prompt_logprobs: TokenLogprobs[jax.Array] | None = None
    """Of the rows, where a request asked for those of its prompt."""

    @classmethod
    def empty(cls, layout: StepLayout) -> Step:
        """Of padding only: its rows go to the dummy page and nothing is sampled."""
        ints, sequences = layout.blank.copy(), np.zeros((3, 0), int)
        _add_plan(layout, layout.split(ints), sequences)
        return cls(layout, ints, [], sequences)

    def draws(self) -> Iterator[tuple[int, Chunk]]:
        """The chunks that sample, each with the number of its first draw."""
        draw = 0
        for chunk in self.chunks:
            if chunk.samples:
                yield draw, chunk
                draw += chunk.num_draws

    def tokens(self) -> list[int]:
        """Of the draws, once the device has them; none where no chunk samples, once the step has been computed."""
        if self.outputs is None:
            jax.block_until_ready(self.hidden)
            return []
        return np.asarray(self.outputs.tokens).tolist()

    def packed_for(self, to: StepLayout) -> np.ndarray:
        """``int32[to.num_ints]``: the same for another program, which has rows for all its tokens."""
        if to is self.layout:
            return self.ints
        ints = to.blank.copy()
        fields = to.split(ints)
        for name, values in self.layout.split(self.ints).items():
            if name not in AttentionPlan._fields:
                num_common = min(len(values), len(fields[name]))
                fields[name][:num_common] = values[:num_common]
        _add_plan(to, fields, self.sequences)
        return ints


class Packer:
    """Packs the batches of one engine.

    What a request brings to every batch, its sampling parameters, is kept by slot until another request has the slot;
    so are its tokens, on the device, and its blocks, in the BlockManager. A large batch is mostly decodes, for which
    nothing is left to do one by one.

    A decode's row is where the device finds it to be, in all stages of a pipeline, for what the device knows of a
    sequence does not change before its token has left the last one; or ``absolute``: where the host says, for steps
    that are run again and again.
    """

    def __init__(self, blocks: BlockManager, *, absolute: bool = False) -> None:
        self._blocks, self._absolute = blocks, absolute
        max_num_seqs = len(blocks.tables)
        self._requests: list[Request | None] = [None] * max_num_seqs
        self._params = [(f.name, f.of, np.zeros(max_num_seqs, f.dtype)) for f in FIELDS if f.of is not None]
        self._wants_logprobs = np.zeros(max_num_seqs, bool)

    def pack(self, layout: StepLayout, chunks: list[Chunk]) -> Step:
        """Write ``chunks``, one after the other, into a fresh array."""
        requests, *numbers = zip(*chunks, strict=True)
        starts, num_tokens, slots, samples, num_drafts = (np.array(column) for column in numbers)
        admissions = self._note(requests, slots)
        ints = layout.blank.copy()
        fields = layout.split(ints)
        fields["block_tables"][slots] = self._blocks.tables[slots]
        offsets = np.zeros_like(slots)
        if num_drafts.any():
            # A decode's row and those of its drafts are packed as decodes of their own: what each sees is to be summed
            # as if it were alone.
            owners, offsets = expand(1 + num_drafts)
            starts, slots, samples = starts[owners] + offsets, slots[owners], samples[owners]
            num_tokens = np.where(num_drafts > 0, 1, num_tokens)[owners]
        stops, end_rows = starts + num_tokens, np.cumsum(num_tokens)
        rows = np.arange(end_rows[-1])
        fields["row_seqs"][: len(rows)] = np.repeat(slots, num_tokens)
        fields["row_positions"][: len(rows)] = rows + np.repeat(stops - end_rows, num_tokens)
        draw_positions = stops
        if not self._absolute:
            follows = samples & (num_tokens == 1)
            fields["row_positions"][end_rows[follows] - 1] = (-1 - offsets)[follows]
            if layout.limits.max_drafts:
                draw_positions = np.where(follows, -1 - offsets, stops)
        drawing = slots[samples]
        draws = slice(len(drawing))
        fields["draw_rows"][draws] = end_rows[samples] - 1
        fields["draw_seqs"][draws] = drawing
        fields["draw_positions"][draws] = draw_positions[samples]
        for name, _, values in self._params:
            fields[name][draws] = values[drawing]
        fields["want_logprobs"][0] = self._wants_logprobs[drawing].any()
        sequences = np.array((slots, num_tokens, stops))
        _add_plan(layout, fields, sequences)
        return Step(layout, ints, chunks, sequences, admissions)

    def _note(self, requests: Sequence[Request], slots: np.ndarray) -> list[Admission]:
        """Keep the sampling parameters of requests that are new in their slots; what the device must keep of them."""
        admissions = []
        for request, slot in zip(requests, slots.tolist(), strict=True):
            if self._requests[slot] is request:
                continue
            if request in self._requests:  # its slot of before has no more than the tokens that were known there
                self._requests[self._requests.index(request)] = None
            self._requests[slot] = request
            for _, of, values in self._params:
                values[slot] = of(request)
            self._wants_logprobs[slot] = request.params.logprobs is not None
            admissions.append(Admission(slot, request.known_token_ids(0, request.num_tokens)))
        return admissions


def prefills_of(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Those that hold a part of the prompt."""
    return [chunk for chunk in chunks if chunk.start < chunk.request.num_prompt_tokens]


def wants_prompt_logprobs(chunk: Chunk) -> bool:
    """True when rows of the chunk predict prompt tokens whose logprobs were asked for."""
    return bool(scored_tokens(chunk))


def scored_tokens(chunk: Chunk) -> range:
    """Positions of the prompt tokens that rows of the chunk predict and whose logprobs were asked for."""
    request, first = chunk.request, chunk.request.first_scored
    if first is None:
        return range(0)
    stop = min(chunk.start + chunk.num_tokens + 1, request.num_prompt_tokens)
    return range(max(chunk.start + 1, first), stop)


def wanted_scores(num_rows: int, chunks: Iterable[Chunk]) -> np.ndarray:
    """``int32[1 + num_rows]``: whether the likeliest tokens are wanted beside those of the prompts; then the prompt
    token that each row of the batch predicts, -1 where nobody wants its logprob."""
    wanted = np.full(1 + num_rows, -1, np.int32)
    wants_top, row = False, 1
    for chunk in chunks:
        if scored := scored_tokens(chunk):
            wants_top |= chunk.request.params.prompt_logprobs != 0
            first = row + scored.start - 1 - chunk.start
            wanted[first : first + len(scored)] = chunk.request.prompt_token_ids[scored.start : scored.stop]
        row += chunk.num_tokens
    wanted[0] = wants_top
    return wanted
