"""The bound on a token's characters: no text has fewer tokens than it says."""

from __future__ import annotations

import functools
import unicodedata

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.token_length import MAX_COMPOSED_CHARACTERS, TokenLength, byte_alphabet

GREEDY = AddedToken("<e>", rstrip=True, normalized=False)
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def byte_level(**changes) -> tokenizers.Tokenizer:
    """With a few merges, no token for the byte 1, and what ``changes`` set."""
    alphabet = byte_alphabet()
    vocabulary = {character: byte for byte, character in alphabet.items() if byte != 1} | {"ab": 300, "abab": 301}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "ab")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend


def sentencepiece(normalizer=None, **model) -> tokenizers.Tokenizer:
    """As Llama 2's: characters, some of them known."""
    vocabulary = {"<unk>": 400, "▁": 401, "a": 402, "b": 403, "▁a": 404, **model.pop("vocab", BYTES)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", **model))
    backend.normalizer = normalizer or normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def with_tokens(backend: tokenizers.Tokenizer, *tokens: AddedToken) -> tokenizers.Tokenizer:
    backend.add_tokens(list(tokens))
    return backend


BOUNDED = {
    "SmolLM2": open_checkpoint("smollm2-135m").tokenizer()._backend,
    "bytes": byte_level(),
    "NFC": byte_level(normalizer=normalizers.NFC()),
    "NFKC, lowercase": byte_level(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "byte fallback": sentencepiece(byte_fallback=True, fuse_unk=True),
    "unknown, one by one": sentencepiece(vocab={}, fuse_unk=False),
    "added": with_tokens(
        byte_level(), AddedToken("a long added token"), AddedToken("<e>", rstrip=True, normalized=False)
    ),
}
UNBOUNDED = {
    "words": tokenizers.Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
    "spaces dropped": byte_level(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    ),
    "stripped": byte_level(normalizer=normalizers.Strip()),
    "unknown, joined": sentencepiece(vocab={}, fuse_unk=True),
    "characters dropped": sentencepiece(normalizers.Replace(tokenizers.Regex("a+"), "b"), byte_fallback=True),
    "a letter's byte missing": byte_level(model=models.BPE({"a": 0}, [])),
    "greedy in normal form": with_tokens(byte_level(), AddedToken("<e>", rstrip=True, normalized=True)),
}

pieces = st.sampled_from(
    ["ab", "abab" * 30, "a long added token", "<e>   ", "\x01", "\x04", " ", "\n\t", "#" * 80, "e\u0301", "\u1f82",
     "\u03b1\u0313\u0300\u0345", "\ufdfa", "\U0001f600", "日本", "\U00050000", "1234567"]
)  # fmt: skip


@functools.cache
def bound_of(name: str) -> TokenLength:
    return TokenLength(BOUNDED[name])


@pytest.mark.parametrize("name", BOUNDED)
@given(parts=st.lists(pieces | st.text(max_size=20), max_size=12))
@settings(max_examples=60, deadline=None)
def test_no_text_has_fewer_tokens(name, parts):
    text = "".join(parts)
    assert bound_of(name).max_characters
    assert bound_of(name).least_tokens(text) <= len(BOUNDED[name].encode_batch_fast([text])[0])


@pytest.mark.parametrize("backend", UNBOUNDED.values(), ids=UNBOUNDED)
def test_no_bound_where_characters_may_vanish(backend):
    assert TokenLength(backend).max_characters is None
    assert TokenLength(backend).least_tokens("a" * 1000) == 0


def test_the_bound_is_the_longest_token():
    longest = max(BOUNDED["SmolLM2"].get_vocab(), key=len)
    assert bound_of("SmolLM2").max_characters == len(longest) == 81
    assert bound_of("SmolLM2").least_tokens("x" * 82) == 2


def test_no_normal_form_composes_more():
    assert max(len(unicodedata.normalize("NFD", chr(code))) for code in range(0x110000)) == MAX_COMPOSED_CHARACTERS
    assert set(byte_alphabet().values()) == set(pre_tokenizers.ByteLevel.alphabet())
    ids = [pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(chr(byte)) for byte in range(128)]
    assert [pieces[0][0] for pieces in ids] == [byte_alphabet()[byte] for byte in range(128)]
