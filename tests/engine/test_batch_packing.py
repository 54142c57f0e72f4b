"""Packed steps against one that is filled row by row."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.batch import Packer, StepLayout, empty_step, prompt_targets, wants_prompt_logprobs
from jaxserve.kernels.backend import CPU_TILING
from jaxserve.kernels.plan import PlanLimits
from jaxserve.request import Request, RequestMetrics, SamplingParams
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
        prompt_logprobs=draw(st.sampled_from([None, None, 3])),
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
    rows = layout.limits.num_rows
    out = {name: np.zeros(layout.shapes[name], int) for name in ("token_ids", "positions", "kv_slots")}
    out |= {name: np.zeros(MAX_NUM_SEQS, int) for name in ("sample_positions", "top_k", "seeds")}
    out |= {"feedback": np.full(rows, -1), "sample_rows": np.full(MAX_NUM_SEQS, -1), "want_logprobs": np.zeros(1, int)}
    out |= {"block_tables": np.zeros(layout.shapes["block_tables"], int)}
    row = 0
    for chunk in batch:
        request, slot = chunk.request, chunk.slot
        known = request.prompt_token_ids + request.output_token_ids
        table = blocks.tables[slot].tolist()
        for index, block in enumerate(table):
            out["block_tables"][slot, index] = block
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            if position < len(known):
                out["token_ids"][row] = known[position]
            else:
                out["feedback"][row] = slot
            out["positions"][row] = position
            out["kv_slots"][row] = table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            if chunk.samples:
                out["sample_rows"][slot] = row
                out["sample_positions"][slot] = position + 1
            row += 1
        if chunk.samples:
            out["top_k"][slot], out["seeds"][slot] = max(0, request.params.top_k), request.seed
            out["want_logprobs"][0] |= request.params.logprobs is not None
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
        np.testing.assert_array_equal(fields[name], expected, err_msg=name)
    floats = np.zeros((3, MAX_NUM_SEQS), np.float32)
    for chunk in batch:
        if chunk.samples:
            params = chunk.request.params
            floats[:, chunk.slot] = params.temperature, params.top_p, params.min_p
    assert step.floats.dtype == np.float32
    np.testing.assert_array_equal(step.floats, floats)
    num_tokens = sum(chunk.num_tokens for chunk in batch)
    written = fields["kv_slots"][:num_tokens]
    assert len(set(written.tolist())) == num_tokens, "no two rows write to one place"
    assert (written >= BLOCK_SIZE).all(), "and none to the dummy page"


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
    np.testing.assert_array_equal(step.floats, expected.floats)


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(0, 20))
def test_prompt_targets(batch: list[Chunk], padding: int) -> None:
    """The token that follows each row, as far as it belongs to the prompt."""
    layout, expected = layout_for(batch, padding), []
    for chunk in batch:
        prompt, num_predicting = chunk.request.prompt_token_ids, 0
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            predicts = position + 1 < len(prompt)
            expected.append(prompt[position + 1] if predicts else 0)
            num_predicting += predicts
        wants = chunk.request.params.prompt_logprobs is not None and num_predicting > 0
        assert wants_prompt_logprobs(chunk) == wants
    expected += [0] * (layout.limits.num_rows - len(expected))
    np.testing.assert_array_equal(prompt_targets(layout.limits.num_rows, batch), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300))
def test_fields_fill_the_packed_array_without_overlap(num_rows: int) -> None:
    layout = StepLayout(PlanLimits(num_rows, MAX_NUM_SEQS, MAX_MODEL_LEN, BLOCK_SIZE, NUM_BLOCKS, CPU_TILING))
    packed = np.zeros(layout.num_ints, np.int32)
    for field in layout.split(packed).values():
        field += 1
    assert packed.max() == 1
    assert packed.sum() == sum(math.prod(shape) for shape in layout.shapes.values())


def test_an_empty_step_does_nothing() -> None:
    layout = layout_for([], padding=4)
    fields = layout.split(empty_step(layout).ints)
    assert fields["sample_rows"].tolist() == [-1] * MAX_NUM_SEQS
    assert fields["feedback"].tolist() == [-1] * 4
    assert fields["kv_slots"].tolist() == [0] * 4
    assert fields["counts"].tolist() == [0, 0, 0]
