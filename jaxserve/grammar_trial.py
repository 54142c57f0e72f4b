"""Compiles one grammar, in a process that dies of it if need be: run as a script, which reads no more than it must.

A grammar of a few bytes may cost hours, gigabytes or a stack that overflows in the library, which nothing stops. What
was compiled here for single bytes costs as much for a vocabulary, plus what the library's own limits bound.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

LIMITS: Mapping[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}
"""Of the library's work: to compile, and for a token's mask, some milliseconds each."""
MEMORY_BYTES = 1024**3
STACK_BYTES = 4 * 1024**2
"""Half of what a thread has that compiles for the vocabulary."""
SPACES = r"[\x20\x0A\x0D\x09]{1,64}"
"""Between the tokens of JSON. Models that may write any number sometimes write nothing else to the end."""


def try_out(format: str, text: str, vocab_size: int, special_tokens: Mapping[int, str], timeout_seconds: float) -> str:
    """The library's text of a grammar whose ``text`` is in one of its formats, which has been compiled once.

    ``special_tokens`` by their ids are what it may name. Raises ValueError with the library's word for what is wrong,
    and TimeoutError.
    """
    command = [sys.executable, "-P", __file__]
    message = json.dumps({"format": format, "text": text, "vocab_size": vocab_size, "special_tokens": special_tokens})
    try:
        done = subprocess.run(command, input=message, capture_output=True, text=True, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    if done.returncode:
        raise ValueError("it takes too much memory, or nests too deeply")
    answer = json.loads(done.stdout)
    if error := answer["error"]:
        raise ValueError(error)
    grammar: str = answer["grammar"]
    return grammar


def _main() -> None:
    import resource
    import threading

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_compile)
    thread.start()
    thread.join()


def _compile() -> None:
    import llguidance

    message = json.load(sys.stdin)
    grammar = error = ""
    try:
        grammar = _grammar(message["format"], message["text"])
        tokenizer = _tokenizer_of_bytes(
            message["vocab_size"], {int(index): token for index, token in message["special_tokens"].items()}
        )
        limits = llguidance.LLParserLimits(**LIMITS)
        error = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits).get_error()
    except (ValueError, RecursionError) as found:
        error = str(found) or type(found).__name__
    json.dump({"grammar": grammar, "error": error}, sys.stdout)


def _grammar(format: Any, text: str) -> str:
    import llguidance

    if format == "json_schema":
        return llguidance.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": SPACES})
    return llguidance.grammar_from(format, text)


class Vocabulary:
    """What the library asks a tokenizer for. ``tokens`` are the bytes of each id, none of those that are never to be
    written; of special tokens, their names."""

    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_token_ids: Iterable[int],
        encode: Callable[[str], list[int]],
        eos_token_id: int,
    ) -> None:
        self.tokens, self.special_token_ids, self._encode = tokens, list(special_token_ids), encode
        self.eos_token_id = eos_token_id

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text must be a string")  # by which the library learns that bytes are not taken
        return self._encode(text)


def _tokenizer_of_bytes(vocab_size: int, special_tokens: Mapping[int, str]) -> Any:
    """The special tokens, and the first other ids for the bytes."""
    import llguidance

    size = max(vocab_size, 256 + len(special_tokens), *special_tokens, 0)
    tokens = [b""] * (size + 1)
    for index, token in special_tokens.items():
        tokens[index] = token.encode()
    others = (index for index in range(size) if index not in special_tokens)
    for byte, index in zip(range(256), others, strict=False):
        tokens[index] = bytes([byte])
    ids = {tokens[index]: index for index in range(size) if len(tokens[index]) == 1}
    vocabulary = Vocabulary(tokens, special_tokens, lambda text: [ids[bytes([b])] for b in text.encode()], size)
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), slices=[])


if __name__ == "__main__":
    _main()
