"""What the host suggests becomes drafts where it fits what the device has; grammars' forced tokens come that way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import LLM, SamplingParams, StructuredOutputsParams
from jaxserve.drafting import Suggestion
from jaxserve.engine.metrics import DraftCounts
from jaxserve.engine.profiling import Profiler
from jaxserve.engine.speculation import SequenceState, no_suggestions, suggested, suggestions_of
from tests.engine.test_speculation import FLAT

MOST, LONGEST = 3, 12
RECORD = {
    "type": "object", "additionalProperties": False, "required": ["registered_address", "number_of_employees"],
    "properties": {
        "registered_address": {"type": "string", "maxLength": 8},
        "number_of_employees": {"type": "integer", "minimum": 0, "maximum": 99},
    },
}  # fmt: skip
jit_suggested = jax.jit(partial(suggested, MOST))
tokens = st.lists(st.integers(1, 2), min_size=1, max_size=LONGEST)


@given(tokens, st.integers(0, LONGEST), st.lists(st.integers(1, 2), max_size=2 * MOST + 1), st.booleans())
@settings(deadline=None)
def test_the_device_drafts_what_the_host_expects(text: list[int], known: int, ahead: list[int], asked: bool) -> None:
    """Beside a sequence that keeps its drafts."""
    known = min(known, len(text))
    history = np.zeros((2, LONGEST), np.int32)
    history[:, : len(text)] = text
    packed = no_suggestions(2, MOST)
    if asked:
        starts, counts, token_ids = suggestions_of(packed)
        starts[1], counts[1], token_ids[1, : len(ahead)] = known, len(ahead), ahead
    lengths = np.full(2, len(text), np.int32)
    sequences = SequenceState(*map(jnp.array, (history, lengths, np.array([2, 1], np.int32))))
    got = SequenceState(*map(np.asarray, jit_suggested(sequences, jnp.array(packed))))
    assert (got.history[:, : len(text)] == text).all()
    assert (got.lengths == len(text)).all()
    assert got.num_drafts is not None
    assert got.num_drafts[0] == 2
    if not asked:
        assert got.num_drafts[1] == 1
        return
    left = list(Suggestion(known, ahead).left_after(text[known:]))[:MOST][: LONGEST - len(text)]
    assert got.num_drafts[1] == len(left)
    assert got.history[1, len(text) : len(text) + len(left)].tolist() == left


@pytest.fixture(scope="module")
def speculating() -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Profiler, "draft_times", lambda _: FLAT)
        with LLM(
            model="smollm2-135m", token_budget=16, max_num_seqs=4, max_model_len=128, block_size=8, num_blocks=40,
            speculative="suffix", show_progress=False,
        ) as llm:  # fmt: skip
            yield llm


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_forced_tokens_spare_steps_and_change_nothing(llm: LLM, speculating: LLM, temperature: float) -> None:
    record = SamplingParams(
        temperature=temperature,
        seed=3,
        max_tokens=50,
        logprobs=1,
        structured_outputs=StructuredOutputsParams(json=RECORD),
    )
    free = SamplingParams(temperature=temperature, seed=4, max_tokens=30, ignore_eos=True, bad_words=["the", " of a"])
    params = [record, free, replace(record, seed=5, min_tokens=12), replace(record, seed=6, presence_penalty=0.5)]
    prompts = ["A company:", "The house of the", "A company:", "Another company:"]
    want = [one.outputs[0] for one in llm.generate(prompts, params, use_tqdm=False)]
    drafts = DraftCounts()
    speculating.engine.on_step.append(lambda step, _: drafts.merge(step.drafts))
    got = [one.outputs[0] for one in speculating.generate(prompts, params, use_tqdm=False)]
    speculating.engine.on_step.pop()
    assert [one.token_ids for one in got] == [one.token_ids for one in want]
    assert [(one.text, one.finish_reason) for one in got] == [(one.text, one.finish_reason) for one in want]
    for one, other in zip(got, want, strict=True):
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
    assert drafts.num_held >= 9, "three keys of three records have three tokens or more"
    assert drafts.acceptance > 0.5
    assert speculating.engine.compiles.count == 0
