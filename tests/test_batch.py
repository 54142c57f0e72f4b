"""Batch files: one result for each line whatever it holds, and none lost or doubled by interruptions."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import LLM, EngineConfig, SamplingParams
from jaxserve.batch_file import LOOKAHEAD, BatchRun, BatchSummary
from jaxserve.errors import RequestError
from jaxserve.request import FinishReason, Logprob, RequestDelta, RequestMetrics
from jaxserve.result_file import BatchFileError, ResultFile

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MODEL, MAX_MODEL_LEN = "echo", 100

NONE_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}


class EchoTokenizer:
    """One token a character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in ("^" if add_special_tokens else "") + text]

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def check(self, text: str) -> None:
        """Takes all."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def decode_stream(self, skip_special_tokens: bool, after: list[int]) -> Any:
        return SimpleNamespace(step=chr)

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


class EchoEngine:
    """Gives each request a letter x a step; ``interrupt_at`` is the step at which the user interrupts."""

    def __init__(self, config: EngineConfig | None = None, interrupt_at: int | None = None) -> None:
        self.config = SimpleNamespace(model=MODEL, max_num_seqs=2)
        self.tokenizer = EchoTokenizer()
        self.max_model_len = MAX_MODEL_LEN
        self.model_config = SimpleNamespace(vocab_size=2**21)
        self.sampling_defaults: dict[str, Any] = {}
        self.interrupt_at = interrupt_at
        self.running: dict[str, list[Any]] = {}
        self.max_in_flight = self.num_steps = 0
        self.closed = False

    def validate(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        if len(prompt_token_ids) >= MAX_MODEL_LEN:
            raise RequestError(f"prompt of {len(prompt_token_ids)} tokens exceeds max_model_len {MAX_MODEL_LEN}")

    def grammar_of(self, params: SamplingParams) -> None:
        """Has none."""

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        assert request_id not in self.running
        self.running[request_id] = [prompt_token_ids, params, 0]
        self.max_in_flight = max(self.max_in_flight, len(self.running))

    def abort(self, request_id: str) -> bool:
        return self.running.pop(request_id, None) is not None

    def has_unfinished(self) -> bool:
        return bool(self.running)

    def step(self) -> list[RequestDelta]:
        self.num_steps += 1
        if self.num_steps == self.interrupt_at:
            raise KeyboardInterrupt
        return [self._advance(request_id) for request_id in list(self.running)]

    def close(self) -> None:
        self.closed = True

    def _advance(self, request_id: str) -> RequestDelta:
        request = self.running[request_id]
        request[2] += 1
        prompt, params, num_tokens = request
        last = num_tokens == (params.max_tokens or 3)
        if last:
            del self.running[request_id]
        # Asked for alternatives, it says that y would have been the likeliest.
        alternatives = {ord("y"): Logprob(-0.5, 1), ord("z"): Logprob(-1.5, 3)}
        entry = {ord("x"): Logprob(-1.0, 2)} | dict(list(alternatives.items())[: params.logprobs])
        return RequestDelta(
            request_id=request_id,
            token_ids=[ord("x")],
            text="x",
            logprobs=None if params.logprobs is None else [entry],
            prompt_logprobs=None,
            finish_reason=FinishReason.LENGTH if last else None,
            stop_reason=None,
            metrics=RequestMetrics(arrival_seconds=0.0),
            num_prompt_tokens=len(prompt),
        )


def line(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    body = body or {"prompt": "hello", "max_tokens": 2}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def run(engine: Any, source: Path, destination: Path) -> BatchSummary:
    results = ResultFile(destination)
    try:
        with source.open("rb") as lines:
            return BatchRun(engine, lines, results, show_progress=False).run()
    finally:
        results.close()


def read(path: Path) -> list[dict[str, Any]]:
    data = path.read_text()
    assert not data or data.endswith("\n")
    return [json.loads(one) for one in data.splitlines()]


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
    with source.open("rb") as lines:
        results = ResultFile(tmp_path / "out")
        names = ["one", "two"]
        summary = BatchRun(EchoEngine(), lines, results, served_model_names=names, show_progress=False).run()  # type: ignore[arg-type]
        results.close()
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
    assert engine.max_in_flight == LOOKAHEAD * engine.config.max_num_seqs
    assert (summary.num_succeeded, summary.num_prompt_tokens, summary.num_output_tokens) == (100, 600, 200)
    assert str(summary).startswith("100 requests, 0 errors, 0 skipped in ")


LINES: list[dict[str, Any] | str] = [
    *(line(str(i), prompt="hello", max_tokens=1 + i % 5) for i in range(30)),
    "{",
    line("bad", prompt="hello", top_p=0),
]


def answers(path: Path) -> list[str]:
    """All results in order of their ids, without the time of day."""
    results = read(path)
    for result in results:
        if result["error"] is None:
            del result["response"]["body"]["created"]
    return sorted(json.dumps(result) for result in results)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", *LINES), tmp_path / "out"
    run(EchoEngine(), source, tmp_path / "whole")
    num_runs = 0
    while True:
        engine = EchoEngine(interrupt_at=6)
        before, num_runs = read(out) if num_runs else [], num_runs + 1
        try:
            summary = run(engine, source, out)
            break
        except KeyboardInterrupt:
            assert not engine.has_unfinished(), "the engine is left empty"
            assert read(out)[: len(before)] == before
    assert num_runs >= 3
    assert summary.num_skipped == len(before)
    assert answers(out) == answers(tmp_path / "whole")
    assert run(EchoEngine(interrupt_at=1), source, out).num_skipped == len(LINES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an input and its whole output."""
    folder = tmp_path_factory.mktemp("finished")
    run(EchoEngine(), write(folder / "in", *LINES), folder / "whole")
    return folder


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1))
def test_output_torn_anywhere_is_completed(finished: Path, share: float) -> None:
    data, out = (finished / "whole").read_bytes(), finished / "out"
    out.write_bytes(data[: round(share * len(data))])
    kept = out.read_bytes().count(b"\n")
    assert run(EchoEngine(), finished / "in", out).num_skipped == kept
    assert answers(out) == answers(finished / "whole")


@pytest.mark.parametrize(
    "content", ["my notes", "my notes\n", "7\n", '{"id": "batch_req_1"}\n', json.dumps(line("a")), "{}\n{}\n"]
)
def test_other_files_are_not_written_to(tmp_path: Path, content: str) -> None:
    source, out = write(tmp_path / "in", line("a")), tmp_path / "out"
    out.write_text(content)
    with pytest.raises(BatchFileError, match="out, line 1: not a batch result: b'"):
        run(EchoEngine(), source, out)
    assert out.read_text() == content


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", *LINES), tmp_path / "out"
    first = ResultFile(out)
    with pytest.raises(BatchFileError, match="out: another run is writing to this file"):
        run(EchoEngine(), source, out)
    first.close()
    assert run(EchoEngine(), source, out).num_succeeded == len(LINES) - 2


def test_results_go_to_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(BatchFileError, match=f"{path}: results must go to a file, which a restart can read"):
            ResultFile(path)


@contextlib.contextmanager
def pipe_of(path: Path) -> Iterator[IO[bytes]]:
    """The file's content through a pipe."""
    reading, writing = os.pipe()

    def fill() -> None:
        with os.fdopen(writing, "wb") as end:
            end.write(path.read_bytes())

    with os.fdopen(reading, "rb") as source, ThreadPoolExecutor(1) as pool:
        pool.submit(fill)
        yield source


def test_a_pipe_is_an_input(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(EchoEngine(), write(tmp_path / "in", *LINES), tmp_path / "whole")
    for num_skipped in (0, len(LINES)):
        results = ResultFile(out)
        with pipe_of(tmp_path / "in") as source:
            summary = BatchRun(EchoEngine(), source, results, show_progress=False).run()  # type: ignore[arg-type]
        results.close()
        assert summary.num_skipped == num_skipped
    assert answers(out) == answers(tmp_path / "whole")


@pytest.fixture
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "batch.py"
    spec = importlib.util.spec_from_file_location("batch", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "Engine", EchoEngine)
    source, out = write(tmp_path / "in", *LINES), tmp_path / "out"
    assert script.main([str(source), str(out)]) == 0
    assert len(read(out)) == len(LINES)
    assert capsys.readouterr().out.startswith("32 requests, 2 errors, 0 skipped in ")


def test_script_with_a_pipe_and_a_name(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "Engine", EchoEngine)
    source = write(tmp_path / "in", *(line(str(i), prompt="hi", model="my-model") for i in range(9)))
    for name in ("-", "/dev/stdin"):
        with pipe_of(source) as pipe:
            monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=pipe))
            path = name if name == "-" else f"/dev/fd/{pipe.fileno()}"
            assert script.main([path, str(tmp_path / "out"), "--served-model-name", "my-model"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("9 requests, 0 errors, 0 skipped in ")
    assert second.startswith("0 requests, 0 errors, 9 skipped in ")


def test_an_interrupted_script_says_so(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "Engine", partial(EchoEngine, interrupt_at=6))
    source, out = write(tmp_path / "in", *LINES), tmp_path / "out"
    assert script.main([str(source), str(out)]) == 130
    assert "batch.py: interrupted; run it again to go on" in capsys.readouterr().err
    done = len(read(out))
    assert 0 < done < len(LINES)
    monkeypatch.setattr(script, "Engine", EchoEngine)
    assert script.main([str(source), str(out)]) == 0
    assert f"{done} skipped" in capsys.readouterr().out


def test_script_fails_before_a_model_is_loaded(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in", *LINES), tmp_path / "out"
    assert script.main([str(tmp_path / "none"), str(out)]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert script.main([str(source), str(source)]) == 2
    assert "not a batch result" in capsys.readouterr().err
    other = write(tmp_path / "other", line("a", prompt="hi", model="gpt-4o"), line("b", prompt="hi", model="o1"))
    assert script.main([str(other), str(out)]) == 2
    assert "model must be 'smollm2-135m', which is served here, but every request has another, such as 'o1'" in (
        capsys.readouterr().err
    )
    held = ResultFile(out)
    assert script.main([str(source), str(out)]) == 2
    assert "out: another run is writing to this file" in capsys.readouterr().err
    held.close()
    assert script.main([str(source), str(out), "--model", "no-such-model"]) == 2
    assert "unknown model 'no-such-model'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        script.main([str(source), str(out), "--token-budget", "0"])
    assert caught.value.code == 2
    assert "token_budget must be an integer of at least 1, got 0" in capsys.readouterr().err


def test_real_engine(llm: LLM, tmp_path: Path) -> None:
    """Batched with others and among bad lines, answers are those of LLM."""
    questions = ["What is the capital of France?", "Name a color.", "What is 2 + 2?"]
    prompts = ["The sky is", "Once upon a time", "One, two, three,"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    good = [
        *(line(q, CHAT, messages=m, temperature=0, max_tokens=12) for q, m in zip(questions, chats, strict=True)),
        *(line(p, prompt=p, temperature=0, max_tokens=12, logprobs=2) for p in prompts),
    ]
    bad = [line("long", prompt="word " * 3000), line("vocabulary", prompt=[10**6]), line("empty", prompt="")]
    source, out = write(tmp_path / "in", *good[:2], *bad, "oops", *good[2:]), tmp_path / "out"
    summary = run(llm.engine, source, out)
    assert (summary.num_succeeded, summary.num_errors) == (6, 4)
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
