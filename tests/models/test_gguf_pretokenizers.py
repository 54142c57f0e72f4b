"""How GGUF files' texts are split, beside the models' own tokenizer.json files."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from jaxserve.models.loading import gguf_tokenizer
from jaxserve.models.loading.gguf_file import read_gguf
from jaxserve.models.loading.gguf_pretokenizers import PRE_TOKENIZERS, pre_tokenizer
from jaxserve.models.loading.hub import resolve

METADATA = read_gguf(resolve("smollm2-135m")).metadata
# What the pre_tokenizer of the published tokenizer.json consists of.
PUBLISHED = {
    "llama-bpe": [  # Llama 3.1
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
    "tekken": [  # Mistral NeMo
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
PIECES = st.sampled_from(
    ["a", "Z", "é", "\u0301", "1", "٣", " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", ".", "?!", "/", "_", "日本", "カ",
     "한", "…", "👩\u200d👩", "\u3000", "ǅ", "²", "€", "hello", "WORLD", "12345"]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.characters(exclude_categories=["Cs"]), max_size=20).map("".join)


def published(pre: str) -> pre_tokenizers.PreTokenizer:
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in PUBLISHED[pre]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    raw = json.loads(tokenizers.Tokenizer(models.BPE()).to_str())
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, byte_level]}
    return tokenizers.Tokenizer.from_str(json.dumps(raw)).pre_tokenizer


OURS, THEIRS = {pre: pre_tokenizer(pre) for pre in PRE_TOKENIZERS}, {pre: published(pre) for pre in PUBLISHED}


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_splits_as_the_models_own_tokenizer(text: str) -> None:
    for pre, theirs in THEIRS.items():
        assert OURS[pre].pre_tokenize_str(text) == theirs.pre_tokenize_str(text), pre


@settings(max_examples=50, deadline=None)
@given(TEXTS)
def test_nothing_of_a_text_is_lost(text: str) -> None:
    for pre in PRE_TOKENIZERS:
        assert "".join(pieces(pre, text)) == text, pre


def pieces(pre: str, text: str) -> list[str]:
    return [text[first:end] for _, (first, end) in OURS[pre].pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("llama3", ["Hi", " '", "s", " ", "123", "4", "\n\n", "日本", " x", "…"]),
        ("deepseek-v3", ["Hi", " '", "s", " ", "123", "4", "\n\n", "日本", " x", "…"]),
        ("deepseek-llm", ["Hi", " '", "s", " ", "1234", "\n", "\n", "日本", " x", "…"]),
        ("deepseek-coder", ["Hi", " '", "s", " ", "1", "2", "3", "4", "\n", "\n", "日本", " x", "…"]),
        ("deepseek-r1-qwen", ["Hi", " '", "s", " ", "1", "2", "3", "4", "\n\n", "日本", " x", "…"]),
        ("falcon", ["Hi", " ", "'", "s", " ", "123", "4", "\n", "\n", "日本", " x", "…"]),
    ],
)
def test_names(pre: str, expected: list[str]) -> None:
    assert pieces(pre, "Hi 's 1234\n\n日本 x…") == expected


@pytest.mark.parametrize("pre", ["llama3", "llama-v3", "llama-bpe", "tekken"])
def test_names_that_begin_texts_with_bos(pre: str) -> None:
    without = {key: value for key, value in METADATA.items() if key != "tokenizer.ggml.add_bos_token"}
    assert gguf_tokenizer.load(without | {"tokenizer.ggml.pre": pre}).encode("a")[0] == 1
    assert gguf_tokenizer.load(without | {"tokenizer.ggml.pre": "deepseek-v3"}).encode("a")[0] != 1
