"""Packed steps against one that is filled row by row."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.forward import SequenceState, rows_of
from jaxserve.engine.step import (
    FIELDS,
    Packer,
    Step,
    StepLayout,
    scored_tokens,
    wanted_scores,
    wants_prompt_logprobs,
)
from jaxserve.kernels.backend import CPU_TILING
from jaxserve.kernels.plan import PlanLimits
from jaxserve.request import Request, RequestMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Chunk
from jaxserve.scheduler.blocks import BlockManager

MAX_NUM_SEQS, MAX_MODEL_LEN, BLOCK_SIZE = 6, 60, 8
NUM_BLOCKS = 1 + MAX_NUM_SEQS * -(-MAX_MODEL_LEN // BLOCK_SIZE)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.floats(0, 2, width=32)),
        top_p=draw(st.floats(0.125, 1, width=32)),
        min_p=draw(st.floats(0, 1, width=32)),
        top_k=draw(st.integers(-1, 50)),
        logprobs=draw(st.sampled_from([None, 0, 5])),
        prompt_logprobs=(scored := draw(st.sampled_from([None, None, 0, 3]))),
        logprob_start_len=0 if scored is None else draw(st.sampled_from([0, 1, 9, 70])),
        max_tokens=MAX_MODEL_LEN,
    )


@st.composite
def chunks(draw: st.DrawFn, slot: int) -> Chunk:
    """Any stretch of a request's tokens: a prefill, a decode, or a recomputation of both."""
    tokens = st.integers(1, 999)
    prompt = draw(st.lists(tokens, min_size=1, max_size=40))
    request = Request(
        request_id=f"request-{slot}",
        prompt_token_ids=prompt,
        params=draw(sampling_params()),
        max_tokens=MAX_MODEL_LEN,
        metrics=RequestMetrics(arrival_seconds=0.0),
        seed=draw(st.integers(0, 2**31 - 1)),
        output_token_ids=draw(st.lists(tokens, max_size=15)),
        slot=slot,
    )
    request.num_tokens += draw(st.integers(0, 1))
    last = request.num_tokens - 1
    start = draw(st.one_of(st.just(last), st.integers(0, last)))
    stop = draw(st.one_of(st.just(last + 1), st.integers(start + 1, last + 1)))
    return Chunk(request, start, stop - start, slot, samples=stop == request.num_tokens)


@st.composite
def batches(draw: st.DrawFn) -> list[Chunk]:
    slots = draw(st.lists(st.integers(0, MAX_NUM_SEQS - 1), unique=True, min_size=1, max_size=MAX_NUM_SEQS))
    return [draw(chunks(slot)) for slot in slots]


def make_blocks(batch: list[Chunk], order: np.random.Generator) -> BlockManager:
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE, MAX_NUM_SEQS, MAX_MODEL_LEN)
    take_blocks(blocks, batch, order)
    return blocks


def take_blocks(blocks: BlockManager, batch: list[Chunk], order: np.random.Generator) -> None:
    """In turns, so that no request's lie side by side."""
    goals = {chunk.slot: chunk.start + chunk.num_tokens for chunk in batch}
    wanted = [(n, slot) for slot, goal in goals.items() for n in range(1, goal + 1)]
    for n, slot in (wanted[i] for i in order.permutation(len(wanted))):
        blocks.grow(slot, max(n, blocks.held_tokens[slot]))


def layout_for(batch: list[Chunk], padding: int, window: int | None = None) -> StepLayout:
    rows = max(1, sum(chunk.num_tokens for chunk in batch) + padding)
    return StepLayout(PlanLimits(rows, MAX_NUM_SEQS, MAX_MODEL_LEN, BLOCK_SIZE, NUM_BLOCKS, CPU_TILING, window))


def reference(layout: StepLayout, batch: list[Chunk], blocks: BlockManager) -> dict[str, np.ndarray]:
    """Field by field, row by row; all but the attention plan."""
    out = {f.name: np.full(layout.shapes[f.name], f.fill, f.dtype) for f in FIELDS}
    row = draw = 0
    for chunk in batch:
        request, slot, params = chunk.request, chunk.slot, chunk.request.params
        for index, block in enumerate(blocks.tables[slot]):
            out["block_tables"][slot, index] = block
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            out["row_seqs"][row] = slot
            out["row_positions"][row] = -1 if chunk.samples and chunk.num_tokens == 1 else position
            row += 1
        if chunk.samples:
            out["draw_rows"][draw], out["draw_seqs"][draw] = row - 1, slot
            out["draw_positions"][draw] = chunk.start + chunk.num_tokens
            out["top_k"][draw], out["seeds"][draw] = params.top_k, request.seed
            for name in ("temperature", "top_p", "min_p"):
                out[name][draw] = getattr(params, name)
            out["want_logprobs"][0] |= params.logprobs is not None
            draw += 1
    return out


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(0, 20), st.one_of(st.none(), st.integers(1, MAX_MODEL_LEN)), st.integers(0, 2**32))
def test_pack(batch: list[Chunk], padding: int, window: int | None, seed: int) -> None:
    layout, blocks = layout_for(batch, padding, window), make_blocks(batch, np.random.default_rng(seed))
    if window is not None:
        for chunk in batch:
            blocks.release_before(chunk.slot, chunk.start - window + 1)
    step = Packer(blocks).pack(layout, batch)
    assert step.ints.shape == (layout.num_ints,)
    assert step.ints.dtype == np.int32
    fields = layout.split(step.ints)
    for name, expected in reference(layout, batch, blocks).items():
        assert fields[name].dtype == expected.dtype
        np.testing.assert_array_equal(fields[name], expected, err_msg=name)
    assert dict(step.admissions) == {
        chunk.slot: [*chunk.request.prompt_token_ids, *chunk.request.output_token_ids] for chunk in batch
    }


@settings(max_examples=50, deadline=None)
@given(batches(), st.integers(0, 20), st.booleans(), st.integers(0, 2**32))
def test_rows_on_the_device(batch: list[Chunk], padding: int, absolute: bool, seed: int) -> None:
    """Every row has its token, those that only the device has seen as well, its position, and a place of its own."""
    layout, blocks = layout_for(batch, padding), make_blocks(batch, np.random.default_rng(seed))
    step = Packer(blocks, absolute=absolute).pack(layout, batch)
    history, lengths = np.zeros((MAX_NUM_SEQS, MAX_MODEL_LEN), np.int32), np.zeros(MAX_NUM_SEQS, np.int32)
    token_ids, positions, kv_slots = [], [], []
    for chunk in batch:
        request, pages = chunk.request, blocks.tables[chunk.slot]
        known = [*request.prompt_token_ids, *request.output_token_ids]
        history[chunk.slot, : request.num_tokens] = ([*known, 1234])[: request.num_tokens]
        lengths[chunk.slot] = request.num_tokens
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            token_ids.append(known[position] if position < len(known) else 1234)
            positions.append(position)
            kv_slots.append(pages[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
    unused = [0] * (layout.num_rows - len(positions))
    fields = {name: jnp.array(values) for name, values in layout.split(step.ints).items()}
    rows = rows_of(fields, SequenceState(jnp.array(history), jnp.array(lengths)), BLOCK_SIZE)
    assert rows.token_ids.tolist() == token_ids + unused
    assert rows.positions.tolist() == positions + unused
    assert rows.kv_slots.tolist() == kv_slots + unused
    assert len(set(kv_slots)) == len(kv_slots), "no two rows write to one place"
    assert min(kv_slots) >= BLOCK_SIZE, "and none to the dummy page"


def test_a_request_that_comes_back_to_a_slot_is_admitted_again() -> None:
    """It may have gone on in another one: the history that it left behind ends where it left."""
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE, MAX_NUM_SEQS, MAX_MODEL_LEN)
    packer, request = Packer(blocks), Request("r", [5, 6], SamplingParams(), 9, RequestMetrics(0.0))
    admitted = []
    for slot, token in ((1, 7), (1, 8), (0, 9), (1, 10)):
        blocks.grow(slot, MAX_MODEL_LEN // 2)
        request.output_token_ids.append(token)
        request.num_tokens += 1
        batch = [Chunk(request, 0, request.num_tokens, slot, samples=True)]
        admitted.append(packer.pack(layout_for(batch, 0), batch).admissions)
    assert admitted == [[(1, [5, 6, 7])], [], [(0, [5, 6, 7, 8, 9])], [(1, [5, 6, 7, 8, 9, 10])]]


@settings(max_examples=50, deadline=None)
@given(batches(), batches(), st.integers(0, 2**32))
def test_slots_forget_the_requests_before(first: list[Chunk], second: list[Chunk], seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = make_blocks(first, rng)
    packer = Packer(blocks)
    packer.pack(layout_for(first, 0), first)
    for slot in range(MAX_NUM_SEQS):
        blocks.release(slot)
    take_blocks(blocks, second, rng)
    layout = layout_for(second, 0)
    step, expected = packer.pack(layout, second), Packer(blocks).pack(layout, second)
    np.testing.assert_array_equal(step.ints, expected.ints)


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(0, 20))
def test_wanted_scores(batch: list[Chunk], padding: int) -> None:
    """The token that follows each row, as far as it belongs to the prompt and its logprob is wanted."""
    layout, wants_top, expected = layout_for(batch, padding), False, list[int]()
    for chunk in batch:
        prompt, scored = chunk.request.prompt_token_ids, list[int]()
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            predicts = position + 1 < len(prompt)
            wanted = chunk.request.params.prompt_logprobs is not None
            wanted &= predicts and position + 1 >= chunk.request.params.logprob_start_len
            expected.append(prompt[position + 1] if wanted else -1)
            if wanted:
                scored.append(position + 1)
        assert list(scored_tokens(chunk)) == scored
        assert wants_prompt_logprobs(chunk) == bool(scored)
        wants_top |= bool(scored) and chunk.request.params.prompt_logprobs != 0
    expected += [-1] * (layout.limits.num_rows - len(expected))
    np.testing.assert_array_equal(wanted_scores(layout.limits.num_rows, batch), [wants_top, *expected])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300))
def test_fields_fill_the_packed_array_without_overlap(num_rows: int) -> None:
    layout = StepLayout(PlanLimits(num_rows, MAX_NUM_SEQS, MAX_MODEL_LEN, BLOCK_SIZE, NUM_BLOCKS, CPU_TILING))
    packed = np.zeros(layout.num_ints, np.int32)
    for field in layout.split(packed).values():
        field.view(np.int32)[...] += 1
    assert packed.max() == 1
    assert packed.sum() == sum(math.prod(shape) for shape in layout.shapes.values())
    draws = layout.split_draws(layout.draws_of(jnp.arange(layout.num_ints, dtype=jnp.int32)))
    whole = layout.split(np.arange(layout.num_ints, dtype=np.int32))
    for name, found in draws.items():
        np.testing.assert_array_equal(np.asarray(found).view(np.int32), whole[name].view(np.int32), err_msg=name)


def test_an_empty_step_does_nothing() -> None:
    layout = layout_for([], padding=4)
    fields = layout.split(Step.empty(layout).ints)
    assert fields["draw_rows"].tolist() == fields["draw_seqs"].tolist() == [-1] * 4
    assert fields["row_seqs"].tolist() == [-1] * 4
    assert fields["counts"].tolist() == [0, 0, 0]
