"""The tokenizer that a GGUF file's metadata describes, as llama.cpp reads it (src/llama-vocab.cpp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from jaxserve.errors import ModelError
from jaxserve.models.fields import Fields
from jaxserve.models.loading.eos import KNOWN_ENDS, Declared
from jaxserve.models.loading.gguf_pretokenizers import PRE_TOKENIZERS, WHOLE_WORDS, pre_tokenizer
from jaxserve.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_NEEDED = {"gpt2": "merges", "llama": "scores"}
_SPACE = "▁"


class _TokenType(IntEnum):
    """Values of tokenizer.ggml.token_type that matter here."""

    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


def load(metadata: Mapping[str, Any], where: object = "GGUF file") -> Tokenizer:
    """The tokenizer of a GGUF file's metadata. Raises ModelError, with ``where`` in it, for what is not supported."""
    fields = Fields(metadata, where)
    return Tokenizer(
        build(metadata, where),
        special_tokens=special_tokens(metadata, where),
        chat_template=fields.text("tokenizer.chat_template"),
        tool_template=fields.text("tokenizer.chat_template.tool_use"),
    )


def special_tokens(metadata: Mapping[str, Any], where: object = "GGUF file") -> dict[str, str]:
    """Hugging Face's name -> token, for those of bos, eos, unk and pad that the metadata has. Raises ModelError."""
    fields = Fields(metadata, where)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: _token_id(fields, key) for name, key in names.items()}
    tokens = fields.texts(f"{_PREFIX}tokens") or []
    return {name: tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(tokens) and tokens[i]}


def declared_eos(metadata: Mapping[str, Any], where: object) -> Declared:
    """Chat models may end a turn or a message with another token than a document. Raises ModelError."""
    ids = (_token_id(Fields(metadata, where), kind) for kind in ("eos", "eot", "eom"))
    return tuple(i for i in ids if i is not None)


def _token_id(fields: Fields, kind: str) -> int | None:
    return fields.optional_integer(f"{_PREFIX}{kind}_token_id", low=-1, high=2**32 - 1)  # -1: none


def build(metadata: Mapping[str, Any], where: object = "GGUF file") -> tokenizers.Tokenizer:
    """The tokenizer of ``metadata`` (keys tokenizer.ggml.*). Raises ModelError for kinds it does not know and values
    that do not go together; ``where`` names the file in it."""
    fields = Fields(metadata, where)
    kind, pre = fields.text(f"{_PREFIX}model"), fields.text(f"{_PREFIX}pre", "default")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{where}: tokenizer.ggml.model {kind!r} is not supported; supported: gpt2, llama")
    if kind == "gpt2" and pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ModelError(f"{where}: tokenizer.ggml.pre {pre!r} is not supported; supported: {known}")
    missing = [key for key in ("tokens", "token_type", _NEEDED[kind]) if not fields.has(f"{_PREFIX}{key}")]
    if missing:
        raise ModelError(f"{where}: missing metadata: {', '.join(f'{_PREFIX}{key}' for key in missing)}")

    vocabulary = _vocabulary(fields)
    types = fields.integers(f"{_PREFIX}token_type") or []
    if len(types) != len(vocabulary):
        raise ModelError(f"{where}: tokenizer.ggml.token_type must hold {len(vocabulary)} types, found {len(types)}")
    try:
        tokenizer = (
            _byte_level(fields, vocabulary, pre) if kind == "gpt2" else _sentencepiece(fields, vocabulary, types)
        )
        _add_tokens(tokenizer, vocabulary, types)
        # llama.cpp's defaults where older files have no flag.
        add_bos = fields.flag(f"{_PREFIX}add_bos_token", kind == "llama" or pre in WHOLE_WORDS)
        _add_template(tokenizer, special_tokens(metadata, where), add_bos, fields.flag(f"{_PREFIX}add_eos_token"))
    except ModelError:
        raise
    except Exception as error:  # the package raises bare Exception
        raise ModelError(
            f"{where}: tokenizer.ggml.tokens and {_PREFIX}{_NEEDED[kind]} do not make a tokenizer: {error}"
        ) from error
    return tokenizer


def _vocabulary(fields: Fields) -> dict[str, int]:
    vocabulary: dict[str, int] = {}
    for index, text in enumerate(fields.texts(f"{_PREFIX}tokens") or []):
        token = text or f"[EMPTY_{index}]"  # llama.cpp's name for it
        if token in vocabulary:
            raise ModelError(
                f"{fields.where}: tokenizer.ggml.tokens {vocabulary[token]} and {index} are both {token!r}"
            )
        vocabulary[token] = index
    return vocabulary


def _byte_level(fields: Fields, vocabulary: dict[str, int], pre: str | None) -> tokenizers.Tokenizer:
    assert pre is not None
    merges = []
    for merge in fields.texts(f"{_PREFIX}merges") or []:
        cut = merge.find(" ", 1)
        if cut < 0:
            raise ModelError(f"{fields.where}: tokenizer.ggml.merges must hold pairs of tokens, found {merge!r}")
        merges.append((merge[:cut], merge[cut + 1 :]))
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in WHOLE_WORDS)
    tokenizer = tokenizers.Tokenizer(model)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Fields, vocabulary: dict[str, int], types: Sequence[int]) -> tokenizers.Tokenizer:
    scores = fields.values[f"{_PREFIX}scores"]
    if not isinstance(scores, list) or not all(isinstance(score, int | float) for score in scores):
        raise fields.error(f"{_PREFIX}scores", "a list of numbers")
    if len(scores) != len(vocabulary):
        raise ModelError(
            f"{fields.where}: tokenizer.ggml.scores must hold {len(vocabulary)} scores, found {len(scores)}"
        )
    unknown = next((token for token, index in vocabulary.items() if types[index] == _TokenType.UNKNOWN), None)
    merges = _merges(vocabulary, scores)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = fields.flag(f"{_PREFIX}add_space_prefix", True)
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


def _add_tokens(tokenizer: tokenizers.Tokenizer, vocabulary: Mapping[str, int], types: Sequence[int]) -> None:
    """Control tokens become special, user-defined ones plain added tokens; both are found in text before merging.

    What ends a turn is special whatever its type, as llama.cpp has it.
    """
    special, plain = [], []
    for token, kind in zip(vocabulary, types, strict=True):
        if kind in (_TokenType.CONTROL, _TokenType.UNKNOWN) or token in KNOWN_ENDS:
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _TokenType.USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_template(tokenizer: tokenizers.Tokenizer, names: Mapping[str, str], add_bos: bool, add_eos: bool) -> None:
    before = [names["bos_token"]] if add_bos and "bos_token" in names else []
    after = [names["eos_token"]] if add_eos and "eos_token" in names else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
        )
