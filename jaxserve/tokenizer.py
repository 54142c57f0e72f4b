"""Text to token ids and back, and text that arrives token by token."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from jaxserve.chat_template import ChatTemplate
from jaxserve.errors import RequestError
from jaxserve.token_length import TokenLength, byte_alphabet

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
"""How sentencepiece's vocabularies write a byte."""
_BYTE_LEVEL = {character: byte for byte, character in byte_alphabet().items()}
"""GPT-2's characters for bytes."""


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads.

    ``special_tokens`` maps bos_token, eos_token, unk_token and so on, as far as the model has them, to their text.
    ``tool_template`` is the chat template for conversations with tools, where it is another. ``eos_tokens`` are those
    that its files give besides special_tokens' eos_token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        chat_template: str | None,
        tool_template: str | None = None,
        eos_tokens: Sequence[str] = (),
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self.chat_template: ChatTemplate | None = None
        if chat_template is not None:
            self.set_chat_template(chat_template, tool_template)
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(index for index, token in added.items() if token.special)
        self.vocab_size: int = backend.get_vocab_size()
        bos_token, eos_token = special_tokens.get("bos_token"), special_tokens.get("eos_token")
        self.bos_token_id: int | None = None if bos_token is None else backend.token_to_id(bos_token)
        self.eos_token_id: int | None = None if eos_token is None else backend.token_to_id(eos_token)
        self.eos_tokens = tuple(dict.fromkeys(eos_tokens if eos_token is None else (eos_token, *eos_tokens)))

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """Every byte of the UTF-8 text is a token."""
        # The byte-level alphabet in the order of its characters; which byte has which id does not matter here.
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        return cls(backend, special_tokens={}, chat_template=None)

    def save(self, folder: Path) -> None:
        """Write what hf_tokenizer.py and transformers read."""
        self._backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special_tokens}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self.chat_template is not None:
            self.chat_template.save(folder)

    def set_chat_template(self, source: str, tool_source: str | None = None) -> None:
        """Use other chat templates than those of the tokenizer's files."""
        self.chat_template = ChatTemplate(source, tool_source, self._special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of ``token``, None where the vocabulary has no such token."""
        return self._backend.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The token of ``token_id`` as the vocabulary writes it, None for ids outside of it."""
        return self._backend.id_to_token(token_id)

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
        (ids,) = self.encode_all([text], add_special_tokens)
        if max_tokens is not None and len(ids) > max_tokens:
            raise RequestError(f"prompt of {len(ids)} tokens exceeds {limit_name} {max_tokens}")
        return ids

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """As ``encode``, but together, which takes all cores. Raises RequestError for one that ``check`` refuses."""
        for text in texts:
            self.check(text)
        # The package's encode holds Python's lock all along; its encode_batch gives it back.
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def check(self, text: str) -> None:
        """Raise RequestError for what is not a text of valid Unicode, which may hold half of a surrogate pair."""
        try:
            text.encode()
        except (UnicodeEncodeError, AttributeError) as error:
            raise RequestError(f"text must be a string of valid Unicode, got {text!r:.80}") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; ids outside of the vocabulary have none, bytes that are no character become U+FFFD."""
        # As in encode: other threads run on meanwhile.
        return self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]

    def token_bytes(self, token_id: int) -> bytes:
        """A token's text in the middle of others, in UTF-8: a space and a word, say, or a part of a character.

        Ids outside of the vocabulary have none.
        """
        return self._bytes_of(token_id, self.decode([*self._letter, token_id], skip_special_tokens=False))

    def vocabulary_bytes(self) -> list[bytes]:
        """``token_bytes`` of every id: some tenths of a second, mostly while other threads run on."""
        after = [[*self._letter, token_id] for token_id in range(self.vocab_size)]
        texts = self._backend.decode_batch(after, skip_special_tokens=False)
        return [self._bytes_of(token_id, text) for token_id, text in enumerate(texts)]

    def _bytes_of(self, token_id: int, after_letter: str) -> bytes:
        """``after_letter``: the text of a letter and the token."""
        text = after_letter.removeprefix(self._letter_text)
        piece = self._backend.id_to_token(token_id)
        if "\ufffd" in text and piece is not None:
            if match := _BYTE_TOKEN.fullmatch(piece):
                return bytes.fromhex(match[1])
            if all(character in _BYTE_LEVEL for character in piece):
                return bytes(_BYTE_LEVEL[character] for character in piece)
        return text.encode()

    @cached_property
    def _letter(self) -> list[int]:
        """Something for a token to follow."""
        return self.encode("a", add_special_tokens=False)

    @cached_property
    def _letter_text(self) -> str:
        return self.decode(self._letter, skip_special_tokens=False)

    @cached_property
    def spaces_special_tokens(self) -> bool:
        """Whether there is more than their own text between special tokens."""
        ids = sorted(self.special_token_ids)[:1] * 2
        return self.decode(ids, skip_special_tokens=False) != 2 * self.decode(ids[:1], skip_special_tokens=False)

    def decode_stream(self, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> TextStream:
        """For the text of tokens that arrive one by one and follow the tokens ``after``."""
        return TextStream(self, skip_special_tokens, after)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt for ``messages`` (each with a role and a content), to encode without adding special tokens.

        A content is a text, None, which stands for none, or a list of parts ``{"type": "text", "text": ...}``, whose
        texts become lines of one. An assistant's message, which may be a call of a tool, need not have any.
        Options are transformers': ``add_generation_prompt``, true by default, ends the prompt where the assistant's
        answer begins, ``continue_final_message`` within the last message; ``tools`` are JSON Schemas of functions, as
        OpenAI has them; what else is given the template can read. Raises RequestError for a model without a template,
        malformed messages, and what the template itself rejects.
        """
        if self.chat_template is None:
            raise RequestError("messages cannot be served: the model has no chat template")
        return self.chat_template.render(messages, **options)


class TextStream:
    """The text of tokens that arrive one by one, as the continuation of the text of the tokens ``after``.

    A token's text depends on those before it: sentencepiece drops the space of the first word, and a character may be
    spread over several tokens. So tokens are decoded together with some before them, and what those alone give is left
    out. Half a character is never emitted, and the text of ``after``, ``step``s and ``flush`` together are ``decode``
    of all the tokens. The one exception are sentencepiece's byte tokens: an invalid byte turns all bytes of its run
    into U+FFFD, also those whose characters have been emitted, and these stay.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, after: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context = self._context_of(after)
        self._given = [self._decode(self._context)]
        """The context's text; where that may end in half a character also, shorter, what it is without the half."""
        if self._given[0].endswith("\ufffd"):
            self._given += [self._decode(self._context[:-num_tokens]) for num_tokens in (1, 2, 3)]
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._num_emitted = 0

    def step(self, token_id: int) -> str:
        """The text that ``token_id`` completes, possibly none."""
        self._ids.append(token_id)
        try:
            text = self._stream.step(self._tokenizer._backend, token_id) or ""
            if not self._num_emitted and text and len(self._given) > 1:
                # A stream whose context ends in half a character gives all of it once more.
                text = self._continuation(text)
        except Exception:  # the package's only word for text that changed under it (see above)
            text = self.flush()
            self._stream = DecodeStream(ids=self._context + self._ids, skip_special_tokens=self._skip_special_tokens)
        self._num_emitted += len(text)
        return text

    def flush(self) -> str:
        """What is still held back, for the end of the output: characters that never became whole, as U+FFFD."""
        return self._continuation(self._decode(self._context + self._ids))[self._num_emitted :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens)

    def _continuation(self, text: str) -> str:
        """What follows the context in ``text``."""
        given = next((given for given in self._given if text.startswith(given)), self._given[0])
        return text[len(given) :]

    def _context_of(self, after: Sequence[int]) -> list[int]:
        """The last few of these tokens: as many as have any text, from the beginning of a character on.

        One of four neighbours begins a character, unless bytes are invalid; special tokens may have no text.
        """
        for num_tokens in (8, 9, 10, 11, 64, 512):
            context = list(after[-num_tokens:])
            text = self._decode(context)
            if num_tokens >= len(after) or (text and text[0] != "\ufffd"):
                break
        return context
