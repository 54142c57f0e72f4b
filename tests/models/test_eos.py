"""What ends an output: the union of all that a model's files say."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import ModelError
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.loading.gguf_file import read_gguf
from jaxserve.models.loading.gguf_tokenizer import declared_eos
from jaxserve.models.loading.hub import resolve
from tests.models.folders import CONFIG, word_folder, write_json
from tests.models.golden import Golden


def ends(model: Path | str) -> tuple[int, ...]:
    checkpoint = open_checkpoint(str(model))
    return checkpoint.eos_token_ids(checkpoint.tokenizer())


GENERATION, CONFIG_2 = {"eos_token_id": [2, 7]}, CONFIG | {"eos_token_id": 2}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": CONFIG_2}, (2,)),
        ({"generation_config": GENERATION}, (2, 7)),
        ({"generation_config": {"eos_token_id": 5}, "config": CONFIG_2}, (5, 2)),
        ({"config": CONFIG | {"eos_token_id": None, "text_config": {"eos_token_id": [9, 106]}}}, (9,)),
        # A ChatML fine-tune, whose generation_config.json is the base model's.
        ({"generation_config": {"eos_token_id": 2}, "tokenizer_config": {"eos_token": "w35"}}, (2, 35)),
        ({"tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": "w35"}}}, (35,)),
        ({"special_tokens_map": {"eos_token": {"content": "w36"}}, "tokenizer_config": {"eos_token": "w35"}}, (36, 35)),
        ({"config": CONFIG | {"eos_token_id": "35"}}, (35,)),
        ({"generation_config": {"eos_token_id": ["35", "w36", 2, None]}}, (35, 36, 2)),
        ({}, ()),
    ],
)
def test_union_of_all_files(tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert ends(word_folder(tmp_path, **files)) == expected


def test_ends_that_any_vocabulary_may_have(tmp_path: Path) -> None:
    """As llama.cpp finds them by their text, whatever the files say; Gemma's </s> is a tag of HTML."""
    added = {"<|im_end|>": 90, "<|eot_id|>": 91, "<end_of_turn>": 92, "</s>": 93}
    folder = word_folder(tmp_path, 90, added_tokens=added, generation_config={"eos_token_id": 2})
    assert ends(folder) == (2, 90, 91, 92)


def test_a_message_of_several_does_not_end_an_output(tmp_path: Path) -> None:
    """Of gpt-oss, which thinks in one message and answers in the next."""
    added = {"<|end|>": 90, "<|return|>": 91, "<|call|>": 92, "<|endoftext|>": 93}
    folder = word_folder(tmp_path, 90, added_tokens=added, generation_config={"eos_token_id": [91, 93]})
    assert ends(folder) == (91, 93, 92)


def test_dummy_weights_end_as_the_model_does(tmp_path: Path) -> None:
    folder = word_folder(tmp_path, generation_config=GENERATION, tokenizer_config={"eos_token": "w35"})
    checkpoint = open_checkpoint(str(folder), "dummy")
    assert checkpoint.eos_token_ids(checkpoint.tokenizer()) == (2, 7, 35)


def test_another_tokenizer_has_its_own(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(word_folder(tmp_path / "model", tokenizer_config={"eos_token": "w35"})))
    other = open_checkpoint(str(word_folder(tmp_path / "other", tokenizer_config={"eos_token": "w36"})))
    assert checkpoint.eos_token_ids(other.tokenizer()) == (36,)


def test_one_log_line_names_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ends(word_folder(tmp_path, generation_config=GENERATION, tokenizer_config={"eos_token": "w35"}))
    assert caplog.messages == [f"{tmp_path}: outputs end with 2 'w2', 7 'w7', 35 'w35'"]


def test_what_is_no_token_of_the_model_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = word_folder(tmp_path, generation_config={"eos_token_id": [96, -1, "<|end|>", "9" * 20, 2]})
    assert ends(folder) == (2,)
    assert caplog.messages == [
        f"{folder}: no tokens of the model, so they end no output: 96, -1, '<|end|>', '{'9' * 20}'"
    ]
    caplog.clear()
    assert ends(write_json(folder, generation_config={})) == ()
    assert caplog.messages == [f"{folder}: no token ends an output, each runs to max_tokens"]


@pytest.mark.parametrize("wrong", [True, 2.0, {"id": 2}, [2, [3]], [False]])
@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_wrong_types_are_named(tmp_path: Path, name: str, wrong: Any) -> None:
    raw = CONFIG if name == "config" else {}
    folder = word_folder(tmp_path, **{name: raw | {"eos_token_id": wrong}})
    with pytest.raises(ModelError, match=rf"/{name}\.json: eos_token_id must be a token id or a list of them, found"):
        open_checkpoint(str(folder))


def test_gguf() -> None:
    assert ends("smollm2-135m") == (2, 0)
    metadata = read_gguf(resolve("smollm2-135m")).metadata
    more = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}
    assert declared_eos(metadata | more, "m.gguf") == (2, 5, 6)
    with pytest.raises(ModelError, match=r"^m\.gguf: tokenizer\.ggml\.eot_token_id must be an integer .*, found '5'"):
        declared_eos({"tokenizer.ggml.eot_token_id": "5"}, "m.gguf")


def test_reference_checkpoints_without_a_tokenizer_open() -> None:
    assert open_checkpoint(str(Golden("gemma3_local").checkpoint)).declared_eos == (1, 94)
