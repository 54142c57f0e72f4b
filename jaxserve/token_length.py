"""How much text one token can stand for, so that a text too long for a model is known before it is tokenized."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

MAX_COMPOSED_CHARACTERS = 4
"""Most characters that a Unicode normal form makes one of (UAX #15, maximum expansion of NFD)."""
COMPOSING_NORMALIZERS = ("NFC", "NFKC")
KEEPING_NORMALIZERS = ("NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel")
KEEPING_PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")
INERT_BYTES = {*range(0x20), 0x7F, 0xC0, 0xC1, *range(0xF1, 0x100)}
"""Of characters that no normal form touches: controls, and planes without letters; and bytes that UTF-8 never has."""


class TokenLength:
    """A bound on the characters of a token, where the tokenizer's parts prove one: nothing may drop characters
    unseen, and unknown ones must not join into one token.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._greedy_tokens: list[str] = []
        """These take the spaces around them along, however many."""
        self._dropped: list[bytes] = []
        """Bytes without a token: nothing stands for them."""
        self.max_characters: int | None = self._max_characters(backend)
        """None where there is no bound."""

    def least_tokens(self, text: str) -> int:
        """A number of tokens that ``text`` has at least; 0 where nothing is known."""
        if self.max_characters is None or any(token in text for token in self._greedy_tokens):
            return 0
        encoded = text.encode(errors="replace") if self._dropped else b""
        num_characters = len(text) - sum(map(encoded.count, self._dropped))
        return -(-num_characters // self.max_characters)

    def _max_characters(self, backend: tokenizers.Tokenizer) -> int | None:
        normalizers = _parts(backend.normalizer, "normalizers")
        pre_tokenizers = _parts(backend.pre_tokenizer, "pretokenizers")
        if not (all(map(_normalizer_keeps, normalizers)) and all(map(_pre_tokenizer_keeps, pre_tokenizers))):
            return None
        vocabulary = backend.get_vocab()
        by_bytes = any(part["type"] == "ByteLevel" for part in (*normalizers, *pre_tokenizers))
        if not isinstance(backend.model, tokenizers.models.BPE):
            return None
        if not (self._knows_bytes(vocabulary) if by_bytes else _knows_characters(backend.model, vocabulary)):
            return None
        longest = max(map(len, vocabulary))
        for token in backend.get_added_tokens_decoder().values():
            if token.lstrip or token.rstrip:
                if token.normalized:
                    return None
                self._greedy_tokens.append(token.content)
            if token.normalized and backend.normalizer is not None:
                longest = max(longest, len(backend.normalizer.normalize_str(token.content)))
        composing = any(part["type"] in COMPOSING_NORMALIZERS for part in normalizers)
        return longest * MAX_COMPOSED_CHARACTERS if composing else longest

    def _knows_bytes(self, vocabulary: Mapping[str, int]) -> bool:
        """Whether all bytes have a token, but for those that can be counted in the text."""
        for byte, character in byte_alphabet().items():
            if character not in vocabulary:
                if byte not in INERT_BYTES:
                    return False
                self._dropped.append(bytes([byte]))
        return True


def byte_alphabet() -> dict[int, str]:
    """GPT-2's character for each byte: its own where that is visible, or else the next above 255."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0x100)} - {0xAD}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def _parts(component: Any, key: str) -> list[dict[str, Any]]:
    """The members of a sequence, or the one component, as tokenizer.json has them."""
    return [] if component is None else _flattened(json.loads(component.__getstate__()), key)


def _flattened(described: dict[str, Any], key: str) -> list[dict[str, Any]]:
    if described["type"] != "Sequence":
        return [described]
    return [part for member in described[key] for part in _flattened(member, key)]


def _normalizer_keeps(part: dict[str, Any]) -> bool:
    """Whether it leaves at least as many characters as there were, but for what it composes."""
    if part["type"] == "Replace":
        pattern = part["pattern"].get("String")
        return pattern is not None and len(part["content"]) >= len(pattern)
    return part["type"] in (*COMPOSING_NORMALIZERS, *KEEPING_NORMALIZERS)


def _pre_tokenizer_keeps(part: dict[str, Any]) -> bool:
    if part["type"] in ("Split", "Punctuation"):
        return bool(part["behavior"] != "Removed")
    return part["type"] in KEEPING_PRE_TOKENIZERS


def _knows_characters(model: tokenizers.models.BPE, vocabulary: Mapping[str, int]) -> bool:
    """Whether every character becomes at least one token, or a part of one in the vocabulary."""
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return True
    return model.unk_token is not None and not model.fuse_unk
