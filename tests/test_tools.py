"""Tools of chats: what bodies may say, what models write, and what comes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import RequestError
from jaxserve.grammars import Grammars
from jaxserve.openai import CHAT, Ask
from jaxserve.openai.tool_formats import FORMATS
from jaxserve.openai.tool_grammar import tool_grammar
from jaxserve.openai.tools import ToolCall, ToolParser, Tools
from jaxserve.request import Completion, FinishReason, Logprob, RequestDelta, RequestMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.served_model import ServedModel
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.tokenizer import Tokenizer
from tests.test_grammars import GRAMMARS, allowed, byte_walk

BY_NAME = {entry.name: entry for entry in FORMATS}
SCHEMAS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("weather", "time")]
HERMES_TEMPLATE = (
    """{% if tools %}Write <tool_call>{"name": ..., "arguments": ...}</tool_call>: {{ tools | tojson }}{{ '\n' }}"""
    "{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
QUESTION = {"role": "user", "content": "How late is it?"}


def byte_tokenizer(template: str | None) -> Tokenizer:
    tokenizer = Tokenizer.of_bytes()
    if template is not None:
        tokenizer.set_chat_template(template)
    return tokenizer


MODEL = ServedModel(
    ("bytes",), byte_tokenizer(HERMES_TEMPLATE), max_model_len=1000, vocab_size=256, sampling_defaults={}
)


def tools(name: str, parallel: bool = True) -> Tools:
    return Tools(SCHEMAS, BY_NAME[name], parallel)


def parsed(chosen: Tools, *parts: str) -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls of an answer that arrives in these parts."""
    parser, text, calls = ToolParser(chosen), "", list[ToolCall]()
    for number, part in enumerate(parts, 1):
        more, found = parser.feed(part, is_last=number == len(parts))
        text, calls = text + more, calls + found
    assert parser.num_calls == len(calls) == len({call.id for call in calls})
    return text, [(call.name, json.loads(call.arguments)) for call in calls]


WEATHER, TIME = ("weather", {"city": "Kraków", "days": [1, {"a": None}]}), ("time", {})


def written(call: tuple[str, Any], arguments: str = "arguments") -> str:
    return json.dumps({"name": call[0], arguments: call[1]}, ensure_ascii=False)


CALL, OTHER = f"<tool_call>{written(TIME)}</tool_call>", f"<tool_call>\n{written(WEATHER)}\n</tool_call>"
LLAMA_CALL, LLAMA_OTHER = written(TIME, "parameters"), written(WEATHER, "parameters")
ANSWERS: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    # What Hermes and Qwen write, with and without words around it, and SmolLM2's lists.
    ("hermes", OTHER, "", [WEATHER]),
    ("hermes", f"\n{OTHER}\n{CALL} ", "", [WEATHER, TIME]),
    ("hermes", f"Let me see. \n\n{CALL}\nDone", "Let me see.Done", [TIME]),
    ("hermes", f"<tool_call>[{written(TIME)}, {written(WEATHER)}]</tool_call>", "", [TIME, WEATHER]),
    ("hermes", '<tool_call>\n{ "arguments": {}, "name": "time"}\n</tool_call> ', "", [TIME]),
    ("hermes", f"<tool_call>\n{written(TIME)}", "", [TIME]),
    ("hermes", f"<tool_call>[]</tool_call> {CALL}", "<tool_call>[]</tool_call>", [TIME]),
    # Llama 3's are the whole answer.
    ("llama3_json", LLAMA_OTHER, "", [WEATHER]),
    ("llama3_json", f"\n {LLAMA_OTHER}; {LLAMA_CALL} ", "", [WEATHER, TIME]),
    # Mistral's, in a list, and since 2025 one by one.
    ("mistral", f"[TOOL_CALLS] [{written(WEATHER)}, {written(TIME)}]", "", [WEATHER, TIME]),
    ("mistral", 'Well. [TOOL_CALLS]time[ARGS]{"a": 1}', "Well.", [("time", {"a": 1})]),
    ("mistral", "[TOOL_CALLS]time[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]weather{}", "", [TIME, ("weather", {})]),
]
NO_CALLS = [
    ("hermes", " It is <b>late</b> < now \n"),
    ("hermes", "<tool_call>late</tool_call>\n"),
    ("hermes", '<tool_call>{"name": "time", "argu'),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "time", "arguments": "now"}</tool_call>'),
    ("hermes", '<tool_call>{"name": ["time"], "arguments": {}}</tool_call>'),
    ("hermes", "<tool_call>" + "[" * 10_000 + "</tool_call>"),
    ("llama3_json", f"Like so: {LLAMA_CALL}"),
    ("llama3_json", '{"name": "Bob", "parameters": {}}'),
    ("llama3_json", f"{LLAMA_CALL} is it"),
    ("mistral", "[TOOL_CALLS] none"),
    ("mistral", "[TOOL] [TOOL_"),
]


@pytest.mark.parametrize(
    ("name", "answer", "text", "calls"), [*ANSWERS, *((name, answer, answer, []) for name, answer in NO_CALLS)]
)
def test_answers(name: str, answer: str, text: str, calls: list[tuple[str, Any]]) -> None:
    assert parsed(tools(name), answer) == (text, calls)
    assert parsed(tools(name), *answer, "") == (text, calls), "character by character"


PIECES = (
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", written(TIME), written(WEATHER), " ", "\n", "{", "}", "; ",
    "time", "Hi", "<", "[",
)  # fmt: skip


@given(st.sampled_from(sorted(BY_NAME)), st.lists(st.sampled_from(PIECES), max_size=12), st.data())
def test_the_division_into_parts_changes_nothing(name: str, pieces: list[str], data: st.DataObject) -> None:
    answer = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    parts = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    text, calls = parsed(tools(name), answer)
    assert parsed(tools(name), *parts) == (text, calls)
    if not calls:
        assert text == answer, "nothing is lost"


def test_text_is_given_out_as_soon_as_it_can_be_no_call() -> None:
    parser = ToolParser(tools("hermes"))
    assert [parser.feed(part, is_last=False)[0] for part in ("a <", "b", " <tool", "_box>", "<tool_call>x")] == [
        "a", " <b", "", " <tool_box>", "",
    ]  # fmt: skip


def test_one_call_where_no_more_are_wanted() -> None:
    assert parsed(tools("hermes", parallel=False), CALL + OTHER) == ("", [TIME])
    assert parsed(tools("mistral", parallel=False), f"[TOOL_CALLS][{written(TIME)}, {written(WEATHER)}]") == (
        "",
        [TIME],
    )


def test_names_of_calls() -> None:
    """Mistral's templates insist on nine letters or digits."""
    assert BY_NAME["hermes"].new_id().startswith("chatcmpl-tool-")
    mistral = BY_NAME["mistral"].new_id()
    assert len(mistral) == 9
    assert mistral.isalnum()


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("""{{- '{"name": "' + call.name + '", "arguments": ' }}{{- '<tool_call>' }}""", "hermes"),
        ("""{{- "<tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <args>}" }}""", "hermes"),
        ("""<|start_header_id|>{{- 'Respond in the format {"name": ..., "parameters": ...}' }}""", "llama3_json"),
        ("""{{- "[TOOL_CALLS] [" }}""", "mistral"),
        ("""{{- "<tool_call><function=" + call.name + "><parameter=" }}""", None),
        ("""<tool_call>{{ call.name }}<arg_key>""", None),
        ("{{ messages }}", None),
    ],
)  # fmt: skip
def test_templates_tell_the_format(template: str, name: str | None) -> None:
    assert next((entry.name for entry in FORMATS if entry.is_of(template)), None) == name


def ask(model: ServedModel = MODEL, **body: Any) -> Ask:
    return CHAT.parse({"messages": [QUESTION], **body}, model)


def test_the_template_is_shown_the_tools() -> None:
    (completion,) = CHAT.completions(ask(tools=SCHEMAS), "id", MODEL)
    prompt = MODEL.text(completion.prompt_token_ids)
    assert prompt.startswith('Write <tool_call>{"name": ..., "arguments": ...}</tool_call>: ' + json.dumps(SCHEMAS))
    for body in ({"tools": []}, {"tools": SCHEMAS, "tool_choice": "none"}):
        (completion,) = CHAT.completions(ask(**body), "id", MODEL)
        assert MODEL.text(completion.prompt_token_ids) == "user: How late is it?\nassistant: "


def test_calls_come_back_as_messages() -> None:
    """Arguments as OpenAI has them, a text, and null where its clients write it."""
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "CET"}'}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
        {"role": "assistant", "content": "Noon.", "tool_calls": None},
    ]
    (completion,) = CHAT.completions(ask(messages=messages), "id", MODEL)
    assert MODEL.text(completion.prompt_token_ids) == (
        'user: How late is it?\nassistant: <tool_call>{"name": "time", "arguments": {"zone": "CET"}}</tool_call>\n'
        "tool: noon\nassistant: Noon.\nassistant: "
    )


ARGUMENTS = {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip
STRICT = [
    {"type": "function", "function": {"name": "weather", "parameters": ARGUMENTS, "strict": True}},
    {"type": "function", "function": {"name": "time", "parameters": None}},
]


def must_call(**body: Any) -> StructuredOutputsParams:
    (completion,) = CHAT.completions(ask(**body), "id", MODEL)
    assert completion.params.structured_outputs is not None
    return completion.params.structured_outputs


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("only", [None, "weather"])
@pytest.mark.parametrize("parallel", [True, False])
def test_answers_that_must_be_calls_are(name: str, only: str | None, parallel: bool) -> None:
    chosen = Tools(STRICT, BY_NAME[name], parallel, required=True, only=only)
    found = []
    for seed in range(6):
        answer = byte_walk(seed, grammar=tool_grammar(chosen, MODEL.tokenizer))
        text, calls = parsed(chosen, answer)
        assert not text
        found.append(len(calls))
        for called, arguments in calls:
            assert only in (None, called)
            jsonschema.validate(arguments, ARGUMENTS if called == "weather" else {})
    assert min(found) == 1
    assert max(found) == 1 or (parallel and only is None)


@pytest.mark.parametrize(
    ("name", "begin", "forced"),
    [
        ("hermes", "Well, <tool_call>", '\n{"name": "'),
        ("llama3_json", "{", '"name": "'),
        ("mistral", "Well, [TOOL_CALLS]", '[{"name": "'),
    ],
)
def test_strict_tools_bind_calls_and_leave_text_free(name: str, begin: str, forced: str) -> None:
    grammar = tool_grammar(tools(name), MODEL.tokenizer)
    assert grammar is None, "nothing is strict"
    grammar = tool_grammar(Tools(STRICT, BY_NAME[name]), MODEL.tokenizer)
    compiled = GRAMMARS.compile(StructuredOutputsParams(grammar=grammar))
    matcher = compiled.matcher()
    for token_id in MODEL.tokenizer.encode(begin):
        matcher.accept(token_id)
    assert MODEL.tokenizer.decode(matcher.forced()) == forced
    matcher = compiled.matcher()
    for token_id in MODEL.tokenizer.encode("It is late, {}"):
        matcher.accept(token_id)
    assert 256 in allowed(matcher), "a text may end"


def test_marks_that_are_special_tokens() -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>", "[TOOL_CALLS]", "[ARGS]"])
    special = Tokenizer(backend, special_tokens={"eos_token": "</s>"}, chat_template=None)
    end, mark, arguments = (special.token_id(token) for token in ("</s>", "[TOOL_CALLS]", "[ARGS]"))
    grammars = Grammars(special, 300, [end or 0])
    for required, begin in ((True, ""), (False, "Well, ")):
        grammar = tool_grammar(Tools(STRICT, BY_NAME["mistral"], required=required), special)
        matcher = grammars.compile(StructuredOutputsParams(grammar=grammar)).matcher()
        for token_id in special.encode(f"{begin}[TOOL_CALLS]weather"):
            matcher.accept(token_id)
        assert allowed(matcher) == [arguments]
        for token_id in special.encode('[ARGS]{"city":"a"}'):
            matcher.accept(token_id)
        assert {mark, end} <= set(allowed(matcher))


def test_tools_that_must_be_called_reach_the_engine() -> None:
    named = {"type": "function", "function": {"name": "time"}}
    every, one = must_call(tools=SCHEMAS, tool_choice="required"), must_call(tools=SCHEMAS, tool_choice=named)
    assert "weather" in str(every.grammar)
    assert "weather" not in str(one.grammar)


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "time", **fields}}]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": "time"}, "tools must be a list of at most 128 tools, got 'time'"),
    ({"tools": SCHEMAS * 65}, "tools must be a list of at most 128 tools, got "),
    ({"tools": [SCHEMAS[0], {"type": "x"}]}, "tools[1] must be {'type': 'function', 'function': ...}, got {'type':"),
    ({"tools": function(name="a b")}, "tools[0].function.name must be 1 to 64 of a-z, A-Z, 0-9, _ and -, got 'a b'"),
    ({"tools": function(description=1)}, "tools[0].function.description must be a string, got 1"),
    ({"tools": function(parameters=[])}, "tools[0].function.parameters must be a JSON Schema, got []"),
    ({"tools": function(strict=1)}, "tools[0].function.strict must be true or false, got 1"),
    ({"tools": SCHEMAS, "tool_choice": "any"}, "tool_choice must be 'none', 'auto', 'required' or {'type': 'function'"),
    ({"tool_choice": "required"}, "tool_choice 'required' needs tools, got none"),
    ({"tools": SCHEMAS, "tool_choice": {"type": "function", "function": {"name": "rm"}}},
     "tool_choice.function.name must be the name of one of tools, got 'rm'"),
    ({"tools": function(strict=True, parameters={"not": {}})}, "tools[0].function.parameters at # has 'not', a "),
    ({"tools": function(strict=True, parameters={"type": "string"})},
     "tools[0].function.parameters.type must be 'object', got 'string'"),
    ({"tools": [{"type": "function", "function": {
        "name": f"f{i}", "strict": True, "parameters": {"enum": ["a" * 1000] * 40}}} for i in range(2)]},
     "tools must make a grammar of at most"),
    ({"tools": function(strict=True), "response_format": {"type": "json_object"}}, "response_format and struct"),
    ({"tools": SCHEMAS, "parallel_tool_calls": 2}, "parallel_tool_calls must be true or false, got 2"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs must not have tools, which is a parameter of its"),
    ({"chat_template_kwargs": "x"}, "chat_template_kwargs must be an object, got 'x'"),
    ({"add_generation_prompt": 1}, "add_generation_prompt must be true or false, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), BAD)
def test_errors_name_the_field(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        ask(**body)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("x", r"messages\[0\]\.tool_calls must be a list, got 'x'"),
        ([{"name": "f"}], r"messages\[0\]\.tool_calls\[0\] must be {'function': {'name': \.\.\.}}, got {'name': 'f'}"),
        (
            [{"function": {"name": "f", "arguments": "[1]"}}],
            r"messages\[0\]\.tool_calls\[0\]\.function\.arguments must be a JSON object, got \[1\]",
        ),
        (
            [{"function": {"name": "f", "arguments": "{"}}],
            r"messages\[0\]\.tool_calls\[0\]\.function\.arguments must be a JSON object, got '{'",
        ),
    ],
)
def test_malformed_calls(calls: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        CHAT.completions(ask(messages=[{"role": "assistant", "tool_calls": calls}]), "id", MODEL)


def test_models_without_a_format_are_named() -> None:
    for template in (None, "{{ messages }}"):
        model = replace(MODEL, tokenizer=byte_tokenizer(template))
        known = "mistral, llama3_json, hermes"
        with pytest.raises(RequestError, match=f"the model's chat template has calls in no known format: {known}"):
            ask(model, tools=SCHEMAS)


def delta(text: str, reason: FinishReason | None = None, has_logprobs: bool = False) -> RequestDelta:
    token_ids = MODEL.tokenizer.encode(text)
    logprobs = [{token_id: Logprob(-1.0, 1)} for token_id in token_ids] if has_logprobs else None
    return RequestDelta("id", token_ids, text, logprobs, None, reason, None, RequestMetrics(0.0), 1)


def answered(asked: Ask, *deltas: RequestDelta) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The choice of a whole response, and those of a stream's chunks."""
    params = SamplingParams(logprobs=None if deltas[0].logprobs is None else 0)
    completions = [Completion("id", [7], params) for _ in range(2)]
    for part in deltas:
        completions[0].add(part)
    whole = CHAT.respond(asked, completions[:1], "id", MODEL).whole()
    streamed = CHAT.respond(asked, completions[1:], "id", MODEL)
    chunks = [event for part in deltas for event in streamed.events(0, part)]
    return whole["choices"][0], [chunk["choices"][0] for chunk in chunks]


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_messages_of_calls(reason: FinishReason) -> None:
    asked = ask(tools=SCHEMAS)
    whole, chunks = answered(asked, *map(delta, f"{CALL}\n{OTHER}"), delta("", reason))
    message = whole["message"]
    assert (message["content"], message["role"]) == (None, "assistant")
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["time", "weather"]
    assert whole["finish_reason"] == ("tool_calls" if reason is FinishReason.STOP else "length")
    found = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", ())]
    assert [(call["index"], call["function"]) for call in found] == [
        (i, call["function"]) for i, call in enumerate(message["tool_calls"])
    ]
    assert [chunk["finish_reason"] for chunk in chunks] == [None, None, whole["finish_reason"]]
    assert [chunk["delta"].get("role") for chunk in chunks] == ["assistant", None, None]


def test_messages_without_calls_are_as_ever() -> None:
    parts = [delta("It is ", has_logprobs=True), delta("noon.", FinishReason.STOP, has_logprobs=True)]
    whole, chunks = answered(ask(tools=SCHEMAS), *parts)
    assert whole == answered(ask(), *parts)[0]
    assert (
        "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"] == "It is noon."
    )
    told = [entry["token"] for chunk in chunks for entry in chunk["logprobs"]["content"]]
    assert "".join(told) == "It is noon.", "log-probabilities come with their tokens, whatever is held back"


def test_special_tokens_stay_where_they_mark_calls(tmp_path: Path) -> None:
    from jaxserve.models.loading import hf_tokenizer

    tokenizer = byte_tokenizer("{{ '[TOOL_CALLS]' }}")
    assert ask(replace(MODEL, tokenizer=tokenizer), tools=SCHEMAS).sampling == {}
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"cls_token": "[TOOL_CALLS]"}))
    special = hf_tokenizer.load(tmp_path)
    assert ask(replace(MODEL, tokenizer=special), tools=SCHEMAS).sampling == {"skip_special_tokens": False}
    assert ask(replace(MODEL, tokenizer=special)).sampling == {}
