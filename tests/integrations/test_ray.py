"""The class that Ray's actors run, without Ray; tests/clients/ray_client.py runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve import ConfigError, RequestError
from jaxserve.integrations.ray import LLMPredictor
from tests.models.golden import Golden

GOLDEN = Golden("llama_gqa_tied")
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def predictor(tokenizer: Path) -> Iterator[LLMPredictor]:
    template = tokenizer / "template.jinja"
    template.write_text(TEMPLATE)
    predictor = LLMPredictor(
        str(GOLDEN.checkpoint), tokenizer=str(tokenizer), chat_template=str(template), max_model_len=GOLDEN.length,
        token_budget=16, max_num_seqs=4, num_blocks=40, block_size=8,
        sampling_params={"temperature": 0, "max_tokens": len(GOLDEN.greedy), "ignore_eos": True},
    )  # fmt: skip
    yield predictor
    predictor._llm.close()


def text(tokens: list[int]) -> str:
    return " ".join(f"<{token}>" for token in tokens)


def column(*values: object) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def test_rows_keep_their_columns_and_a_bad_one_fails_alone(predictor: LLMPredictor) -> None:
    prompts = column(text(GOLDEN.prompt), text([5] * GOLDEN.length), text(GOLDEN.prompt), None)
    done = predictor({"id": np.arange(4), "prompt": prompts})
    assert done["id"].tolist() == [0, 1, 2, 3]
    assert [one.split() for one in done["generated_text"]] == [
        text(GOLDEN.greedy).split(),
        [],
        text(GOLDEN.greedy).split(),
        [],
    ]
    assert done["finish_reason"].tolist() == ["length", "error", "length", "error"]
    assert done["num_prompt_tokens"].tolist() == [len(GOLDEN.prompt), 0, len(GOLDEN.prompt), 0]
    assert done["num_generated_tokens"].tolist() == [len(GOLDEN.greedy), 0, len(GOLDEN.greedy), 0]
    assert done["error"].tolist()[::2] == ["", ""]
    assert f"exceeds max_model_len {GOLDEN.length}" in done["error"][1] or "leaves no room" in done["error"][1]
    assert "text must be a string of valid Unicode, got None" in done["error"][3]


def test_chats_are_rendered(predictor: LLMPredictor) -> None:
    chat = [
        {"role": "user", "content": text(GOLDEN.prompt[:5])},
        {"role": "assistant", "content": text(GOLDEN.prompt[5:])},
    ]
    done = predictor({"messages": column(chat, [])})
    assert done["generated_text"][0].split() == text(GOLDEN.greedy).split()
    assert "messages must be a list of at least one message" in done["error"][1]


def test_a_batch_of_bad_rows_alone(predictor: LLMPredictor) -> None:
    done = predictor({"prompt": column("", "")})
    assert done["error"].tolist() == ["prompt must hold at least one token, got none"] * 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sampling_params": {"temperature": -1}}, RequestError, "temperature must be in"),
        ({"sampling_params": {"n": 2}}, RequestError, "n must be 1, an output for each row, got 2"),
        ({"token_budget": 0}, ConfigError, "token_budget must be"),
    ],
)
def test_mistakes_before_weights_are_loaded(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LLMPredictor(str(GOLDEN.checkpoint), **options)


def test_a_batch_without_prompts(predictor: LLMPredictor) -> None:
    with pytest.raises(RequestError, match="a batch must have the column prompt or messages, got text, id"):
        predictor({"text": column("a"), "id": np.arange(1)})
