"""Text to token ids and back, chat templates, and text that arrives token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers
from tokenizers.decoders import DecodeStream

from jaxserve.models.config import ModelError
from jaxserve.models.loading import gguf_tokenizer
from jaxserve.models.loading.hf import read_json
from jaxserve.request import RequestError
from jaxserve.token_length import TokenLength

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads.

    ``special_tokens`` maps bos_token, eos_token, unk_token and pad_token, as far as the model has them, to their text.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, special_tokens: Mapping[str, str], chat_template: str | None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._chat_template = chat_template
        self._compiled: jinja2.Template | None = None
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(index for index, token in added.items() if token.special)
        self.vocab_size: int = backend.get_vocab_size()
        self.eos_token_id: int | None = backend.token_to_id(special_tokens.get("eos_token", ""))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja. Raises ModelError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            found = ", ".join(sorted(other.name for other in folder.glob("*token*"))) or "none"
            raise ModelError(f"{folder}: holds no tokenizer.json, the supported kind of tokenizer; found: {found}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ModelError(f"{path}: cannot be read: {error}") from error
        config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
        special = {name: _token_text(config[name]) for name in _SPECIAL_NAMES if config.get(name)}
        template = folder / "chat_template.jinja"
        text = template.read_text(encoding="utf-8") if template.is_file() else _template_text(config)
        return cls(backend, special_tokens=special, chat_template=text)

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """Every byte of the UTF-8 text is a token."""
        # The byte-level alphabet in the order of its characters; which byte has which id does not matter here.
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        return cls(backend, special_tokens={}, chat_template=None)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From a GGUF file's metadata. Raises ModelError for kinds that are not supported."""
        backend = gguf_tokenizer.build(metadata)
        special = gguf_tokenizer.special_tokens(metadata)
        return cls(backend, special_tokens=special, chat_template=metadata.get("tokenizer.chat_template"))

    def save(self, folder: Path) -> None:
        """Write what ``from_folder`` and transformers read."""
        self._backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special_tokens}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self._chat_template is not None:
            (folder / "chat_template.jinja").write_text(self._chat_template, encoding="utf-8", newline="")

    @cached_property
    def token_length(self) -> TokenLength:
        """Reads the whole vocabulary: some tenths of a second, once."""
        return TokenLength(self._backend)

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        limit_name: str = "max_model_len",
    ) -> list[int]:
        """Token ids of ``text``. Special tokens written in it are recognised; ``add_special_tokens`` puts the model's
        own around it (BOS). Other threads run on meanwhile.

        Raises RequestError for text that is not valid Unicode, and for more than ``max_tokens``, which the error calls
        ``limit_name``; where the length of the text tells, nothing is tokenized.
        """
        if max_tokens is not None and (least := self.token_length.least_tokens(text)) > max_tokens:
            raise RequestError(
                f"prompt of {len(text)} characters, at least {least} tokens, exceeds {limit_name} {max_tokens}"
            )
        try:
            # The package's encode holds Python's lock all along; its encode_batch gives it back.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:  # the package's word for lone surrogates
            raise RequestError(f"text must be a string of valid Unicode, got {text!r:.80}") from error
        if max_tokens is not None and len(encoding) > max_tokens:
            raise RequestError(f"prompt of {len(encoding)} tokens exceeds {limit_name} {max_tokens}")
        return encoding.ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; ids outside of the vocabulary have none, bytes that are no character become U+FFFD."""
        # As in encode: other threads run on meanwhile.
        return self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]

    def decode_stream(self, skip_special_tokens: bool = True) -> TextStream:
        return TextStream(self, skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt for ``messages`` (each with a role and a content), to encode without adding special tokens.

        ``add_generation_prompt`` ends it where the assistant's answer begins. Raises RequestError for a model without
        a template, malformed messages, and what the template itself rejects.
        """
        if self._chat_template is None:
            raise RequestError("messages cannot be served: the model has no chat template")
        _check_messages(messages)
        try:
            self._compiled = self._compiled or _environment().from_string(self._chat_template)
            return self._compiled.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program: any exception of its own is an answer to these messages
            raise RequestError(f"messages rejected by the model's chat template: {error}") from error


class TextStream:
    """The text of tokens that arrive one by one.

    Half a character is never emitted, and ``step``s and ``flush`` together give ``decode`` of all the tokens. The one
    exception are sentencepiece's byte tokens: an invalid byte turns all bytes of its run into U+FFFD, also those whose
    characters have been emitted, and these stay.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._num_emitted = 0

    def step(self, token_id: int) -> str:
        """The text that ``token_id`` completes, possibly none."""
        self._ids.append(token_id)
        try:
            text = self._stream.step(self._tokenizer._backend, token_id) or ""
        except Exception:  # the package's only word for text that changed under it (see above)
            text = self.flush()
            self._stream = DecodeStream(ids=self._ids, skip_special_tokens=self._skip_special_tokens)
        self._num_emitted += len(text)
        return text

    def flush(self) -> str:
        """What is still held back, for the end of the output: characters that never became whole, as U+FFFD."""
        return self._tokenizer.decode(self._ids, self._skip_special_tokens)[self._num_emitted :]


def _token_text(token: str | Mapping[str, Any]) -> str:
    """Configuration files write a token as its text or as a serialised AddedToken."""
    return token if isinstance(token, str) else token["content"]


def _template_text(config: Mapping[str, Any]) -> str | None:
    """tokenizer_config.json's chat_template: a text, or a list of named ones of which "default" is used."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(f"messages must be a list of at least one message, got {messages!r}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{index}] must be an object, got {message!r}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RequestError(f"messages[{index}].{key} must be a string, got {message.get(key)!r}")


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here its body stands for itself."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """The environment that Hugging Face's chat templates are written for (transformers' chat_template_utils)."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment
