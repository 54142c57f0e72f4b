"""Greedy outputs of the embedded model, token for token, against transformers (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxserve import LLM, RequestOutput, SamplingParams

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "smollm2_greedy.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}
NEAR_TIE = 1e-3
"""Logits closer than this may be ordered either way by float32 sums in another order."""


def assert_same_tokens(case: dict, output: RequestOutput, max_tokens: int = GOLDEN["max_new_tokens"]) -> None:
    """The first ``max_tokens`` tokens agree; the whole text and the ending too, where the output is whole."""
    got, want = output.outputs[0].token_ids, case["output_token_ids"][:max_tokens]
    for step, (ours, theirs) in enumerate(zip(got, want, strict=False)):
        if ours != theirs:
            gap = case["gaps"][step]
            assert gap < NEAR_TIE, f"{case['name']}: token {step} differs at a logit gap of {gap}"
            return
    assert len(got) == len(want)
    if len(want) == len(case["output_token_ids"]):
        assert output.outputs[0].text == case["text"]
        assert output.outputs[0].finish_reason == case["finish_reason"]


def greedy(
    llm: LLM, cases: list[dict], max_tokens: int = GOLDEN["max_new_tokens"], **options: int
) -> list[RequestOutput]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, **options)
    return llm.generate([case["prompt_token_ids"] for case in cases], params, use_tqdm=False)


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_tokenised_as_transformers_does(llm: LLM, name: str) -> None:
    case = CASES[name]
    if "messages" in case:
        assert llm.engine.tokenizer.apply_chat_template(case["messages"]) == case["prompt"]
    assert llm.engine.tokenizer.encode(case["prompt"]) == case["prompt_token_ids"]


def test_one_request_at_a_time(llm: LLM) -> None:
    for case in CASES.values():
        assert_same_tokens(case, greedy(llm, [case], 20)[0], 20)


def test_all_at_once(llm: LLM) -> None:
    cases = list(CASES.values()) * 2
    for case, output in zip(cases, greedy(llm, cases), strict=True):
        assert_same_tokens(case, output)


def test_chat_renders_the_template(llm: LLM) -> None:
    cases = [case for case in CASES.values() if "messages" in case]
    outputs = llm.chat(
        [case["messages"] for case in cases], SamplingParams(temperature=0, max_tokens=48), use_tqdm=False
    )
    for case, output in zip(cases, outputs, strict=True):
        assert output.prompt == case["prompt"]
        assert_same_tokens(case, output)


@pytest.mark.parametrize(("token_budget", "max_num_seqs", "attention_backend"), [(16, 16, "xla"), (64, 1, "auto")])
def test_outputs_do_not_depend_on_the_budget(token_budget: int, max_num_seqs: int, attention_backend: str) -> None:
    with LLM(
        token_budget=token_budget,
        max_num_seqs=max_num_seqs,
        attention_backend=attention_backend,
        max_model_len=2048,
        show_progress=False,
    ) as llm:
        cases = sorted(CASES.values(), key=lambda case: len(case["prompt_token_ids"]))
        if attention_backend == "xla":  # slow in chunks of long prompts
            cases = cases[: len(cases) // 2]
        for case, output in zip(cases, greedy(llm, cases, 12), strict=True):
            assert_same_tokens(case, output, 12)
        llm.engine.blocks.check()


def test_outputs_survive_preemption() -> None:
    """KV memory for little more than the longest request: the others are preempted and recomputed."""
    with LLM(token_budget=32, max_num_seqs=16, max_model_len=704, num_blocks=46, show_progress=False) as llm:
        outputs = greedy(llm, list(CASES.values()))
        for case, output in zip(CASES.values(), outputs, strict=True):
            assert_same_tokens(case, output)
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
        assert all(output.metrics.num_stalls == 0 for output in outputs)
        llm.engine.blocks.check()


def test_logprobs_match_transformers(llm: LLM) -> None:
    case = next(case for case in CASES.values() if "prompt_logprobs" in case)
    (output,) = greedy(llm, [case], logprobs=3, prompt_logprobs=2)
    entries = output.outputs[0].logprobs
    assert entries is not None
    assert output.prompt_logprobs is not None
    for token, entry, want in zip(output.outputs[0].token_ids, entries, case["logprobs"], strict=True):
        assert next(iter(entry)) == token
        assert entry[token].rank == 1
        assert len(entry) == 3
        assert entry[token].logprob == pytest.approx(want, abs=1e-3)
    assert output.outputs[0].cumulative_logprob == pytest.approx(sum(case["logprobs"]), abs=0.05)
    assert output.prompt_logprobs[0] is None
    for token, entry, want in zip(
        case["prompt_token_ids"][1:], output.prompt_logprobs[1:], case["prompt_logprobs"][1:], strict=True
    ):
        assert entry is not None
        assert entry[token].logprob == pytest.approx(want, abs=1e-3)
        assert len(entry) == (2 if entry[token].rank <= 2 else 3)
    assert llm.score(case["prompt"])[0][1:] == [
        {token: entry[token]}
        for token, entry in zip(case["prompt_token_ids"][1:], output.prompt_logprobs[1:], strict=True)
    ]


def test_a_float8_cache_serves_nearly_the_same() -> None:
    """Rounded keys and values move close decisions, but not the first one here."""
    with LLM(
        token_budget=16, max_num_seqs=4, max_model_len=64, num_blocks=8, kv_cache_dtype="fp8_e4m3", show_progress=False
    ) as llm:  # fmt: skip
        (output,) = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))
        assert "Paris" in output.outputs[0].text
