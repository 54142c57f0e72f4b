"""What a door knows of the model: names, limits, and how a prompt becomes token ids."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxserve.errors import RequestError
from jaxserve.prompts import ParsedPrompt
from jaxserve.sampling_params import SamplingParams, SoftLimit
from jaxserve.served_model import MAX_TEXT_TOKENS, ServedModel, TokenLimit, UnknownModelError
from jaxserve.tokenizer import Tokenizer

BYTES = Tokenizer.of_bytes()
MODEL = ServedModel(("one", "two"), BYTES, max_model_len=10, vocab_size=256, sampling_defaults={"top_k": 9})
TEXT = "a" * 11


def test_token_ids_go_before_the_text_that_is_shown_for_them() -> None:
    assert MODEL.token_ids(ParsedPrompt("abc", [5, 6])) == [5, 6]
    assert MODEL.token_ids(ParsedPrompt("abc")) == BYTES.encode("abc")


def test_only_a_limit_refuses_a_long_text() -> None:
    """Without one it is the engine's to refuse."""
    assert len(MODEL.token_ids(ParsedPrompt(TEXT))) == 11
    with pytest.raises(RequestError, match="prompt of 11 characters, at least 11 tokens, exceeds max_model_len 10"):
        MODEL.token_ids(ParsedPrompt(TEXT), MODEL.prompt_limit)
    assert len(MODEL.token_ids(ParsedPrompt(TEXT), MODEL.text_limit)) == 11


@pytest.mark.parametrize(
    ("sampling", "num_tokens"),
    [
        ({"truncate_prompt_tokens": 4}, 4),
        ({"truncate_prompt_tokens": 40}, 11),
        ({"truncate_prompt_tokens": -1}, 9),
        ({"truncate_prompt_tokens": -1, "max_tokens": 3}, 7),
        ({"truncate_prompt_tokens": -1, "max_tokens": 30}, 1),
        ({"truncate_prompt_tokens": None}, 11),
    ],
)
def test_the_end_of_a_prompt_is_kept(sampling: dict[str, int | None], num_tokens: int) -> None:
    text = "0123456789a"
    wanted = BYTES.encode(text[-num_tokens:])
    assert MODEL.token_ids(ParsedPrompt(text), sampling=sampling) == wanted
    assert MODEL.token_ids(ParsedPrompt(token_ids=BYTES.encode(text)), sampling=sampling) == wanted


def test_a_text_to_be_truncated_may_be_long_but_not_endless() -> None:
    sampling = {"truncate_prompt_tokens": 4}
    assert len(MODEL.token_ids(ParsedPrompt(TEXT), MODEL.prompt_limit, sampling)) == 4
    with pytest.raises(RequestError, match=r"prompt of 131073 characters, .* exceeds the limit of 131072"):
        MODEL.token_ids(ParsedPrompt("a" * (MAX_TEXT_TOKENS + 1)), MODEL.prompt_limit, sampling)
    with pytest.raises(RequestError, match=r"truncate_prompt_tokens must be an integer in \[-1, .*\], got 'x'"):
        MODEL.token_ids(ParsedPrompt(TEXT), sampling={"truncate_prompt_tokens": "x"})


def test_all_logprobs_are_as_many_as_the_vocabulary_has() -> None:
    params = MODEL.sampling_params({"logprobs": -1, "prompt_logprobs": 2}, 8)
    assert (params.logprobs, params.prompt_logprobs) == (256, 2)


def test_texts_may_be_longer_than_prompts() -> None:
    assert MODEL.text_limit == TokenLimit(MAX_TEXT_TOKENS, "the limit of")
    long = replace(MODEL, max_model_len=MAX_TEXT_TOKENS + 1)
    assert long.text_limit == long.prompt_limit == TokenLimit(MAX_TEXT_TOKENS + 1, "max_model_len")


def test_a_chat_needs_a_template() -> None:
    with pytest.raises(RequestError, match="messages cannot be served: the model has no chat template"):
        MODEL.token_ids(ParsedPrompt(messages=[{"role": "user", "content": "hi"}]))


def test_names() -> None:
    MODEL.check_name("two")
    with pytest.raises(UnknownModelError, match="model must be 'one' or 'two', which is served here, got 'three'"):
        MODEL.check_name("three")


def test_the_request_wins_over_the_model_and_the_model_over_the_door() -> None:
    assert MODEL.sampling_params({}, 8) == SamplingParams(top_k=9, max_tokens=2)
    assert isinstance(MODEL.sampling_params({}, 8).max_tokens, SoftLimit)
    door = {"top_k": 3, "max_tokens": None}
    assert MODEL.sampling_params({}, 8, door) == SamplingParams(top_k=9, max_tokens=None)
    assert MODEL.sampling_params({"top_k": 1, "max_tokens": 50}, 8, door) == SamplingParams(top_k=1, max_tokens=50)
