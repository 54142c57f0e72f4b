"""Grammars: what follows them is what was asked for, and what cannot be followed is refused in time."""

from __future__ import annotations

import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import RequestError
from jaxserve.grammar_trial import try_out
from jaxserve.grammars import Grammars
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.tokenizer import Tokenizer
from tests.schemas import SCHEMAS

VOCAB_SIZE, EOS = 300, (256, 299)
BYTES = Tokenizer.of_bytes()
GRAMMARS = Grammars(BYTES, VOCAB_SIZE, EOS)
MAX_WALK_TOKENS = 60


def allowed(matcher: Any, vocab_size: int = VOCAB_SIZE) -> list[int]:
    mask = np.full(-(-vocab_size // 32), -1, np.int32)
    matcher.fill(mask)
    found: list[int] = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    assert found, "nothing may follow"
    return found


def walk(grammars: Grammars, tokenizer: Tokenizer, eos: tuple[int, ...], size: int, seed: int, **asked: Any) -> str:
    """An output of random allowed tokens, those that lead to an end when it grows long."""
    matcher, chance = grammars.compile(StructuredOutputsParams(**asked)).matcher(), random.Random(seed)
    closing = [tokenizer.encode(text, add_special_tokens=False)[0] for text in '"}]b1@']
    ids: list[int] = []
    while True:
        choices = allowed(matcher, size)
        assert not set(choices) & (tokenizer.special_token_ids - set(eos))
        assert max(choices) < tokenizer.vocab_size or set(choices) - set(range(tokenizer.vocab_size)) <= set(eos)
        if len(ids) > MAX_WALK_TOKENS:
            ends = [token_id for token_id in (*eos, closing[0]) if token_id in choices][:1]
            likely = ends or [token_id for token_id in closing[1:] if token_id in choices]
            choices = likely if likely and chance.random() < 0.7 else choices
        token_id = chance.choice(choices)
        assert not matcher.is_done or token_id in eos
        matcher.accept(token_id)
        if token_id in eos:
            assert matcher.is_done
            return tokenizer.decode(ids)
        ids.append(token_id)
        assert len(ids) < 2000


def byte_walk(seed: int, **asked: Any) -> str:
    return walk(GRAMMARS, BYTES, EOS, VOCAB_SIZE, seed, **asked)


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_json_follows_its_schema(schema: dict[str, Any]) -> None:
    for seed in range(5):
        value = json.loads(byte_walk(seed, json=schema))
        jsonschema.validate(value, schema, jsonschema.Draft202012Validator)


def test_json_follows_its_schema_in_tokens_of_many_bytes() -> None:
    tokenizer = open_checkpoint("smollm2-135m").tokenizer()
    size = tokenizer.vocab_size + 100
    grammars = Grammars(tokenizer, size, [2])
    for number, schema in enumerate(SCHEMAS[::9]):
        value = json.loads(walk(grammars, tokenizer, (2,), size, number, json=schema))
        jsonschema.validate(value, schema, jsonschema.Draft202012Validator)


def test_any_object() -> None:
    assert all(isinstance(json.loads(byte_walk(seed, json_object=True)), dict) for seed in range(20))


@pytest.mark.parametrize(
    "regex",
    [
        "ab*c?",
        r"([0-9]{2,3}-){1,9}x",
        "[a-f]{5}|[^a]",
        r"a\.b/\"c",
        "(foo|bar){1,9}!",
        "^ab$",
        "é{2}",
        "[a-z]+@[^@]+",
    ],
)
@given(seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_expressions_match_the_whole(regex: str, seed: int) -> None:
    assert re.fullmatch(regex, byte_walk(seed, regex=regex))


def test_choices() -> None:
    choices = ["yes", "no", 'a "b"\n\\', "é", "yes and no"]
    assert {byte_walk(seed, choice=choices) for seed in range(60)} == set(choices)


@pytest.mark.parametrize(
    "grammar",
    ['start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"\n', "start: A\nA: /\\(*x\\)*/"],
)
def test_grammars(grammar: str) -> None:
    for seed in range(10):
        assert re.fullmatch(r"\(*x\)*", byte_walk(seed, grammar=grammar))


def test_tags() -> None:
    tags = {
        "structures": [{"begin": "<f=a>", "schema": {"const": 1}, "end": "</f>"}],
        "triggers": ["<f="],
    }
    matcher = GRAMMARS.compile(StructuredOutputsParams(structural_tag=tags)).matcher()
    for token_id in BYTES.encode("Well: <f="):
        matcher.accept(token_id)
    assert BYTES.decode(matcher.forced()) == "a>1</f>"


def test_ends_and_what_is_outside_of_the_vocabulary() -> None:
    matcher = GRAMMARS.compile(StructuredOutputsParams(regex="ab?")).matcher()
    (a,), (b,) = BYTES.encode("a"), BYTES.encode("b")
    assert allowed(matcher) == [a]
    matcher.accept(a)
    assert allowed(matcher) == [b, *EOS], "each end of several"
    assert not matcher.is_done
    matcher.accept(EOS[1])
    assert matcher.is_done
    matcher.accept(a)  # computed before the end was known: counts no more


def test_outputs_of_one_grammar_do_not_meet() -> None:
    grammar = GRAMMARS.compile(StructuredOutputsParams(regex="ab"))
    one, other = grammar.matcher(), grammar.matcher()
    one.accept(*BYTES.encode("a"))
    assert allowed(other) == BYTES.encode("a")


def test_outputs_of_one_grammar_are_followed_in_several_threads() -> None:
    def walks(seed: int) -> list[str]:
        return [byte_walk(seed + number, json=SCHEMAS[-1]) for number in range(10)]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(walks, range(0, 40, 10)))
    assert found == [walks(seed) for seed in range(0, 40, 10)]


def test_a_token_that_may_not_come() -> None:
    matcher = GRAMMARS.compile(StructuredOutputsParams(regex="ab")).matcher()
    with pytest.raises(RequestError, match="structured_outputs cannot be followed any further"):
        matcher.accept(*BYTES.encode("x"))


def test_a_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = GRAMMARS.compile(StructuredOutputsParams(json={"type": "integer"}))
    monkeypatch.setattr("jaxserve.grammars.try_out", None)
    assert GRAMMARS.compile(StructuredOutputsParams(json='{"type":   "integer"}')) is first


def test_who_wants_a_grammar_that_is_being_compiled_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the choices of one request do; what cannot be compiled is tried again by the next who asks."""
    tried: list[str] = []

    def slow(format: str, text: str, *_: Any) -> str:
        tried.append(text)
        time.sleep(0.2)
        if len(tried) == 1:
            raise ValueError("not now")
        return try_out(format, text, *_)

    monkeypatch.setattr("jaxserve.grammars.try_out", slow)
    params = StructuredOutputsParams(regex="a+b")
    with ThreadPoolExecutor(4) as pool:
        failing = [pool.submit(GRAMMARS.compile, params) for _ in range(4)]
        assert [str(one.exception()) for one in failing] == [
            "structured_outputs.regex cannot be compiled, got 'a+b': not now"
        ] * 4
        made = {pool.submit(GRAMMARS.compile, params) for _ in range(4)}
        assert len({id(one.result()) for one in made}) == 1
    assert len(tried) == 2


def chain(length: int) -> dict[str, Any]:
    parts = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length)}
    return {"$defs": {**parts, f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"json": {"type": "integer", "multipleOf": 1000003}}, "json must compile within 2 s, got no result"),
        ({"json": {"allOf": [{"pattern": f"a.{{{200 + i}}}b"} for i in range(6)]}}, "Unable to determine"),
        ({"json": chain(1000)}, "takes too much memory, or nests too deeply"),
        ({"json": {"allOf": [{"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in (1, 2)]} for i in range(24)]}},
         "schema too large"),
        ({"json": {"type": "foo"}}, "Invalid type: foo"),
        ({"json": {"$ref": "http://a.b/c"}}, "http://a.b/c"),
        ({"json": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, "oneOf constraints are not supported"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 4}}, "Unsatisfiable schema"),
        ({"regex": "(" * 5000 + ")" * 5000}, "nest"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "(a"}, "unclosed group"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "start: " + "(" * 20000}, "cannot be compiled"),
        ({"grammar": "root ::= ("}, "cannot be compiled"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_costs_its_time_limit(asked: dict[str, Any], message: str) -> None:
    grammars = Grammars(BYTES, VOCAB_SIZE, EOS, compile_seconds=2.0)
    start = time.monotonic()
    with pytest.raises(
        RequestError, match=f"^structured_outputs.{next(iter(asked))} (must|cannot be) compile"
    ) as found:
        grammars.compile(StructuredOutputsParams(**asked))
    assert message in str(found.value)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "regex", ["((a{1,999}){1,999}){1,999}", "(.*a.{500})|(.*b.{500})|(.*c.{499})", r"(\w{1,500}\s){1,500}", "(a|a)*b"]
)
def test_a_token_of_a_costly_expression_costs_little_or_ends_it(regex: str) -> None:
    matcher = GRAMMARS.compile(StructuredOutputsParams(regex=regex)).matcher()
    with suppress(RequestError):
        for _ in range(50):
            start = time.thread_time()
            matcher.accept(allowed(matcher)[-1])
            assert time.thread_time() - start < 5


def test_a_model_without_an_end() -> None:
    with pytest.raises(RequestError, match="json cannot be served: the model has no end-of-sequence token"):
        Grammars(BYTES, VOCAB_SIZE, []).compile(StructuredOutputsParams(json={}))
