"""The tokenizer that a GGUF file's metadata describes.

Which vocabulary goes with which splitting of the text is llama.cpp's knowledge (src/llama-vocab.cpp); the patterns are
those of the models' own tokenizer.json files.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.models.config import ModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (rf"{_CONTRACTION}|\p{{N}}{{1,3}}|{_REST}",),
    "qwen2": (rf"{_CONTRACTION}|\p{{N}}|{_REST}",),
}
"""Value of tokenizer.ggml.pre -> patterns that split the text, one after the other."""

_SPACE = "▁"


class _TokenType(IntEnum):
    """Values of tokenizer.ggml.token_type that matter here."""

    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Hugging Face's name -> token, for those of bos, eos, unk and pad that the metadata has."""
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    tokens = metadata["tokenizer.ggml.tokens"]
    return {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}


def build(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of ``metadata`` (keys tokenizer.ggml.*). Raises ModelError for kinds it does not know."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"tokenizer.ggml.model {kind!r} is not supported; supported: gpt2, llama")
    if kind == "gpt2" and pre not in PRE_TOKENIZERS:
        raise ModelError(f"tokenizer.ggml.pre {pre!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}")
    missing = [key for key in ("tokens", "token_type", _NEEDED[kind]) if f"tokenizer.ggml.{key}" not in metadata]
    if missing:
        raise ModelError(f"missing metadata: {', '.join(f'tokenizer.ggml.{key}' for key in missing)}")

    tokenizer = _byte_level(metadata, pre) if kind == "gpt2" else _sentencepiece(metadata)
    _add_tokens(tokenizer, metadata)
    # llama.cpp's defaults where older files have no flag.
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe")
    _add_template(tokenizer, metadata, add_bos, metadata.get("tokenizer.ggml.add_eos_token", False))
    return tokenizer


_NEEDED = {"gpt2": "merges", "llama": "scores"}


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _byte_level(metadata: Mapping[str, Any], pre: str) -> tokenizers.Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    # Llama 3 takes a whole word that is in the vocabulary without merging it.
    model = models.BPE(vocab=_vocabulary(metadata), merges=merges, ignore_merges=pre == "llama-bpe")
    tokenizer = tokenizers.Tokenizer(model)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    vocabulary = _vocabulary(metadata)
    types = metadata["tokenizer.ggml.token_type"]
    unknown = next((token for token, index in vocabulary.items() if types[index] == _TokenType.UNKNOWN), None)
    merges = _merges(vocabulary, metadata["tokenizer.ggml.scores"])
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalize: list[Any] = [normalizers.Replace(" ", _SPACE)]
    decode: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        normalize.insert(0, normalizers.Prepend(_SPACE))
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(normalize)
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Sentencepiece has scores instead of merges: any two pieces may join, those with the highest score first."""
    merges = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[index], index, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_tokens(tokenizer: tokenizers.Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Control tokens become special, user-defined ones plain added tokens; both are found in text before merging."""
    special, plain = [], []
    for token, kind in zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True):
        if kind in (_TokenType.CONTROL, _TokenType.UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _TokenType.USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_template(tokenizer: tokenizers.Tokenizer, metadata: Mapping[str, Any], add_bos: bool, add_eos: bool) -> None:
    names = special_tokens(metadata)
    before = [names["bos_token"]] if add_bos and "bos_token" in names else []
    after = [names["eos_token"]] if add_eos and "eos_token" in names else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
        )
