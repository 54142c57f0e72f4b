"""The host's side of logit edits: what each request changes, draw by draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jaxserve.engine.logits import BITS, EditLayout
from jaxserve.engine.step import Step
from jaxserve.errors import RequestError
from jaxserve.grammars import Grammar, Matcher
from jaxserve.request import Request, RequestStatus
from jaxserve.scheduler import Chunk
from jaxserve.tokenizer import Tokenizer


class RequestEdits:
    """Of one request whose parameters ask for some."""

    def __init__(
        self, request: Request, layout: EditLayout, tokenizer: Tokenizer, matcher: Matcher | None = None
    ) -> None:
        """``matcher``: of what the output must be, if anything."""
        params = request.params
        self._matcher = matcher
        self._request = request
        self._packed = layout.blank(1)
        edits = layout.split(self._packed)
        if params.allowed_token_ids is not None:
            edits.allowed.fill(0)
            _set_bits(edits.allowed[0], list(params.allowed_token_ids), True)
        bias = params.logit_bias or {}
        edits.bias_ids[0, : len(bias)] = list(bias)
        edits.bias[0, : len(bias)] = list(bias.values())
        edits.penalties[0] = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
        edits.prompt_lengths[0] = request.num_prompt_tokens
        self._bad_words = [tuple(ids) for word in params.bad_words or () for ids in _spellings(word, tokenizer)]

    @property
    def needs_tokens(self) -> bool:
        """Whether a draw's edits depend on the tokens before it: then the host must know them all."""
        return self._matcher is not None or any(len(word) > 1 for word in self._bad_words)

    def write(self, packed: np.ndarray, layout: EditLayout, num_outputs: int) -> None:
        """Those of the draw that follows ``num_outputs`` output tokens, and of the ones behind each of its drafts, into
        ``int32[1 + drafts, layout.width]``.

        Raises RequestError where a grammar takes more work than it may.
        """
        packed[:] = self._packed
        edits = layout.split(packed)
        outputs = self._request.output_token_ids
        self._mask(edits.allowed[0], num_outputs, outputs, self._matcher)
        if not self.needs_tokens:
            # What is allowed does not depend on the tokens before.
            edits.allowed[1:] = edits.allowed[0]
            return
        ahead = None if self._matcher is None else self._matcher.copy()
        drafts = self._request.suggested_token_ids[: len(packed) - 1]
        for number, draft in enumerate(drafts, 1):
            try:
                if ahead is not None:
                    ahead.accept(draft)
                self._mask(edits.allowed[number], num_outputs + number, [*outputs, *drafts[:number]], ahead)
            except RequestError:
                # This draft does not hold, or ends the request for the work that it makes: nothing may follow.
                edits.allowed[number:] = 0
                break

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as that is known."""
        # Of a copy, which alone may find that it is too much work.
        return [] if self._matcher is None else self._matcher.copy().forced()

    def _mask(self, allowed: np.ndarray, num_outputs: int, outputs: Sequence[int], matcher: Matcher | None) -> None:
        """Take out of ``allowed``, as in LogitEdits, of one draw, what may not follow ``outputs`` at the end."""
        if num_outputs < self._request.params.min_tokens:
            _set_bits(allowed, list(self._request.stop_token_ids), False)
        _set_bits(allowed, [word[-1] for word in self._bad_words if _ends_with(outputs, word[:-1])], False)
        if matcher is not None:
            mask = np.zeros_like(allowed)
            matcher.fill(mask)
            # What the output must be goes before what else is asked for, where not both can be had.
            allowed[:] = both if (both := allowed & mask).any() else mask

    def accept(self, token_ids: Sequence[int]) -> None:
        """The output has gone on. Raises RequestError where a grammar takes more work than it may."""
        if self._matcher is not None:
            for token_id in token_ids:
                self._matcher.accept(token_id)


def _ends_with(outputs: Sequence[int], token_ids: tuple[int, ...]) -> bool:
    return not token_ids or tuple(outputs[-len(token_ids) :]) == token_ids


def _set_bits(mask: np.ndarray, token_ids: list[int], value: bool) -> None:
    """``mask``: as in LogitEdits.allowed, of one draw."""
    ids = np.array(token_ids, int)
    bits = np.uint32(1) << (ids % BITS).astype(np.uint32)
    view = mask.view(np.uint32)
    if value:
        np.bitwise_or.at(view, ids // BITS, bits)
    else:
        np.bitwise_and.at(view, ids // BITS, ~bits)


def _spellings(word: str, tokenizer: Tokenizer) -> list[list[int]]:
    """The usual tokens of a word at the beginning of a text and, where they are others of the same number, behind a
    space: vLLM's choice."""
    first = tokenizer.encode(word, add_special_tokens=False)
    spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
    return [first, spaced] if len(spaced) == len(first) and spaced[0] != first[0] else [first]


class EditedRequests:
    """Those of an engine's requests that edit their logits."""

    def __init__(self, layout: EditLayout, tokenizer: Tokenizer) -> None:
        self._layout, self._tokenizer = layout, tokenizer
        self._edits: dict[str, RequestEdits] = {}

    def add(self, request: Request, grammar: Grammar | None) -> None:
        """``grammar``: of what its output must be, if anything."""
        if request.params.edits_logits:
            matcher = None if grammar is None else grammar.matcher()
            self._edits[request.request_id] = RequestEdits(request, self._layout, self._tokenizer, matcher)

    def discard(self, request: Request) -> None:
        self._edits.pop(request.request_id, None)

    def needs_tokens(self, step: Step) -> bool:
        """Whether sampling the step must wait until the host has the tokens of the one before."""
        return any(edits.needs_tokens for _, _, edits in self._of(step))

    def forced(self, request: Request) -> list[int] | None:
        """The tokens that must come next; None where only the device guesses what does, for the host need not know."""
        edits = self._edits.get(request.request_id)
        return edits.forced() if edits is not None and edits.needs_tokens else None

    def accept(self, request: Request, token_ids: Sequence[int]) -> None:
        """A request's output has gone on. Raises RequestError where it cannot go on any further."""
        if (edits := self._edits.get(request.request_id)) is not None:
            edits.accept(token_ids)

    def pack(self, step: Step, num_draws: int) -> tuple[np.ndarray | None, list[tuple[Request, RequestError]]]:
        """``int32[num_draws, layout.width]`` of a step's draws, None where no request among them has any; and the
        requests that cannot go on."""
        packed, failed = None, []
        for draw, chunk, edits in self._of(step):
            if packed is None:
                packed = self._layout.blank(num_draws)
            first = chunk.start + chunk.num_tokens - chunk.num_drafts
            try:
                num_outputs = first - chunk.request.num_prompt_tokens
                edits.write(packed[draw : draw + chunk.num_draws], self._layout, num_outputs)
            except RequestError as error:
                failed.append((chunk.request, error))
        return packed, failed

    def _of(self, step: Step) -> Iterator[tuple[int, Chunk, RequestEdits]]:
        """The draws that have edits, by number."""
        if not self._edits:
            return
        for draw, chunk in step.draws():
            edits = self._edits.get(chunk.request.request_id)
            if edits is not None and chunk.request.status is not RequestStatus.FINISHED:
                yield draw, chunk, edits
