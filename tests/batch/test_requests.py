"""Batch files: one result for each line, whatever it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.batch.engine import LOOKAHEAD
from tests.batch.echo import CHAT, MAX_MODEL_LEN, MODEL, NONE_CACHED, EchoEngine, line, read, run, write


def answer(tmp_path: Path, one: dict[str, Any] | str) -> dict[str, Any]:
    """The result of a single line."""
    run(EchoEngine(), write(tmp_path / "in", one), tmp_path / "out")
    (result,) = read(tmp_path / "out")
    return result


def test_completion(tmp_path: Path) -> None:
    result = answer(tmp_path, line("a", prompt="hello", max_tokens=2, model=MODEL, n=1, stream=False, user=None))
    created = result["response"]["body"].pop("created")
    assert created > 0
    assert result == {
        "id": "batch_req_1",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "batch_req_1",
            "body": {
                "id": "batch_req_1",
                "object": "text_completion",
                "model": MODEL,
                "choices": [{"index": 0, "text": "xx", "logprobs": None, "finish_reason": "length"}],
                "usage": {"prompt_tokens": 6, "completion_tokens": 2, "total_tokens": 8, **NONE_CACHED},
            },
        },
        "error": None,
    }


def test_chat(tmp_path: Path) -> None:
    body = answer(tmp_path, line("a", CHAT, messages=[{"role": "user", "content": "hi"}]))["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "xxx"}, "no limit but the model's"
    assert body["usage"]["prompt_tokens"] == len("<user>hi")


def test_several_prompts_and_choices(tmp_path: Path) -> None:
    """All in one result, by prompt, then by number; each prompt counted once."""
    result = answer(tmp_path, line("a", prompt=["one", "three"], n=2, max_tokens=2))
    body = result["response"]["body"]
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(i, "xx") for i in range(4)]
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 8, "total_tokens": 18, **NONE_CACHED}


def test_token_ids_as_prompt(tmp_path: Path) -> None:
    body = answer(tmp_path, line("a", prompt=[5, 6, 7], max_completion_tokens=1))["response"]["body"]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4, **NONE_CACHED}


def test_logprobs_of_a_completion(tmp_path: Path) -> None:
    body = answer(tmp_path, line("a", prompt="hello", max_tokens=2, logprobs=1))["response"]["body"]
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["x", "x"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"y": -0.5, "x": -1.0}] * 2,
        "text_offset": [0, 1],
    }


@pytest.mark.parametrize(
    ("top_logprobs", "top"),
    [
        (None, []),
        (0, []),
        (2, [{"token": "y", "logprob": -0.5, "bytes": [121]}, {"token": "x", "logprob": -1, "bytes": [120]}]),
    ],
)
def test_logprobs_of_a_chat(tmp_path: Path, top_logprobs: int | None, top: list[dict[str, Any]]) -> None:
    messages = [{"role": "user", "content": "hi"}]
    one = line("a", CHAT, messages=messages, max_tokens=1, logprobs=True, top_logprobs=top_logprobs)
    choice = answer(tmp_path, one)["response"]["body"]["choices"][0]
    assert choice["logprobs"] == {"content": [{"token": "x", "logprob": -1.0, "bytes": [120], "top_logprobs": top}]}


def test_served_model_names(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *(line(str(m), prompt="hi", model=m) for m in ("one", "two", MODEL, None)))
    summary = run(EchoEngine(), source, tmp_path / "out", names=["one", "two"])
    assert (summary.num_succeeded, summary.num_errors) == (3, 1)
    by_id = {result["custom_id"]: result for result in read(tmp_path / "out")}
    assert by_id[MODEL]["error"]["message"] == "model must be 'one' or 'two', which is served here, got 'echo'"
    assert by_id["two"]["response"]["body"]["model"] == by_id["None"]["response"]["body"]["model"] == "one"


BAD_LINES = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("\udcff\udcff", "not JSON"),
    ("[1]", "a line must be a JSON object, got [1]"),
    ({"method": "POST"}, "custom_id must be a string, got None"),
    (line("a") | {"custom_id": 7}, "custom_id must be a string, got 7"),
    (line("a") | {"method": "GET"}, "method must be 'POST', got 'GET'"),
    (
        line("a") | {"url": "/v1/embeddings"},
        "url must be /v1/chat/completions or /v1/completions or /v1/responses, got '/v1/embeddings'",
    ),
    (line("a") | {"url": []}, "url must be /v1/chat/completions or /v1/completions or /v1/responses, got []"),
    (line("a") | {"body": "hello"}, "body must be a JSON object, got 'hello'"),
    (line("a", max_tokens=2), "prompt must be a string, a list of token ids, or a list of those, got None"),
    (line("a", prompt=["hello", 5]), "prompt must be a string, a list of token ids, or a list of those, got ['"),
    (line("a", prompt=[True]), "prompt must be a string, a list of token ids, or a list of those, got [True]"),
    (line("a", CHAT, prompt="hello"), "messages must be a list of at least one message, got None"),
    (line("a", prompt="hello", beams=2), "unknown parameter 'beams' for /v1/completions; known: allowed_token_ids, "),
    (line("a", prompt="hello", best_of=129), "best_of must be an integer in [1, 128], got 129"),
    (line("a", prompt="hello", logit_bias={"5": -101}), "logit_bias must be in [-100, 100], got -101"),
    (
        line("a", CHAT, messages=[], tools=[{"type": "function"}]),
        "tools[0] must be {'type': 'function', 'function': ...}, got {'type':",
    ),
    (line("a", CHAT, messages=[], tool_choice="required"), "tool_choice 'required' needs tools, got none"),
    (
        line("a", CHAT, messages=[], response_format={"type": "yaml"}),
        "response_format.type must be one of text, json_object, json_schema, structural_tag, got 'yaml'",
    ),
    (line("a", prompt="hello", prompt_logprobs=2), "unknown parameter 'prompt_logprobs'"),
    (line("a", prompt="hello", n=200), "n must be an integer in [1, 128], got 200"),
    (line("a", prompt="hello", stream=True), "stream must be false in a batch, got true"),
    (line("a", prompt="hello", model="gpt"), "model must be 'echo', which is served here, got 'gpt'"),
    (line("a", prompt="hello", temperature=-1), "temperature must be in [0, 100], got -1"),
    (line("a", prompt="hello", temperature=10**400), "temperature must be in [0, 100], got 1000"),
    (line("a", prompt="hello", max_tokens=0), "max_tokens must be an integer in [1, 2147483647], got 0"),
    (line("a", prompt="hello", stop=5), "stop must be"),
    (line("a", prompt="hello", stop_token_ids=5), "stop_token_ids must be"),
    (line("a", prompt="hello", ignore_eos="no"), "ignore_eos must be"),
    (line("a", CHAT, messages=[], logprobs=3), "logprobs must be true or false, got 3"),
    (line("a", CHAT, messages=[], top_logprobs=3), "top_logprobs needs logprobs to be true, got 3 without"),
    (line("a", prompt="x" * MAX_MODEL_LEN), "prompt of 101 tokens exceeds max_model_len 100"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_LINES)
def test_a_bad_line_fails_alone(tmp_path: Path, bad: dict[str, Any] | str, message: str) -> None:
    source = tmp_path / "in"
    text = bad if isinstance(bad, str) else json.dumps(bad)
    source.write_text(
        "\n".join([json.dumps(line("first")), text, "", json.dumps(line("last"))]), errors="surrogateescape"
    )
    summary = run(EchoEngine(), source, tmp_path / "out")
    assert (summary.num_succeeded, summary.num_errors, summary.num_skipped) == (2, 1, 0)
    results = {result["id"]: result for result in read(tmp_path / "out")}
    assert sorted(results) == ["batch_req_1", "batch_req_2", "batch_req_4"]
    failed = results.pop("batch_req_2")
    assert failed["error"]["code"] == "invalid_request"
    assert message in failed["error"]["message"]
    assert failed["response"] == {"status_code": 400, "request_id": "batch_req_2", "body": None}
    assert failed["custom_id"] == ("a" if isinstance(bad, dict) and bad.get("custom_id") == "a" else None)
    assert all(result["error"] is None for result in results.values())


def test_a_custom_id_belongs_to_the_first_line_that_has_it(tmp_path: Path) -> None:
    source = write(tmp_path / "in", line("a", prompt="first"), line("a", prompt="second"))
    for _ in range(2):
        run(EchoEngine(), source, tmp_path / "out")
        results = {result["id"]: result for result in read(tmp_path / "out")}
        assert len(results) == 2
        assert results["batch_req_1"]["error"] is None
        assert results["batch_req_2"]["custom_id"] is None
        assert results["batch_req_2"]["error"]["message"] == "custom_id 'a' is already that of batch_req_1"


def test_a_bounded_number_of_requests_is_in_flight(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *(line(str(i)) for i in range(100)))
    engine = EchoEngine()
    summary = run(engine, source, tmp_path / "out")
    assert engine.config.max_num_seqs < engine.max_in_flight <= LOOKAHEAD * engine.config.max_num_seqs
    assert (summary.num_succeeded, summary.num_prompt_tokens, summary.num_output_tokens) == (100, 600, 200)
    assert str(summary).startswith("100 requests, 0 errors, 0 skipped in ")


def test_real_engine(llm: LLM, tmp_path: Path) -> None:
    """Batched with others and among bad lines, answers are those of LLM."""
    questions = ["What is the capital of France?", "Name a color.", "What is 2 + 2?"]
    prompts = ["The sky is", "Once upon a time", "One, two, three,"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    good = [
        *(line(q, CHAT, messages=m, temperature=0, max_tokens=12) for q, m in zip(questions, chats, strict=True)),
        *(line(p, prompt=p, temperature=0, max_tokens=12, logprobs=2) for p in prompts),
    ]
    scored = line("scored", prompt=prompts[1], echo=True, max_tokens=0, logprobs=0)
    bad = [line("long", prompt="word " * 3000), line("vocabulary", prompt=[10**6]), line("empty", prompt="")]
    source, out = write(tmp_path / "in", *good[:2], *bad, "oops", *good[2:], scored), tmp_path / "out"
    summary = run(llm.engine, source, out)
    assert (summary.num_succeeded, summary.num_errors) == (7, 4)
    assert not llm.engine.has_unfinished()

    results = {result["custom_id"]: result for result in read(out)}
    messages = {custom_id: (results[custom_id]["error"] or {}).get("message") for custom_id in results}
    assert messages["long"] == "prompt of 3001 tokens leaves no room for output: max_model_len is 2048"
    assert messages["vocabulary"] == "prompt holds token id 1000000, outside the vocabulary [0, 49152)"
    assert messages["empty"] == "prompt must hold at least one token, got none"
    choices = {name: r["response"]["body"]["choices"][0] for name, r in results.items() if r["error"] is None}
    params = SamplingParams(temperature=0, max_tokens=12)
    for question, output in zip(questions, llm.chat(chats, params, use_tqdm=False), strict=True):
        assert choices[question]["message"]["content"] == output.outputs[0].text
        assert choices[question]["finish_reason"] == output.outputs[0].finish_reason
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        assert choices[prompt]["text"] == output.outputs[0].text
        logprobs = choices[prompt]["logprobs"]
        assert "".join(logprobs["tokens"]) == output.outputs[0].text
        assert [max(top.values()) for top in logprobs["top_logprobs"]] == logprobs["token_logprobs"], "greedy"
    positions = llm.score([prompts[1]])[0]
    scores = [None if position is None else next(iter(position.values())).logprob for position in positions]
    assert choices["scored"]["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=1e-5)
    assert choices["scored"]["text"] == prompts[1]
