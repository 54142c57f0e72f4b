"""The engine on the embedded model: stops, seeds, aborts, bad input, and no compilation after warm-up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxserve import LLM, ConfigError, RequestError, SamplingParams
from jaxserve.errors import ModelError
from jaxserve.request import RequestDelta

PROMPT = "The capital of France is"
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def run(llm: LLM, **options: object) -> tuple[str, list[int], str | None, int | str | None]:
    """Text, token ids, finish reason and stop reason of PROMPT, greedily continued unless options say otherwise."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": 24, "ignore_eos": True, **options})  # type: ignore[arg-type]
    output = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0]
    return output.text, output.token_ids, output.finish_reason, output.stop_reason


def drain(llm: LLM) -> list[RequestDelta]:
    deltas = []
    while llm.engine.has_unfinished():
        deltas += llm.engine.step()
    return deltas


def test_stop_string(llm: LLM) -> None:
    text, _, reason, _ = run(llm)
    assert reason == "length"
    stop = text[9:14]
    cut = text.index(stop)
    assert run(llm, stop=stop)[0] == text[:cut]
    assert run(llm, stop=[stop, "never"])[2:] == ("stop", stop)
    assert run(llm, stop=stop, include_stop_str_in_output=True)[0] == text[: cut + len(stop)]


def test_stop_token_and_eos(llm: LLM) -> None:
    text, token_ids, _, _ = run(llm)
    stop = token_ids[5]
    at = token_ids.index(stop)
    short, ids, reason, stop_reason = run(llm, stop_token_ids=[stop])
    assert (ids, reason, stop_reason) == (token_ids[: at + 1], "stop", stop)
    assert text.startswith(short)
    chat = [{"role": "user", "content": "What is the capital of Italy?"}]
    ended = llm.chat(chat, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)[0].outputs[0]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert ended.token_ids[-1] in llm.engine.eos_token_ids
    forced = llm.chat(chat, GREEDY, use_tqdm=False)[0].outputs[0]
    assert len(forced.token_ids) == 24
    assert forced.token_ids[: len(ended.token_ids)] == ended.token_ids


def test_max_tokens_none_runs_to_max_model_len(llm: LLM) -> None:
    prompt = [5] * (llm.engine.max_model_len - 7)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    output = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (7, "length")


def test_seeded_output_does_not_depend_on_batch_mates(llm: LLM) -> None:
    params = SamplingParams(temperature=1.1, top_p=0.9, top_k=40, min_p=0.01, seed=7, max_tokens=20, ignore_eos=True)
    alone = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids
    others = [SamplingParams(temperature=0.7, seed=i, max_tokens=20) for i in range(9)]
    crowd = llm.generate([PROMPT] * 10, [*others[:5], params, *others[5:]], use_tqdm=False)
    assert crowd[5].outputs[0].token_ids == alone
    assert len({tuple(output.outputs[0].token_ids) for output in crowd}) > 5


def test_abort_frees_blocks_at_once_at_any_time(llm: LLM) -> None:
    engine, rng = llm.engine, np.random.default_rng(0)
    for steps in range(0, 8, 2):
        for index in range(6):
            engine.add_request(f"{steps}-{index}", rng.integers(1, 1000, 150).tolist(), GREEDY)
        for _ in range(steps):
            engine.step()
        for index in range(6):
            engine.abort(f"{steps}-{index}")
            engine.blocks.check()
        assert engine.blocks.num_used == 0
        assert not engine.abort(f"{steps}-0"), "an ended request is unknown"
        deltas = drain(llm)
        assert sorted(d.request_id for d in deltas if d.finish_reason == "abort") == [f"{steps}-{i}" for i in range(6)]


def test_deltas_add_up_and_name_their_request(llm: LLM) -> None:
    llm.engine.add_request("a", llm.engine.tokenizer.encode(PROMPT), GREEDY)
    deltas = drain(llm)
    assert [d.request_id for d in deltas] == ["a"] * 24
    assert "".join(d.text for d in deltas) == run(llm)[0]
    assert [d.finish_reason for d in deltas] == [None] * 23 + ["length"]
    metrics = deltas[-1].metrics
    assert metrics.ttft_seconds is not None
    assert metrics.scheduling_delay_seconds is not None
    assert 0 <= metrics.scheduling_delay_seconds <= metrics.ttft_seconds
    assert len(metrics.tbt_seconds) == 23


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", GREEDY, r"prompts\[0\]: prompt must hold at least one token"),
        ([], GREEDY, "prompt must hold at least one token"),
        ([1] * 2048, GREEDY, "prompt of 2048 tokens leaves no room for output: max_model_len is 2048"),
        ([1, 49152], GREEDY, r"prompt holds token id 49152, outside the vocabulary \[0, 49152\)"),
        ([-1], GREEDY, "prompt holds token id -1, outside the vocabulary"),
        ([1] * 2040, GREEDY, "max_tokens of 24 after a prompt of 2040 tokens exceeds max_model_len 2048"),
        ([1], SamplingParams(logprobs=21), "logprobs of 21 exceeds max_logprobs 20"),
        ([1], SamplingParams(prompt_logprobs=-1), "prompt_logprobs of -1 exceeds max_logprobs 20"),
        ([1], SamplingParams(stop_token_ids=[60000]), "stop_token_ids holds token id 60000, outside the vocabulary"),
    ],
)
def test_bad_request_is_named_and_the_engine_lives_on(
    llm: LLM, prompt: str | list[int], params: SamplingParams, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate([prompt] if isinstance(prompt, list) else prompt, params, use_tqdm=False)
    assert not llm.engine.has_unfinished()
    assert run(llm)[2] == "length"


def test_request_id_in_flight_is_refused(llm: LLM) -> None:
    llm.engine.add_request("same", [1, 2, 3], GREEDY)
    with pytest.raises(RequestError, match="request_id 'same' is already in flight"):
        llm.engine.add_request("same", [1, 2, 3], GREEDY)
    llm.engine.abort("same")
    drain(llm)


def test_bad_engine_config() -> None:
    with pytest.raises(ConfigError, match="max_model_len must not exceed the model's 8192 positions, got 9000"):
        LLM(max_model_len=9000)
    with pytest.raises(ModelError, match="unknown model 'no-such-model'"):
        LLM(model="no-such-model")


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"compilation_cache: cannot use '.*/file/cache': Not a directory"):
        LLM(compilation_cache=str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"trace: cannot write '.*/none/trace.json': No such file or directory"):
        LLM(trace=str(tmp_path / "none" / "trace.json"))


def test_nothing_compiles_after_warm_up(llm: LLM) -> None:
    """A mixed workload of 110 requests: lengths, sampling, logprobs, stops and aborts at random."""
    engine, rng = llm.engine, np.random.default_rng(1)
    for index in range(110):
        prompt = rng.integers(0, 49152, int(rng.choice([1, 3, 20, 60, 130]))).tolist()
        engine.add_request(
            str(index),
            prompt,
            SamplingParams(
                temperature=float(rng.choice([0, 0.7, 1.3])),
                top_p=float(rng.choice([1, 0.8])),
                top_k=int(rng.choice([0, 5])),
                min_p=float(rng.choice([0, 0.05])),
                max_tokens=int(rng.integers(1, 6)),
                logprobs=None if rng.random() < 0.8 else int(rng.integers(0, 21)),
                prompt_logprobs=None if rng.random() < 0.9 else int(rng.integers(0, 4)),
                stop=["the"] if rng.random() < 0.2 else (),
            ),
        )
    finished, step = 0, 0
    while engine.has_unfinished():
        finished += sum(delta.finish_reason is not None for delta in engine.step())
        step += 1
        if step % 10 == 0:
            engine.abort(str(int(rng.integers(110))))
        engine.blocks.check()
    assert finished == 110
    assert engine.compiles.count == 0
