"""The tokenizer that the files of a Hugging Face folder describe together.

What adds to what is transformers' knowledge (PreTrainedTokenizerBase._from_pretrained and TokenizersBackend).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from jaxserve.chat_template import TEMPLATE_FOLDER
from jaxserve.errors import ModelError
from jaxserve.models.fields import Fields
from jaxserve.models.loading.eos import is_token_id
from jaxserve.models.loading.files import read_json, read_text, unreadable
from jaxserve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_DEFAULT = "default"


def load(folder: Path) -> Tokenizer:
    """From tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat templates.

    Raises ModelError, naming the file and the key.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        found = ", ".join(sorted(other.name for other in folder.glob("*token*"))) or "none"
        raise ModelError(f"{folder}: holds no tokenizer.json, the supported kind of tokenizer; found: {found}")
    try:
        backend = tokenizers.Tokenizer.from_str(read_text(path))
    except ModelError:
        raise
    except Exception as error:  # the package raises bare Exception
        raise unreadable(path, error) from error

    config, legacy = (_fields(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    # Both files name special tokens; where the first lists all added tokens, it is the younger one.
    both = config
    if legacy.values and not config.has("added_tokens_decoder"):
        both = Fields(config.values | legacy.values, f"{config.where} and special_tokens_map.json")
    named = dict(_named_tokens(both))
    listed = _listed_tokens(folder, config, named)
    backend.add_tokens([listed[index] for index in sorted(listed)])
    _add_missing(backend, [*named.values(), *_extra_tokens(both)])
    _report_moved(path, backend, listed)
    eos_tokens = [_token(fields, "eos_token").content for fields in (config, legacy) if fields.values.get("eos_token")]
    special = {name: token.content for name, token in named.items()}
    return Tokenizer(
        backend,
        special_tokens=special,
        chat_template=_chat_template(folder, config, _DEFAULT),
        tool_template=_chat_template(folder, config, "tool_use"),
        eos_tokens=eos_tokens,
    )


def _fields(path: Path) -> Fields:
    return Fields(read_json(path), path)


def _token(fields: Fields, key: str, **flags: bool) -> AddedToken:
    """Files write a token as its text or as a serialised AddedToken; ``flags`` are those that it does not say."""
    value = fields.values[key]
    if isinstance(value, str):
        return AddedToken(value, **{"special": True} | flags)
    if not isinstance(value, dict):
        raise fields.error(key, "a token: a string or an object with its content")
    token = fields.fields(key)
    content = token.text("content")
    if not content:
        raise token.error("content", "a string that is not empty")
    return AddedToken(content, **flags | {flag: token.flag(flag) for flag in _FLAGS if token.has(flag)})


def _named_tokens(fields: Fields) -> Iterator[tuple[str, AddedToken]]:
    """eos_token and the like, and names that the model alone has (image_token)."""
    for key in _NAMES:
        if fields.values.get(key):
            yield key, _token(fields, key, special=True)
    for key, value in fields.values.items():
        if key.endswith("_token") and key not in _NAMES and value and isinstance(value, str):
            yield key, _token(fields, key)
    extra = fields.values.get("extra_special_tokens")
    if isinstance(extra, dict):
        inner = fields.fields("extra_special_tokens")
        yield from ((key, _token(inner, key, special=True)) for key in inner.values)


def _extra_tokens(fields: Fields) -> list[AddedToken]:
    key = "extra_special_tokens" if fields.values.get("extra_special_tokens") else "additional_special_tokens"
    found = fields.values.get(key)
    if found is None or isinstance(found, dict):
        return []
    if not isinstance(found, list):
        raise fields.error(key, "a list of tokens")
    inner = Fields({str(index): token for index, token in enumerate(found)}, fields.where, f"{fields.prefix}{key}.")
    return [_token(inner, index, special=True) for index in inner.values]


def _listed_tokens(folder: Path, config: Fields, named: Mapping[str, AddedToken]) -> dict[int, AddedToken]:
    """Id -> token, of tokenizer_config.json's added_tokens_decoder or else, from older versions, added_tokens.json."""
    if config.has("added_tokens_decoder"):
        decoder = config.fields("added_tokens_decoder")
        wrong = next((key for key in decoder.values if not is_token_id(key)), None)
        if wrong is not None:
            raise ModelError(f"{config.where}: added_tokens_decoder: {wrong!r:.80} must be a token id")
        if any(not isinstance(token, dict) for token in decoder.values.values()):
            raise config.error("added_tokens_decoder", "an object of objects")
        return {int(key): _token(decoder, key) for key in decoder.values}
    older = _fields(folder / "added_tokens.json")
    special = {token.content for token in named.values()} | {token.content for token in _extra_tokens(config)}
    return {
        older.integer(text, low=0): AddedToken(text, special=text in special, normalized=text not in special)
        for text in older.values
    }


def _add_missing(backend: tokenizers.Tokenizer, tokens: list[AddedToken]) -> None:
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = {token.content: token for token in tokens if token.content not in known}
    backend.add_tokens(list(missing.values()))


def _report_moved(path: Path, backend: tokenizers.Tokenizer, listed: Mapping[int, AddedToken]) -> None:
    """Warn of tokens that have, in transformers as here, another id than their file says."""
    moved = [
        f"{token.content!r} {index}, not {listed_index}"
        for listed_index, token in sorted(listed.items())
        if (index := backend.token_to_id(token.content)) != listed_index
    ]
    if moved:
        logger.warning("%s: added tokens have other ids here than in their file: %s", path, ", ".join(moved)[:500])


def _chat_template(folder: Path, config: Fields, name: str) -> str | None:
    """The one of this name, in a file of its own, in tokenizer_config.json, or in a processor's chat_template.json."""
    files = [folder / TEMPLATE_FOLDER / f"{name}.jinja"]
    if name == _DEFAULT:
        files.append(folder / "chat_template.jinja")
    for path in files:
        if path.is_file():
            return read_text(path)
    found = (_named_template(fields, name) for fields in (config, _fields(folder / "chat_template.json")))
    return next((template for template in found if template is not None), None)


def _named_template(fields: Fields, name: str) -> str | None:
    """Of a text, which is the default one, or of several by name."""
    value: Any = fields.values.get("chat_template")
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, dict):
        value = {_DEFAULT: value}
    template = value.get(name)
    if template is not None and not isinstance(template, str):
        raise fields.error("chat_template", "a string, or a list of objects with name and template")
    return template
