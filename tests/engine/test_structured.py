"""Structured outputs through the engine: valid whatever is drawn, beside neighbours that know nothing of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from jaxserve import LLM, RequestError, SamplingParams, StructuredOutputsParams
from jaxserve.grammars import Matcher
from jaxserve.request import FinishReason
from tests.batch.echo import run, write
from tests.schemas import SCHEMAS

PROMPT = "Write about a person:"
PERSON = {
    "type": "object", "additionalProperties": False, "required": ["name", "age"],
    "properties": {
        "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
}  # fmt: skip


def structured(temperature: float = 1.0, seed: int | None = 0, max_tokens: int = 80, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens, structured_outputs=fields)


def test_every_kind(llm: LLM) -> None:
    grammar = 'root ::= "yes" | "no" " "+ "way"'
    tag = {"structures": [{"begin": "<p>", "schema": PERSON, "end": "</p>"}], "triggers": ["<p>"]}
    asked: list[dict[str, Any]] = [
        {"json": PERSON}, {"json": json.dumps(PERSON)}, {"json_object": True}, {"regex": "[0-9]{3}-[a-f]{2}"},
        {"choice": ["red", "dark green", "reddish"]}, {"grammar": grammar}, {"structural_tag": tag},
    ]  # fmt: skip
    outputs = llm.generate([PROMPT] * len(asked), [structured(**one) for one in asked], use_tqdm=False)
    person, again, anything, number, colour, word, _ = (output.outputs[0] for output in outputs)
    for one in (person, again):
        assert one.finish_reason == "stop"
        jsonschema.validate(json.loads(one.text), PERSON)
    if anything.finish_reason == "stop":
        assert isinstance(json.loads(anything.text), dict)
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", number.text)
    assert colour.text in asked[4]["choice"]
    assert re.fullmatch("yes|no +way", word.text) or word.finish_reason == "length"
    params = SamplingParams(temperature=0, max_tokens=60, structured_outputs=StructuredOutputsParams(json=PERSON))
    (greedy,) = llm.generate(PROMPT, params, use_tqdm=False)
    jsonschema.validate(json.loads(greedy.outputs[0].text), PERSON)


def test_neighbours_see_nothing_of_it(llm: LLM) -> None:
    """And each constrained output is what it is alone."""
    plain = SamplingParams(temperature=0.8, seed=5, max_tokens=30, ignore_eos=True)
    alone = llm.generate(PROMPT, plain, use_tqdm=False)[0].outputs[0].token_ids
    wanted = [structured(seed=seed, json=PERSON) for seed in range(5)]
    texts = [llm.generate(PROMPT, one, use_tqdm=False)[0].outputs[0].text for one in wanted]
    crowd = llm.generate([PROMPT] * 11, [plain, *wanted, *wanted], use_tqdm=False)
    assert crowd[0].outputs[0].token_ids == alone
    assert [one.outputs[0].text for one in crowd[1:]] == texts * 2
    assert len(set(texts)) > 1


def test_schemas_of_many_keywords(llm: LLM) -> None:
    """Drawn at random; those that come to an end in time are valid. tests/test_grammars.py has the others."""
    schemas = SCHEMAS[::7]
    params = [structured(temperature=1.5, seed=i, max_tokens=80, json=schema) for i, schema in enumerate(schemas)]
    outputs = llm.generate([PROMPT] * len(params), params, use_tqdm=False)
    num_ended = 0
    for schema, output in zip(schemas, outputs, strict=True):
        one = output.outputs[0]
        if one.finish_reason == "stop":
            num_ended += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(one.text))
        else:
            assert one.finish_reason == "length", one
    assert num_ended > len(schemas) / 2


def test_what_cannot_be_compiled_fails_alone(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"prompts\[0\]: structured_outputs.regex cannot be compiled, got '\(a'"):
        llm.generate(PROMPT, structured(regex="(a"), use_tqdm=False)
    assert llm.generate(PROMPT, SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.parametrize("method", ["fill", "accept"])
def test_a_grammar_that_takes_too_much_work_ends_its_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, method: str, tmp_path: Path
) -> None:
    calls, original = [], getattr(Matcher, method)

    def tired(self: Matcher, argument: Any) -> None:
        calls.append(self)
        if len(calls) == 4:
            raise RequestError("structured_outputs cannot be followed any further: too much")
        original(self, argument)

    monkeypatch.setattr(Matcher, method, tired)
    plain = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    failed, served = llm.generate([PROMPT] * 2, [structured(json=PERSON), plain], use_tqdm=False)
    one = failed.outputs[0]
    assert (one.finish_reason, one.stop_reason) == (
        FinishReason.ERROR, "structured_outputs cannot be followed any further: too much",
    )  # fmt: skip
    assert len(one.token_ids) == (3 if method == "fill" else 4)
    assert len(served.outputs[0].token_ids) == 20

    calls.clear()
    body = {"prompt": PROMPT, "max_tokens": 50, "structured_outputs": {"json": PERSON}}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    summary = run(llm.engine, write(tmp_path / "in", line), tmp_path / "out")
    assert summary.num_errors == 1
    assert "too much" in json.loads((tmp_path / "out").read_text())["error"]["message"]


def test_what_must_be_goes_before_the_rest(llm: LLM) -> None:
    """Where a minimum of tokens or other limits leave nothing of what the grammar allows, they give way."""
    fields: dict[str, Any] = {"min_tokens": 50, "allowed_token_ids": [5], "logit_bias": {7: 100.0}}
    params = SamplingParams(
        temperature=0, max_tokens=50, structured_outputs=StructuredOutputsParams(choice=["one", "two"]), **fields
    )
    (output,) = llm.generate(PROMPT, params, use_tqdm=False)
    assert output.outputs[0].text in ("one", "two")
    assert np.all(np.array(output.outputs[0].token_ids) >= 0)


def test_preemptions() -> None:
    """A grammar goes on where it was."""
    config: dict[str, Any] = {
        "model": "smollm2-135m", "token_budget": 16, "max_num_seqs": 4, "max_model_len": 128, "block_size": 8,
        "num_blocks": 17, "show_progress": False, "enable_prefix_caching": False,
    }  # fmt: skip
    params = [structured(seed=seed, max_tokens=60, json=PERSON) for seed in range(4)]
    with LLM(**config) as llm:
        outputs = llm.generate([PROMPT * 5] * 4, params, use_tqdm=False)
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
        ended = [one.outputs[0] for one in outputs if one.outputs[0].finish_reason == "stop"]
        assert ended
        for one in ended:
            jsonschema.validate(json.loads(one.text), PERSON)
        assert llm.engine.compiles.count == 0
