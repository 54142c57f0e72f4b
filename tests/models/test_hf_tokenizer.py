"""Tokens and chat templates from all files of a folder, beside what transformers makes of them."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.errors import ModelError
from jaxserve.models.loading import hf_tokenizer
from tests.models.folders import word_folder, write_json

FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
IM_END: dict[str, Any] = {
    "content": "<|im_end|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False,
    "single_word": False,
}  # fmt: skip
HI = [{"role": "user", "content": "w1"}]
TEXTS = ["w5 <|im_end|> w6", "w5<|im_end|> w6", "<a> <b> <c><a>w1", "w94 <pad> [IMG] <s>w2</s>", " <b>  w3 <q>w4"]


def token(content: str, **flags: bool) -> dict[str, Any]:
    return IM_END | {"content": content} | flags


FOLDERS: dict[str, dict[str, Any]] = {
    "added_tokens_decoder": {"tokenizer_config": FAST | {"added_tokens_decoder": {"95": IM_END}}},
    "decoder in another order, with flags": {
        "tokenizer_config": FAST
        | {
            "added_tokens_decoder": {
                "97": token("<b>", lstrip=True),
                "95": token("<a>", rstrip=True, special=False),
                "96": token("<c>", single_word=True, normalized=True, special=False),
            }
        }
    },
    "decoder without flags": {"tokenizer_config": FAST | {"added_tokens_decoder": {"95": {"content": "<a>"}}}},
    "decoder and names": {
        "tokenizer_config": FAST
        | {"added_tokens_decoder": {"95": IM_END}, "eos_token": "<|im_end|>", "pad_token": "<pad>", "bos_token": None}
    },
    "decoder makes the map old": {
        "tokenizer_config": FAST | {"added_tokens_decoder": {"95": IM_END}, "eos_token": "w1"},
        "special_tokens_map": {"eos_token": "<s>"},
    },
    "added_tokens.json": {"tokenizer_config": FAST, "added_tokens": {"<b>": 96, "<a>": 95}},
    "added_tokens.json and names": {
        "tokenizer_config": FAST | {"eos_token": "<a>", "additional_special_tokens": ["<b>"]},
        "added_tokens": {"<a>": 95, "<b>": 96, "<c>": 97},
    },
    "no tokenizer_config.json": {"added_tokens": {"<a>": 95}, "special_tokens_map": {"eos_token": "<a>"}},
    "special_tokens_map": {
        "tokenizer_config": FAST | {"eos_token": "w1"},
        "special_tokens_map": {
            "eos_token": {
                "content": "</s>",
                "lstrip": True,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
            },
            "pad_token": "<pad>",
            "additional_special_tokens": ["<a>", "<b>"],
        },
    },
    "serialised AddedTokens": {
        "tokenizer_config": FAST
        | {"eos_token": {"__type": "AddedToken"} | token("</s>", rstrip=True), "unk_token": "w0", "mask_token": "<q>"}
    },
    "a name of its own": {"tokenizer_config": FAST | {"image_token": "[IMG]", "add_bos_token": True}},
    "extra_special_tokens by name": {"tokenizer_config": FAST | {"extra_special_tokens": {"image_token": "[IMG]"}}},
    "extra_special_tokens in a list": {
        "tokenizer_config": FAST | {"extra_special_tokens": ["[IMG]", "w3"], "additional_special_tokens": ["<a>"]}
    },
    "nothing": {},
}


def theirs_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_of_all_files_as_in_transformers(tmp_path: Path, name: str) -> None:
    folder = word_folder(tmp_path, 95, **FOLDERS[name])
    ours, theirs = hf_tokenizer.load(folder), theirs_of(folder)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert ours.vocab_size == len(theirs)
    added = {index: token for index, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.special_token_ids == added.keys()
    assert ours._special_tokens == theirs.special_tokens_map
    for ids in ([5, *range(90, ours.vocab_size)], [1, 2, 95]):
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


CONTENTS = st.sampled_from(["<a>", "<b>", "<c>", "w1", "w94", "<|im_end|>"])
TOKENS = st.builds(
    lambda content, **flags: {"content": content, **flags},
    CONTENTS,
    **{flag: st.booleans() for flag in ("special", "normalized", "lstrip", "rstrip", "single_word")},
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.none() | st.dictionaries(st.integers(0, 99).map(str), TOKENS, max_size=4),
    st.dictionaries(CONTENTS, st.integers(95, 99), max_size=3),
    st.dictionaries(st.sampled_from(["bos_token", "eos_token", "pad_token", "own_token"]), CONTENTS, max_size=3),
    st.dictionaries(st.sampled_from(["bos_token", "eos_token", "unk_token"]), CONTENTS, max_size=2),
)
def test_any_tokens_as_in_transformers(
    tmp_path: Path, decoder: dict | None, added: dict, named: dict, special_map: dict
) -> None:
    config = FAST | named | ({} if decoder is None else {"added_tokens_decoder": decoder})
    folder = word_folder(tmp_path, 95, tokenizer_config=config, added_tokens=added, special_tokens_map=special_map)
    ours, theirs = hf_tokenizer.load(folder), theirs_of(folder)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert ours._special_tokens == theirs.special_tokens_map


def test_tokens_that_got_another_id_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = word_folder(tmp_path, 95, tokenizer_config=FAST | {"added_tokens_decoder": {"97": IM_END}})
    ours = hf_tokenizer.load(folder)
    assert ours.encode("<|im_end|>") == theirs_of(folder).encode("<|im_end|>") == [95]
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("jaxserve")]
    assert message.endswith("added tokens have other ids here than in their file: '<|im_end|>' 95, not 97")
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def template(text: str) -> dict[str, str]:
    return {"chat_template": text}


NAMED = [{"name": "default", "template": "named"}, {"name": "tool_use", "template": "tools"}]


@pytest.mark.parametrize(
    ("config", "processor", "jinja", "additional", "expected"),
    [
        (template("config"), None, None, None, "config"),
        (None, template("processor"), None, None, "processor"),
        (template("config"), template("processor"), None, None, "config"),
        (template("config"), template("processor"), "jinja", None, "jinja"),
        ({"chat_template": NAMED}, None, None, None, "named"),
        ({"chat_template": {"default": "named", "rag": "rag"}}, None, None, None, "named"),
        (template("config"), None, None, "default", "additional"),
        (template("config"), None, "jinja", "tool_use", "jinja"),
    ],
)
def test_chat_templates(
    tmp_path: Path, config: Any, processor: Any, jinja: str | None, additional: str | None, expected: str
) -> None:
    files = {"tokenizer_config": FAST | (config or {}), **({"chat_template": processor} if processor else {})}
    folder = word_folder(tmp_path, **files)
    if jinja:
        (folder / "chat_template.jinja").write_text(jinja)
    if additional:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / f"{additional}.jinja").write_text("additional")
    assert hf_tokenizer.load(folder).apply_chat_template(HI) == expected
    if config:  # AutoTokenizer leaves a processor's file to AutoProcessor
        assert theirs_of(folder).apply_chat_template(HI, tokenize=False) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer_config",
            {"eos_token": 5},
            "eos_token must be a token: a string or an object with its content, found 5",
        ),
        ("tokenizer_config", {"eos_token": ["a"]}, "eos_token must be a token"),
        ("tokenizer_config", {"eos_token": {"lstrip": True}}, r"eos_token\.content must be a string that is not empty"),
        ("tokenizer_config", {"eos_token": {"content": "a", "lstrip": 1}}, r"eos_token\.lstrip must be true or false"),
        ("tokenizer_config", {"added_tokens_decoder": ["a"]}, "added_tokens_decoder must be an object, found"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": IM_END}}, "added_tokens_decoder: 'x' must be a token id"),
        ("tokenizer_config", {"added_tokens_decoder": {"9" * 5000: IM_END}}, "added_tokens_decoder: '999.* must be"),
        ("tokenizer_config", {"added_tokens_decoder": {"1": "x"}}, "added_tokens_decoder must be an object of objects"),
        ("tokenizer_config", {"chat_template": 5}, "chat_template must be a string, or a list"),
        ("tokenizer_config", {"chat_template": ["a"]}, "chat_template must be a string, or a list"),
        ("tokenizer_config", {"chat_template": [{"name": "default", "template": 1}]}, "chat_template must be a string"),
        ("tokenizer_config", {"additional_special_tokens": "a"}, "additional_special_tokens must be a list of tokens"),
        ("tokenizer_config", {"extra_special_tokens": [5]}, r"extra_special_tokens\.0 must be a token"),
        ("special_tokens_map", {"bos_token": 1}, "bos_token must be a token"),
        ("added_tokens", {"<a>": "95"}, "<a> must be an integer in "),
        ("added_tokens", {"<a>": -1}, "<a> must be an integer in "),
        ("chat_template", {"chat_template": {"default": 1}}, "chat_template must be a string"),
    ],
)
def test_wrong_types_are_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(ModelError, match=rf"\.json: {message}"):
        hf_tokenizer.load(word_folder(tmp_path, **{name: content}))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("content"), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["eos_token", "bos_token", "own_token", "added_tokens_decoder", "extra_special_tokens", "chat_template",
     "additional_special_tokens", "tokenizer_class", "model_max_length"]
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, ANY, max_size=4), st.dictionaries(KEYS, ANY, max_size=2), ANY)
def test_any_values(tmp_path: Path, config: dict, special_map: dict, added: Any) -> None:
    folder = word_folder(tmp_path, 8)
    write_json(folder, tokenizer_config=config, special_tokens_map=special_map, added_tokens=added)
    with contextlib.suppress(ModelError):
        hf_tokenizer.load(folder).encode("w1")
