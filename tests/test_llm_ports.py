"""LLM and AsyncLLM where people bring code from vLLM, and in notebooks."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, AsyncLLM, BeamSearchParams, RequestError, RequestOutput, SamplingParams
from jaxserve.html_view import MAX_CHARACTERS, MAX_ROWS
from tests.models.golden import Golden

GOLDEN = Golden("llama_gqa_tied")
PROMPT, WANTED = GOLDEN.prompt, GOLDEN.greedy
GREEDY = SamplingParams(temperature=0, max_tokens=len(WANTED), ignore_eos=True)
TEMPLATE = (
    "{% if tools %}{{ tools[0].function.name }}!{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ mood }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "look_up"}}


def settings(tiny_tokenizer: Path) -> dict[str, Any]:
    return {
        "model": str(GOLDEN.checkpoint), "tokenizer": str(tiny_tokenizer), "max_model_len": GOLDEN.length,
        "token_budget": 16, "max_num_seqs": 4, "num_blocks": 40, "block_size": 8, "show_progress": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer: Path) -> Iterator[LLM]:
    with LLM(**settings(tiny_tokenizer)) as llm:
        llm.get_tokenizer().set_chat_template(TEMPLATE)
        yield llm


def test_urgent_prompts_go_first(tiny: LLM) -> None:
    """Also where the parameters are the model's own."""
    urgencies = [5] * 8 + [-5] * 4
    for params in (GREEDY, None):
        outputs = tiny.generate([PROMPT] * 12, params, use_tqdm=False, priority=urgencies)
        begun = [output.metrics.first_scheduled_seconds or 0.0 for output in outputs]
        assert max(begun[8:]) <= min(begun[:8])


@pytest.mark.parametrize(
    ("priority", "message"),
    [
        ([1], "priority must be one for each prompt, got 1 for 2"),
        (3, "priority must be a list of integers, one for each prompt, got 3"),
        ([0, 101], r"prompts\[1\]: priority must be an integer in \[-100, 100\], got 101"),
    ],
)
def test_other_priorities_are_refused(tiny: LLM, priority: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tiny.generate([PROMPT, PROMPT], GREEDY, use_tqdm=False, priority=priority)


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({}, "[user]hi;[assistant]"),
        ({"chat_template_kwargs": {"mood": "gay"}}, "[user]hi;[assistant]gay"),
        ({"add_generation_prompt": False}, "[user]hi;"),
        ({"add_generation_prompt": False, "continue_final_message": True}, "[user]hi"),
        ({"tools": [TOOL]}, "look_up![user]hi;[assistant]"),
        ({"tools": []}, "[user]hi;[assistant]"),
    ],
)
def test_chats(tiny: LLM, options: dict[str, Any], prompt: str) -> None:
    (output,) = tiny.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False, **options)
    assert output.prompt == prompt
    assert output.prompt_token_ids == tiny.get_tokenizer().encode(prompt, add_special_tokens=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [{"type": "function"}]}, r"tools\[0\] must be {'type': 'function', 'function': ...}, got"),
        (
            {"continue_final_message": True},
            r"conversations\[0\]: add_generation_prompt must be false with continue_fin",
        ),
    ],
)
def test_other_chats_are_refused(tiny: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tiny.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False, **options)


def test_many_texts_are_encoded_as_each_alone(tiny: LLM) -> None:
    texts = [f"<{i}>" for i in range(96)]
    outputs = tiny.generate(texts, SamplingParams(max_tokens=1), use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [[i] for i in range(96)]


def test_a_beam_search_finds_the_best(tiny: LLM) -> None:
    """Against all continuations of two tokens whose first is among the likeliest four, scored one by one."""
    prompt, params = PROMPT[:5], BeamSearchParams(beam_width=4, max_tokens=2, ignore_eos=True)
    (one,) = tiny.generate([prompt], SamplingParams(temperature=0, max_tokens=1, logprobs=4), use_tqdm=False)
    likeliest = list((one.outputs[0].logprobs or [{}])[0])[:4]
    whole = [[*prompt, first, second] for first in likeliest for second in range(96)]
    scores = {}
    for tokens, positions in zip(whole, tiny.score(whole), strict=True):
        last = [(position or {})[token].logprob for position, token in zip(positions[-2:], tokens[-2:], strict=True)]
        scores[tuple(tokens)] = sum(last)
    best = sorted(scores, key=lambda tokens: scores[tokens], reverse=True)[:4]
    other, found = tiny.beam_search([PROMPT, prompt], params)
    assert [sequence.tokens[:-2] for sequence in other.sequences] == [PROMPT] * 4
    assert [tuple(sequence.tokens) for sequence in found.sequences] == best
    for sequence in found.sequences:
        assert sequence.cum_logprob == pytest.approx(scores[tuple(sequence.tokens)], abs=1e-4)
        assert sequence.finish_reason == "length"
        assert sequence.text == tiny.get_tokenizer().decode(sequence.tokens)


def test_a_beam_of_one_is_greedy_and_ends_at_eos(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,) = tiny.beam_search([PROMPT], BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True))
    assert alone.sequences[0].tokens == [*PROMPT, *WANTED[:6]]
    monkeypatch.setattr(tiny.engine, "eos_token_ids", (WANTED[2],))
    num_first = WANTED.index(WANTED[2]) + 1
    (ended,) = tiny.beam_search([PROMPT], BeamSearchParams(beam_width=1, max_tokens=6, length_penalty=0))
    (best,) = ended.sequences
    assert best.finish_reason in ("stop", "length")
    if best.finish_reason == "stop":
        assert best.tokens == [*PROMPT, *WANTED[:num_first]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beam_width": 11}, r"beam_width must be an integer in \[1, 10\], got 11"),
        ({"max_tokens": 0}, r"max_tokens must be an integer in \[1, 2147483647\], got 0"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number, got nan"),
    ],
)
def test_other_beams_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, **given})


def test_beams_beyond_the_window_are_refused(tiny: LLM) -> None:
    message = rf"prompts\[1\]: max_tokens of {GOLDEN.length - 1} after a prompt of 2 tokens exceeds max_model_len"
    with pytest.raises(RequestError, match=message):
        tiny.beam_search([[5], [5, 6]], BeamSearchParams(beam_width=2, max_tokens=GOLDEN.length - 1))


def test_outputs_as_tables(tiny: LLM) -> None:
    """Texts are escaped, and what is too much for a page is left out."""
    outputs = tiny.generate(["<7>", [5, 6]], SamplingParams(n=2, seed=1, max_tokens=2), use_tqdm=False)
    outputs[0].outputs[1].text = "<script>" + "x" * MAX_CHARACTERS
    html = outputs._repr_html_()
    assert html.count("<tr>") == 1 + 4
    assert "&lt;7&gt;" in html
    assert "2 token ids" in html
    assert "&lt;script&gt;" in html
    assert "<script>" not in html
    assert "x" * MAX_CHARACTERS not in html
    assert outputs[0]._repr_html_().count("<tr>") == 1 + 2
    outputs *= MAX_ROWS
    assert outputs._repr_html_().endswith(f"<p>and {3 * MAX_ROWS} more</p>")


def test_llm_inside_a_running_loop(tiny: LLM) -> None:
    async def main() -> list[RequestOutput]:
        return tiny.generate([PROMPT], GREEDY, use_tqdm=False)

    assert asyncio.run(main())[0].outputs[0].token_ids == WANTED


def test_async(tiny_tokenizer: Path) -> None:
    """All in one loop, as in a notebook."""

    async def main(llm: AsyncLLM) -> None:
        llm.get_tokenizer().set_chat_template(TEMPLATE)
        outputs = [output async for output in llm.generate(PROMPT, GREEDY)]
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        assert lengths == sorted(lengths)
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].outputs[0].token_ids == WANTED
        assert outputs[-1].outputs[0].finish_reason == "length"

        async def last(params: SamplingParams, prompt: Any = PROMPT) -> RequestOutput:
            return [output async for output in llm.generate(prompt, params)][-1]

        several = await asyncio.gather(*(last(GREEDY) for _ in range(6)))
        assert [output.outputs[0].token_ids for output in several] == [WANTED] * 6
        choices = await last(SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True))
        assert [len(one.token_ids) for one in choices.outputs] == [4, 4, 4]
        ranked = [o async for o in llm.generate("<7>", SamplingParams(best_of=3, seed=1, max_tokens=4))]
        assert [(output.prompt, len(output.outputs), output.finished) for output in ranked] == [("<7>", 1, True)]
        chats = [output async for output in llm.chat([{"role": "user", "content": "hi"}], GREEDY)]
        assert chats[-1].prompt == "[user]hi;[assistant]"

        stream = llm.generate(PROMPT, GREEDY, "mine")
        await anext(stream)
        assert await llm.abort("mine")
        assert [output async for output in stream][-1].outputs[0].finish_reason == "abort"
        assert not await llm.abort("mine")
        left = asyncio.create_task(last(GREEDY))
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(RequestError, match="prompt must be a text or a list of token ids, got 2 of them"):
            await last(GREEDY, ["<7>", "<8>"])
        with pytest.raises(RequestError, match="leaves no room for output"):
            await last(GREEDY, PROMPT * 50)
        assert (await last(GREEDY)).outputs[0].token_ids == WANTED

    async def elsewhere(llm: AsyncLLM) -> None:
        with pytest.raises(RuntimeError, match="belongs to the event loop in which it was first used"):
            await anext(llm.generate(PROMPT, GREEDY))

    async def all_of_it() -> AsyncLLM:
        async with AsyncLLM(**settings(tiny_tokenizer)) as llm:
            await main(llm)
            return llm

    llm = asyncio.run(all_of_it())
    asyncio.run(elsewhere(llm))


def test_a_forgotten_llm_gives_its_memory_back(tiny_tokenizer: Path) -> None:
    """Also where another takes its name, as in a notebook's cell that runs again."""
    llm = LLM(**settings(tiny_tokenizer))
    llm.generate([PROMPT], GREEDY, use_tqdm=False)
    cache = weakref.ref(llm.engine)
    llm = LLM(**settings(tiny_tokenizer))
    assert llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == WANTED
    deadline_seconds = time.monotonic() + 10
    while cache() is not None and time.monotonic() < deadline_seconds:
        gc.collect()
        time.sleep(0.05)
    assert cache() is None
    llm.close()
