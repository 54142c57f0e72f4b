"""LLM on a tiny model: interrupts at any moment, several threads, closing, every type of prompt, the window's end."""

from __future__ import annotations

import ctypes
import gc
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import LLM, RequestError, RequestOutput, SamplingParams, TextPrompt, TokensPrompt
from jaxserve.prompts import parse_conversations, parse_prompts
from jaxserve.sampling_params import SoftLimit
from tests.batch.echo import run as run_batch
from tests.batch.echo import write
from tests.models.golden import Golden

GOLDEN = Golden("llama_gqa_tied")
PROMPT, WANTED = GOLDEN.prompt, GOLDEN.greedy
GREEDY = SamplingParams(temperature=0, max_tokens=len(WANTED), ignore_eos=True)


def start(tiny_tokenizer: Path) -> LLM:
    return LLM(
        model=str(GOLDEN.checkpoint), tokenizer=str(tiny_tokenizer), max_model_len=GOLDEN.length, token_budget=32,
        max_num_seqs=4, num_blocks=40, block_size=8, max_logprobs=-1,
        show_progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared(tiny_tokenizer: Path) -> Iterator[LLM]:
    with start(tiny_tokenizer) as llm:
        yield llm


@pytest.fixture
def tiny(shared: LLM) -> Iterator[LLM]:
    """Afterwards nothing is left in the engine, and the right tokens come out of it."""
    yield shared
    assert_usable(shared)


def assert_usable(llm: LLM) -> None:
    engine = llm.engine
    assert not engine.has_unfinished()
    engine.blocks.check()
    assert engine.blocks.num_used == 0
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    assert token_ids(llm.generate([PROMPT], params, use_tqdm=False)) == [WANTED[:4]]


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_logprobs_of_the_whole_vocabulary(tiny: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logprobs=-1, prompt_logprobs=-1)
    (output,) = tiny.generate([PROMPT], params, use_tqdm=False)
    positions = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
    assert len(positions) == len(PROMPT) + 1
    for position in positions:
        assert position is not None
        assert sorted(position) == list(range(96))
        assert sum(np.exp(entry.logprob) for entry in position.values()) == pytest.approx(1, abs=1e-5)
        assert sorted(entry.rank for entry in position.values()) == list(range(1, 97))


def test_the_end_of_a_prompt(tiny: LLM) -> None:
    longer = replace(GREEDY, truncate_prompt_tokens=len(PROMPT))
    (output,) = tiny.generate([[9] * 100 + PROMPT], longer, use_tqdm=False)
    assert (output.prompt_token_ids, output.outputs[0].token_ids) == (PROMPT, WANTED)


def test_spaces_that_a_tokenizer_puts_between_special_tokens(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = replace(GREEDY, spaces_between_special_tokens=False)
    assert token_ids(tiny.generate([PROMPT], params, use_tqdm=False)) == [WANTED]
    monkeypatch.setattr(tiny.engine.tokenizer, "spaces_special_tokens", True)
    with pytest.raises(RequestError, match="spaces_between_special_tokens must be True with this model's tokenizer"):
        tiny.generate([PROMPT], params, use_tqdm=False)


class Interrupted(Exception):
    """What the tests' signal raises."""


@pytest.fixture
def alarm() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.signal(signal.SIGALRM, before)


def interrupted(call: Callable[[], object], after_seconds: float) -> bool:
    """Whether the call was interrupted: by then it may have ended."""
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, after_seconds)
            call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        return True
    return False


def timed(call: Callable[[], object]) -> float:
    start_seconds = time.monotonic()
    call()
    return time.monotonic() - start_seconds


@pytest.mark.timeout(600, method="thread")  # the other method's signal is the test's own
@pytest.mark.usefixtures("alarm")
def test_interrupts_at_200_moments(tiny: LLM) -> None:
    """Whatever was going on, nothing is left of it and the next call is answered as ever."""
    many = [[5 + i % 80] * 3 for i in range(50)]
    calls: list[Callable[[], object]] = [
        lambda: tiny.generate([PROMPT] * 3, GREEDY, use_tqdm=False),
        lambda: tiny.generate(many, SamplingParams(max_tokens=1), use_tqdm=False),
        lambda: tiny.score([PROMPT] * 2, num_logprobs=2),
        lambda: tiny.generate([PROMPT], SamplingParams(max_tokens=5, logprobs=3), use_tqdm=True),
    ]
    for call in calls:  # from the second time on the prefix cache has the prompts
        call()
    seconds, rng = [timed(call) for call in calls], np.random.default_rng(0)
    num_interrupted = 0
    for index in range(200):
        which = index % len(calls)
        num_interrupted += interrupted(calls[which], max(rng.random() * seconds[which], 1e-6))
        assert_usable(tiny)
    assert num_interrupted > 50


@pytest.fixture
def no_collections() -> Iterator[None]:
    """Python drops what is raised in a collector's callback, and hypothesis has one."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collections")
def test_an_interrupt_while_prompts_are_queued_leaves_none(tiny: LLM) -> None:
    """Also one that no signal brings: an exception that another thread raises."""
    ended: list[BaseException] = []

    def work() -> None:
        try:
            tiny.generate([[5 + i % 80] * 10 for i in range(10_000)], GREEDY, use_tqdm=False)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while len(tiny.engine._streams) < 1000:
        time.sleep(0.001)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt))
    thread.join()
    assert [type(error) for error in ended] == [KeyboardInterrupt]
    assert len(tiny.engine._streams) == 0


def test_a_failing_progress_bar_is_an_interrupt_too(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("tqdm.tqdm.update", fail)
    with pytest.raises(BrokenPipeError):
        tiny.generate([PROMPT] * 9, GREEDY, use_tqdm=False)


@pytest.mark.timeout(600, method="thread")
@pytest.mark.usefixtures("alarm")
def test_an_interrupted_batch_goes_on_where_it_was(tiny: LLM, tmp_path: Path) -> None:
    body = {"temperature": 0, "max_tokens": len(WANTED), "ignore_eos": True}
    entries = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": PROMPT[i % 3 :], **body}}
        for i in range(24)
    ]
    source = write(tmp_path / "in", *entries)
    wanted = tiny.generate([PROMPT[i % 3 :] for i in range(24)], GREEDY, use_tqdm=False)
    texts = [output.outputs[0].text for output in wanted]
    num_runs, stopped = 0, True
    while stopped:

        def run() -> None:
            run_batch(tiny.engine, source, tmp_path / "out")

        num_runs, stopped = num_runs + 1, interrupted(run, 0.05 + 0.1 * num_runs)
        assert_usable(tiny)
    assert num_runs > 1
    results = [json.loads(one) for one in (tmp_path / "out").read_text().splitlines()]
    assert len(results) == len(entries), "none lost, none doubled"
    found = {int(r["custom_id"]): r["response"]["body"]["choices"][0]["text"] for r in results}
    assert [found[i] for i in range(24)] == texts


def test_an_interrupt_in_the_progress_bar_blocks_no_thread(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tqdm.tqdm.display", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny.generate([PROMPT], GREEDY)
    others = threading.Thread(target=tiny.generate, args=([PROMPT], GREEDY), daemon=True)
    others.start()
    others.join(timeout=60)
    assert not others.is_alive()


def test_several_threads(tiny: LLM) -> None:
    """Each gets its own answers, whether they are served at once or in turn."""
    prompts = [[PROMPT[i:], PROMPT[: i + 2]] for i in range(6)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    wanted = [token_ids(tiny.generate(two, params, use_tqdm=False)) for two in prompts]
    got: dict[int, list[list[list[int]]]] = {i: [] for i in range(6)}

    def work(i: int) -> None:
        for _ in range(5):
            got[i].append(token_ids(tiny.generate(prompts[i], params, use_tqdm=False)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: [wanted[i]] * 5 for i in range(6)}


def test_closing(tiny_tokenizer: Path) -> None:
    with start(tiny_tokenizer) as llm:
        assert_usable(llm)
        running = threading.Thread(target=llm.generate, args=([PROMPT] * 20, GREEDY), kwargs={"use_tqdm": False})
        running.start()
        while not llm.engine._streams:
            time.sleep(0.001)
        llm.close()
        running.join()
        llm.close()
        for call in (llm.generate, llm.score):
            with pytest.raises(RuntimeError, match="the engine is closed"):
                call([PROMPT], use_tqdm=False)
    llm.close()


def test_an_engine_whose_state_is_lost_can_be_closed(tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = start(tiny_tokenizer)
    runner = llm.engine.runner

    def fail(*_: object) -> None:
        runner._sequences.history.delete()
        raise RuntimeError("a device error")

    monkeypatch.setattr(runner, "run", fail)
    with pytest.raises(RuntimeError, match="a device error"):
        llm.generate([PROMPT], GREEDY, use_tqdm=False)
    llm.close()


IDS = PROMPT[:5]
TEXT = "<7>"


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (TEXT, [(TEXT, None)]),
        (np.str_(TEXT), [(TEXT, None)]),
        (IDS, [(None, IDS)]),
        (tuple(IDS), [(None, IDS)]),
        (np.array(IDS), [(None, IDS)]),
        (jnp.array(IDS), [(None, IDS)]),
        (iter(IDS), [(None, IDS)]),
        (range(3), [(None, [0, 1, 2])]),
        (TextPrompt(prompt=TEXT), [(TEXT, None)]),
        (TokensPrompt(prompt_token_ids=IDS), [(None, IDS)]),
        ({"prompt_token_ids": np.array(IDS), "prompt": TEXT, "multi_modal_data": None}, [(TEXT, IDS)]),
        ([TEXT, IDS, {"prompt": TEXT}], [(TEXT, None), (None, IDS), (TEXT, None)]),
        ((TEXT, TEXT), [(TEXT, None)] * 2),
        (map(str.strip, [TEXT, TEXT]), [(TEXT, None)] * 2),
        ({"a": TEXT}.values(), [(TEXT, None)]),
        (np.array([IDS, IDS]), [(None, IDS)] * 2),
        ([np.array(IDS), [np.int32(3), np.uint8(4)], (i for i in IDS)], [(None, IDS), (None, [3, 4]), (None, IDS)]),
        (np.array([TEXT, TEXT]), [(TEXT, None)] * 2),
        ([], []),
        ([[]], [(None, [])]),
    ],
)
def test_prompts_of_every_type(prompts: Any, expected: list[tuple[str | None, list[int] | None]]) -> None:
    parsed = parse_prompts(prompts)
    assert [prompt[:2] for prompt in parsed] == expected
    assert all(type(token_id) is int for prompt in parsed for token_id in prompt.token_ids or ())


A_PROMPT = r"must be a text or a list of token ids, got "


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts must be a prompt or a list of prompts, got None"),
        (5, "prompts must be a prompt or a list of prompts, got 5"),
        (b"text", "prompts must be a prompt or a list of prompts, got b'text'"),
        ({3, 4}, "prompts must be a prompt or a list of prompts, got {3, 4}"),
        (np.array(5), r"prompts must be a prompt or a list of prompts, got 5"),
        ([IDS, None], rf"prompts\[1\] {A_PROMPT}None"),
        ([[5.0]], rf"prompts\[0\] {A_PROMPT}\[5.0\]"),
        (np.array([5.0, 6.0]), rf"prompts\[0\] {A_PROMPT}5.0"),
        ([TEXT, np.array([5.0])], rf"prompts\[1\] {A_PROMPT}array\(\[5.\]\)"),
        ([IDS, [5, True]], rf"prompts\[1\] {A_PROMPT}\[5, True\]"),
        ([IDS, np.array([True])], rf"prompts\[1\] {A_PROMPT}array\(\[ True\]\)"),
        ([IDS, [5, "a"]], rf"prompts\[1\] {A_PROMPT}\[5, 'a'\]"),
        ([[IDS]], rf"prompts\[0\] {A_PROMPT}\[\["),
        ([TEXT, b"x"], rf"prompts\[1\] {A_PROMPT}b'x'"),
        ([{5, 6}], rf"prompts\[0\] {A_PROMPT}{{5, 6}}"),
        ({}, r"prompts\[0\] must have prompt or prompt_token_ids, and nothing else, got \[\]"),
        ([TEXT, {"text": TEXT}], r"prompts\[1\] must have prompt or prompt_token_ids, .* got \['text'\]"),
        ({"prompt": TEXT, "cache_salt": "x"}, "must have prompt or prompt_token_ids, and nothing else, got"),
        ({"prompt": 5}, r"prompts\[0\]\.prompt must be a text, got 5"),
        ([IDS, {"prompt_token_ids": "ids"}], r"prompts\[1\]\.prompt_token_ids must be a list of token ids, got 'ids'"),
        ({"prompt_token_ids": [5.5]}, r"prompts\[0\]\.prompt_token_ids must be a list of token ids, got \[5.5\]"),
    ],
)
def test_other_prompts_are_refused_by_number(prompts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_prompts(prompts)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.lists(inner, max_size=4).map(iter)
        | st.dictionaries(st.sampled_from(["prompt", "prompt_token_ids", "role", "content"]) | st.text(), inner)
    ),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(anything)
def test_prompts_are_prompts_or_refused(prompts: Any) -> None:
    try:
        parsed = parse_prompts(prompts)
    except RequestError:
        return
    for text, ids, *_ in parsed:
        assert text is not None or ids is not None
        assert text is None or isinstance(text, str)
        assert ids is None or all(type(token_id) is int for token_id in ids)


@settings(max_examples=60, deadline=None)
@given(anything)
def test_conversations_are_lists_or_refused(messages: Any) -> None:
    try:
        conversations = parse_conversations(messages)
    except RequestError:
        return
    assert all(isinstance(conversation, list) for conversation in conversations)


def test_prompts_reach_the_model_as_they_are(tiny: LLM) -> None:
    prompts: list[Any] = [np.array(PROMPT), tuple(PROMPT), TokensPrompt(prompt_token_ids=PROMPT, prompt="mine"), "<7>"]
    outputs = tiny.generate(iter(prompts), (GREEDY for _ in prompts), use_tqdm=False)
    assert token_ids(outputs)[:3] == [WANTED] * 3
    assert [output.prompt for output in outputs] == [None, None, "mine", "<7>"]
    assert [output.prompt_token_ids for output in outputs] == [PROMPT, PROMPT, PROMPT, [7]]
    assert tiny.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 0}, "sampling_params must be SamplingParams or a list of them, got {'temperature': 0}"),
        ("greedy", "sampling_params must be SamplingParams or a list of them, got 'greedy'"),
        (5, "sampling_params must be SamplingParams or a list of them, got 5"),
        ([GREEDY, None], r"sampling_params\[1\] must be SamplingParams, got None"),
        ([GREEDY], "sampling_params must be one or as many as prompts, got 1 for 2"),
    ],
)
def test_other_sampling_params_are_refused(tiny: LLM, params: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tiny.generate([PROMPT, PROMPT], params, use_tqdm=False)


def test_a_text_that_is_none_is_refused_by_number(tiny: LLM) -> None:
    with pytest.raises(RequestError, match=r"prompts\[1\]: text must be a string of valid Unicode"):
        tiny.generate(["<7>", "\ud800"], GREEDY, use_tqdm=False)


def test_the_rest_of_the_window(tiny: LLM) -> None:
    """A max_tokens that nobody set ends there; one that does not fit is refused."""
    long = (PROMPT * 9)[: GOLDEN.length - 3]
    for params in (None, SamplingParams(ignore_eos=True), SamplingParams(max_tokens=None, ignore_eos=True)):
        (output,) = tiny.generate([long], params, use_tqdm=False)
        assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (3, "length")
    with pytest.raises(RequestError, match=rf"max_tokens of 16 after a prompt of {len(long)} tokens exceeds"):
        tiny.generate([long], SamplingParams(max_tokens=16), use_tqdm=False)


def test_a_whole_window_is_scored(tiny: LLM) -> None:
    whole = PROMPT + WANTED
    assert len(whole) == GOLDEN.length
    first, second = tiny.score([whole, whole[:-1]])
    assert first[:-1] == second
    logits = GOLDEN.logits[:-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    scores = [entry[token].logprob for entry, token in zip(first[1:], whole[1:], strict=True) if entry is not None]
    np.testing.assert_allclose(scores, expected[np.arange(len(expected)), whole[1:]], atol=1e-4)
    (output,) = tiny.generate([whole], SamplingParams(max_tokens=None, prompt_logprobs=0), use_tqdm=False)
    assert (output.outputs[0].token_ids, output.outputs[0].text, output.outputs[0].finish_reason) == ([], "", "length")
    assert output.prompt_logprobs == first
    for prompt, params in (
        (whole, SamplingParams(prompt_logprobs=0, max_tokens=1)),
        (whole, SamplingParams(max_tokens=None)),
        ([*whole, 5], SamplingParams(prompt_logprobs=0, max_tokens=SoftLimit(1))),
    ):
        with pytest.raises(RequestError, match=rf"prompt of {len(prompt)} tokens leaves no room for output"):
            tiny.generate([prompt], params, use_tqdm=False)


def test_several_outputs_of_a_prompt(tiny: LLM) -> None:
    """Each as if it had been asked for alone, the best of more by the mean of their log-probabilities."""
    params = SamplingParams(n=2, seed=7, max_tokens=6, logprobs=0, ignore_eos=True)
    first, second = tiny.generate([[5, 6, 7], [8, 9]], params, use_tqdm=False)
    alone = [
        tiny.generate([[5, 6, 7]], replace(params, n=1, seed=7 + i), use_tqdm=False)[0].outputs[0] for i in range(3)
    ]
    assert [one.index for one in first.outputs] == [0, 1]
    assert [one.token_ids for one in first.outputs] == [one.token_ids for one in alone[:2]]
    assert len(second.outputs) == 2
    (ranked,) = tiny.generate([[5, 6, 7]], replace(params, best_of=3), use_tqdm=False)
    best = sorted(alone, key=lambda one: one.cumulative_logprob or 0.0, reverse=True)[:2]
    assert [one.token_ids for one in ranked.outputs] == [one.token_ids for one in best]
    with pytest.raises(RequestError, match="n and best_of must be 1 for a request of the engine, got 2"):
        tiny.engine.add_request("a", [5], params)
