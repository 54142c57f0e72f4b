"""Which tokens end an output: the union of what all files of a model say, as vLLM and llama.cpp end."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jaxserve.models.fields import Fields

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Declared = tuple[int | str, ...]
"""Token ids, and tokens by their text."""

KNOWN_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<turn|>",
    "<end_of_utterance>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>",  # noqa: RUF001
)  # fmt: skip
"""Tokens that end a turn or a document in any vocabulary that has them, from the list in llama.cpp's llama-vocab.cpp.

Its ``</s>`` is left out, which in Gemma's vocabulary is a tag of HTML, and so are the marks of tool calls.
"""

HARMONY_ENDS = ("<|return|>", "<|call|>")
"""What ends a turn in gpt-oss's format, whose ``<|end|>`` ends one of a turn's several messages; in llama.cpp too."""


def declared(fields: Fields) -> Declared:
    """``eos_token_id`` of a generation_config.json or config.json: an id, a list of ids, or missing.

    Ids may be written as strings, and so may tokens. Raises ModelError.
    """
    value = fields.values.get("eos_token_id")
    found = [one for one in (value if isinstance(value, list) else [value]) if one is not None]
    if any(not isinstance(one, int | str) or isinstance(one, bool) for one in found):
        raise fields.error("eos_token_id", "a token id or a list of them")
    return tuple(int(one) if isinstance(one, str) and is_token_id(one) else one for one in found)


def is_token_id(text: str) -> bool:
    """Whether ``text`` is a number that may be one."""
    return re.fullmatch(r"[0-9]{1,10}", text) is not None


def union(where: object, found: Declared, tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """The ids of ``found``, of the tokenizer's own eos_token and of KNOWN_ENDS, each once; one log line names them.

    What is no token of the model cannot end anything: a warning names it.
    """
    known = [token for token in KNOWN_ENDS if tokenizer.token_id(token) is not None]
    if all(tokenizer.token_id(token) is not None for token in HARMONY_ENDS):
        known = [*HARMONY_ENDS, *(token for token in known if token != "<|end|>")]
    ids, wrong = {}, []
    for one in dict.fromkeys((*found, *tokenizer.eos_tokens, *known)):
        index = tokenizer.token_id(one) if isinstance(one, str) else one
        if index is None or not 0 <= index < vocab_size:
            wrong.append(one)
        else:
            ids[index] = tokenizer.token(index)
    if wrong:
        logger.warning("%s: no tokens of the model, so they end no output: %s", where, _listed(wrong))
    if ids:
        logger.info("%s: outputs end with %s", where, ", ".join(f"{index} {text!r}" for index, text in ids.items()))
    else:
        logger.warning("%s: no token ends an output, each runs to max_tokens", where)
    return tuple(ids)


def _listed(tokens: Iterable[int | str]) -> str:
    return ", ".join(map(repr, tokens))
