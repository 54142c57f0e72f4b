"""Grammars of structured outputs, and which tokens may come next in one."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from functools import cached_property
from typing import Any

import llguidance
import numpy as np

from jaxserve.errors import RequestError
from jaxserve.grammar_trial import LIMITS, Vocabulary, try_out
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.tokenizer import Tokenizer

MAX_GRAMMARS = 128
"""That are kept, those used last: some hundred kilobytes each."""
COMPILE_SECONDS = 5.0


class Grammars:
    """Compiles what outputs must be for one model's vocabulary. Its methods may be called from any thread.

    ``vocab_size`` is the model's, which may be padded beyond the tokenizer's: those ids are never allowed.
    ``eos_token_ids`` are allowed exactly where the output may end.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        *,
        compile_seconds: float = COMPILE_SECONDS,
    ) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_token_ids = [token_id for token_id in eos_token_ids if token_id < vocab_size]
        self._compile_seconds = compile_seconds
        self._lock, self._building = threading.Lock(), threading.Lock()
        self._known: OrderedDict[StructuredOutputsParams, Future[Grammar]] = OrderedDict()
        """Also those that are being compiled: who wants one of them waits, as the choices of one request do."""

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """Takes milliseconds to seconds, without Python's lock, and nothing for one that is known; the first of all,
        a second more. Raises RequestError: what is wrong, or that it takes more time or memory than it may.
        """
        with self._lock:
            known = self._known.get(params)
            grammar = self._known[params] = known or Future[Grammar]()
            self._known.move_to_end(params)
            while len(self._known) > MAX_GRAMMARS:
                self._known.popitem(last=False)
        if known is None:
            try:
                grammar.set_result(self._compile(params))
            except BaseException as error:
                with self._lock:
                    self._known.pop(params, None)
                grammar.set_exception(error)
        return grammar.result()

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        name = params.name
        if not self._eos_token_ids:
            raise RequestError(f"structured_outputs.{name} cannot be served: the model has no end-of-sequence token")
        format, text = source_of(params, self._special_tokens.values())
        try:
            source = try_out(format, text, self._vocab_size, self._special_tokens, self._compile_seconds)
            with self._building:
                tokenizer = self._library_tokenizer
            return Grammar(tokenizer, source, self._eos_token_ids)
        except TimeoutError:
            limit = f"within {self._compile_seconds:g} s"
            raise RequestError(
                f"structured_outputs.{name} must compile {limit}, got no result from {text!r:.80}"
            ) from None
        except ValueError as error:
            raise RequestError(f"structured_outputs.{name} cannot be compiled, got {text!r:.80}: {error}") from None

    @cached_property
    def _special_tokens(self) -> Mapping[int, str]:
        token_ids = sorted(self._tokenizer.special_token_ids | set(self._eos_token_ids))
        return {index: self._tokenizer.token(index) or "" for index in token_ids if index < self._vocab_size}

    @cached_property
    def _library_tokenizer(self) -> llguidance.LLTokenizer:
        tokens = self._tokenizer.vocabulary_bytes()[: self._vocab_size]
        tokens += [b""] * (self._vocab_size - len(tokens))
        for index, token in self._special_tokens.items():
            tokens[index] = token.encode()

        def encode(text: str) -> list[int]:
            return self._tokenizer.encode(text, add_special_tokens=False)

        vocabulary = Vocabulary(tokens, self._special_tokens, encode, self._eos_token_ids[0])
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), eos_token=self._eos_token_ids)


class Grammar:
    """A compiled one, for any number of outputs. Raises ValueError for one that cannot be compiled."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, source: str, eos_token_ids: Iterable[int]) -> None:
        self._start = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
        self._eos_token_ids = frozenset(eos_token_ids)
        if error := self._start.get_error():
            raise ValueError(error)

    def matcher(self) -> Matcher:
        """For one output, at its start."""
        return Matcher(self._start.deep_copy(), self._eos_token_ids)


class Matcher:
    """Follows one output. For one thread at a time, and a call of each method a token; others run on meanwhile."""

    def __init__(self, matcher: llguidance.LLMatcher, eos_token_ids: frozenset[int]) -> None:
        self._matcher, self._eos_token_ids = matcher, eos_token_ids
        self._has_ended = False

    def copy(self) -> Matcher:
        """For a look ahead: what is done to either does not change the other."""
        copied = Matcher(self._matcher.deep_copy(), self._eos_token_ids)
        copied._has_ended = self._has_ended
        return copied

    def fill(self, mask: np.ndarray) -> None:
        """Write which tokens may come next: int32[ceil(vocab_size / 32)], contiguous, a bit for each id, the lowest
        first. Raises RequestError where the grammar takes more work for it than it may.
        """
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()

    def accept(self, token_id: int) -> None:
        """The output goes on with this token, one that the mask allowed; after the end, nothing counts any more.
        Raises RequestError for another, and where the grammar takes more work for it than it may.
        """
        if self._has_ended:
            return
        if token_id in self._eos_token_ids and self._matcher.is_accepting():
            self._has_ended = True
            return
        if not self._matcher.consume_token(token_id):
            self._check()

    @property
    def is_done(self) -> bool:
        """Whether only the end may follow, or it has come."""
        return self._has_ended or self._matcher.is_stopped()

    def forced(self) -> list[int]:
        """The tokens that must come next, if any do."""
        return self._matcher.compute_ff_tokens()

    def _check(self) -> None:
        if self._matcher.is_error():
            error = self._matcher.get_error().partition("\n")[0]
            raise RequestError(f"structured_outputs cannot be followed any further: {error}")


def source_of(params: StructuredOutputsParams, special_tokens: Iterable[str]) -> tuple[str, str]:
    """In one of the library's formats, and which."""
    if params.json is not None:
        return "json_schema", str(params.json)
    if params.json_object:
        return "json_schema", '{"type": "object"}'
    if params.regex is not None:
        return "regex", params.regex
    if params.choice is not None:
        return "choice", json.dumps(params.choice)
    if params.grammar is not None:
        return "grammar", params.grammar
    return "lark", _tags(json.loads(str(params.structural_tag)), set(special_tokens))


def _tags(tags: Mapping[str, Any], special_tokens: set[str]) -> str:
    triggers = tags["triggers"]
    found = []
    for entry in tags["structures"]:
        trigger = next(t for t in triggers if isinstance(t, str) and t and entry["begin"].startswith(t))
        found.append(
            llguidance.StructTag(trigger=trigger, begin=entry["begin"], grammar=entry["schema"], end=entry["end"])
        )
    return llguidance.StructTag.to_grammar(found, assume_special=any(tag.trigger in special_tokens for tag in found))
