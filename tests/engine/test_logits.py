"""What requests change of their logits, against numpy, and what vLLM and transformers make of the same logits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import LLM, RequestError, SamplingParams
from jaxserve.engine.edits import RequestEdits
from jaxserve.engine.logits import EditLayout, edited
from jaxserve.request import Request, RequestMetrics
from jaxserve.tokenizer import Tokenizer

VOCAB, LENGTH = 70, 24
LAYOUT = EditLayout(VOCAB)
BYTES = Tokenizer.of_bytes()
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


@jax.jit
def edit(logits: jax.Array, packed: jax.Array, history: jax.Array, positions: jax.Array) -> jax.Array:
    return edited(logits, LAYOUT.split(packed), history, positions)


def run(logits: np.ndarray, prompts: list[list[int]], outputs: list[list[int]], *wanted: dict[str, Any]) -> np.ndarray:
    """Logits ``[R, VOCAB]``, edited as ``wanted`` of each row, whose request has this prompt and these outputs."""
    packed, history = LAYOUT.blank(len(logits)), np.full((len(logits), LENGTH), 7, np.int32)
    for row, (prompt, output, fields) in enumerate(zip(prompts, outputs, wanted, strict=True)):
        params = SamplingParams(**fields)
        request = Request("r", tuple(prompt), params, 99, RequestMetrics(0.0), frozenset({3}), output_token_ids=output)
        RequestEdits(request, LAYOUT, BYTES).write(packed[row : row + 1], LAYOUT, len(output))
        history[row, : len(prompt) + len(output)] = prompt + output
    positions = np.array([len(p) + len(o) for p, o in zip(prompts, outputs, strict=True)])
    return np.asarray(edit(logits, packed, history, positions))


def truth(logits: np.ndarray, prompt: list[int], output: list[int], fields: dict[str, Any]) -> np.ndarray:
    """One row, a token at a time."""
    x = logits.astype(np.float64)
    for token in range(VOCAB):
        if "allowed_token_ids" in fields and token not in fields["allowed_token_ids"]:
            x[token] = -np.inf
        x[token] += fields.get("logit_bias", {}).get(token, 0.0)
        if token in prompt + output:
            repetition = fields.get("repetition_penalty", 1.0)
            x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
        x[token] -= fields.get("frequency_penalty", 0.0) * output.count(token)
        x[token] -= fields.get("presence_penalty", 0.0) * (token in output)
    if len(output) < fields.get("min_tokens", 0):
        x[3] = -np.inf
    return x


tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=LENGTH // 2)
asked = st.fixed_dictionaries(
    {},
    optional={
        "presence_penalty": st.sampled_from([-2.0, 0.5, 2.0]),
        "frequency_penalty": st.sampled_from([-0.5, 1.5]),
        "repetition_penalty": st.sampled_from([0.5, 1.3]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 0.25, 100.0]), max_size=5),
        "allowed_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
        "min_tokens": st.integers(0, LENGTH),
    },
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(tokens, tokens, asked), min_size=3, max_size=3), st.integers(0, 2**32))
def test_any_edits_of_any_rows(rows: list[tuple[list[int], list[int], dict[str, Any]]], seed: int) -> None:
    """A row is what it is alone, whatever the others ask for."""
    logits = np.random.default_rng(seed).normal(scale=4, size=(3, VOCAB)).astype(np.float32)
    prompts, outputs, wanted = zip(*rows, strict=True)
    fields = [{"max_tokens": LENGTH, **one} for one in wanted]
    expected = [truth(*row) for row in zip(logits, prompts, outputs, wanted, strict=True)]
    np.testing.assert_allclose(run(logits, [*prompts], [*outputs], *fields), expected, rtol=1e-5, atol=1e-5)


def test_rows_without_edits_stay_as_they_are() -> None:
    logits = np.random.default_rng(0).normal(size=(2, VOCAB)).astype(np.float32)
    found = run(logits, [[1, 2], [3]], [[4], [5, 5]], {}, {"frequency_penalty": 1.0})
    np.testing.assert_array_equal(found[0], logits[0])
    assert (found[1] != logits[1]).sum() == 1


def test_as_vllm_and_transformers(golden_edits: dict[str, np.ndarray]) -> None:
    """tests/golden/make_edits.py says what they were asked."""
    prompts, outputs = golden_edits["prompts"].tolist(), golden_edits["outputs"].tolist()
    for name in ("vllm", "transformers"):
        for penalties, expected in zip(golden_edits[f"{name}_penalties"], golden_edits[f"{name}_logits"], strict=True):
            fields = dict(zip(PENALTIES, penalties.tolist(), strict=True))
            found = run(golden_edits["logits"], prompts, outputs, *[fields] * len(prompts))
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def golden_edits() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "golden" / "edits.npz") as file:
        return dict(file)


def test_bad_words() -> None:
    """The last token of a word is not allowed where those before it are; of a single token, nowhere."""
    ab, c = BYTES.encode("ab"), BYTES.encode("c")
    params = {"bad_words": ["ab", "c"]}
    layout = EditLayout(256)
    for output, expected in ((ab[:1], {ab[1], *c}), (ab, c), ([], c), ([*ab, ab[0]], {ab[1], *c})):
        request = Request(
            "r", tuple(ab[:1]), SamplingParams(**params), 9, RequestMetrics(0.0), output_token_ids=list(output)
        )
        packed = layout.blank(1)
        edits = RequestEdits(request, layout, BYTES)
        assert edits.needs_tokens
        edits.write(packed, layout, len(output))
        bits = np.unpackbits(layout.split(packed).allowed.view(np.uint8), bitorder="little")
        assert set(np.flatnonzero(bits == 0)) == set(expected)


# ---- through the engine

PROMPT = "Once upon a time there was a"


def continued(llm: LLM, **fields: Any) -> list[int]:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 16, "ignore_eos": True, **fields})
    return llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids


def test_biases_and_allowed_tokens(llm: LLM) -> None:
    assert continued(llm, logit_bias={"500": 100}) == [500] * 16
    assert set(continued(llm, allowed_token_ids=[400, 500, 600], temperature=5.0, seed=0)) <= {400, 500, 600}
    likeliest = continued(llm)[0]
    assert continued(llm, logit_bias={likeliest: -100})[0] != likeliest


def test_penalties_of_a_growing_output(llm: LLM) -> None:
    """Each token is the likeliest once what the output holds has been taken from the log-probabilities, which one
    request for a token after another tells."""
    fields = {"presence_penalty": 1.0, "frequency_penalty": 0.7}
    output = continued(llm, **fields)
    assert output != continued(llm)
    prompt = llm.engine.tokenizer.encode(PROMPT)
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=20, ignore_eos=True)
    prompts = [prompt + output[:n] for n in range(len(output))]
    for n, told in enumerate(llm.generate(prompts, one, use_tqdm=False)):
        assert told.outputs[0].logprobs is not None
        left = {
            token: entry.logprob - 1.0 * (token in output[:n]) - 0.7 * output[:n].count(token)
            for token, entry in told.outputs[0].logprobs[0].items()
        }
        assert output[n] == max(left, key=left.__getitem__)


def test_minimum_of_tokens(llm: LLM) -> None:
    chat = [{"role": "user", "content": "What is the capital of Italy?"}]
    short = llm.chat(chat, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)[0].outputs[0]
    num_tokens = len(short.token_ids)
    assert short.finish_reason == "stop"
    wanted = SamplingParams(temperature=0, max_tokens=24, min_tokens=num_tokens + 3)
    longer = llm.chat(chat, wanted, use_tqdm=False)[0].outputs[0]
    assert len(longer.token_ids) > num_tokens + 3 or longer.finish_reason == "stop"
    assert longer.token_ids[: num_tokens - 1] == short.token_ids[:-1]
    assert not set(longer.token_ids[: num_tokens + 3]) & set(llm.engine.eos_token_ids)
    stop = short.text[3:6]
    early = SamplingParams(temperature=0, max_tokens=24, stop=[stop])
    assert stop not in llm.chat(chat, early, use_tqdm=False)[0].outputs[0].text
    late = SamplingParams(temperature=0, max_tokens=24, min_tokens=num_tokens - 1, stop=[stop])
    assert stop in llm.chat(chat, late, use_tqdm=False)[0].outputs[0].text


def test_words_that_are_not_said(llm: LLM) -> None:
    """One token, and several, for which sampling waits until the host knows the one before."""
    plain = continued(llm)
    for count in (1, 2, 3):
        word = llm.engine.tokenizer.decode(plain[:count])
        output = continued(llm, bad_words=[word])
        assert output[: count - 1] == plain[: count - 1]
        assert output[count - 1] != plain[count - 1]
        assert word not in llm.engine.tokenizer.decode(output)


@pytest.mark.parametrize("seed", [None, 3])
def test_edits_do_not_depend_on_company(llm: LLM, seed: int | None) -> None:
    """Nor do neighbours on them; and none compiles anything."""
    sampled = {} if seed is None else {"temperature": 1.0, "seed": seed}
    fields: list[dict[str, Any]] = [
        {"repetition_penalty": 1.4, **sampled}, {"frequency_penalty": 1.0, "bad_words": ["little girl"], **sampled},
        {"min_tokens": 9, "ignore_eos": False, **sampled}, {"logit_bias": {260: 2.0}, **sampled}, sampled,
    ]  # fmt: skip
    alone = [continued(llm, **one) for one in fields]
    params = [SamplingParams(**{"temperature": 0, "max_tokens": 16, "ignore_eos": True, **one}) for one in fields]
    crowd = llm.generate([PROMPT] * 15, [*itertools.chain(*[params] * 3)], use_tqdm=False)
    assert [output.outputs[0].token_ids for output in crowd] == alone * 3


@pytest.mark.parametrize("parallel", [{}, {"tensor_parallel": 2}, {"pipeline_parallel": 2}])
def test_preemptions_and_meshes_change_nothing(parallel: dict[str, int], tiny_tokenizer: Path) -> None:
    """Penalties count what is in the history, whoever computes it, and however often."""
    folder = Path(__file__).parents[1] / "golden" / "tiny" / "llama_gqa_tied"
    outputs, num_preemptions = [], []
    for num_blocks, settings_of in ((40, {}), (12, parallel)):
        with LLM(
            model=str(folder), tokenizer=str(tiny_tokenizer), token_budget=16, max_num_seqs=4, max_model_len=64,
            block_size=8, num_blocks=num_blocks, show_progress=False, **settings_of,
        ) as llm:  # fmt: skip
            params = [
                SamplingParams(temperature=0.7, seed=i, max_tokens=30, ignore_eos=True, **fields)
                for i, fields in enumerate(
                    [
                        {"repetition_penalty": 1.5},
                        {"presence_penalty": 2.0, "frequency_penalty": 1.0},
                        {"logit_bias": {5: 3.0}, "bad_words": ["<5>"]},
                        {"allowed_token_ids": range(20, 40)},
                    ]
                )
            ]
            prompts = [[i + 1, 9, 9, 20 + i] * 3 for i in range(4)]
            found = llm.generate(prompts, params, use_tqdm=False)
            outputs.append([one.outputs[0].token_ids for one in found])
            num_preemptions.append(sum(one.metrics.num_preemptions for one in found))
            assert llm.engine.compiles.count == 0
    assert outputs[0] == outputs[1]
    assert (num_preemptions[0], num_preemptions[1] > 0) == (0, True)


def test_ids_must_be_of_the_vocabulary(llm: LLM) -> None:
    for fields in ({"logit_bias": {99999: 1.0}}, {"allowed_token_ids": [99999]}):
        with pytest.raises(RequestError, match=f"{next(iter(fields))} holds token id 99999, outside the vocabulary"):
            continued(llm, **fields)
    with pytest.raises(RequestError, match="min_tokens of 3000 after a prompt of 7 tokens exceeds max_model_len 2048"):
        continued(llm, min_tokens=3000, max_tokens=None)
