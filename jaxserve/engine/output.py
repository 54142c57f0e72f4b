"""From sampled tokens to deltas: streaming detokenisation, stop strings, log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxserve.engine.sampler import TokenLogprobs
from jaxserve.engine.speculation import ABSENT
from jaxserve.engine.step import Step, scored_tokens
from jaxserve.request import FinishReason, Logprob, PositionLogprobs, Request, RequestDelta, RequestStatus
from jaxserve.scheduler import Chunk
from jaxserve.text import overlap
from jaxserve.tokenizer import Tokenizer


class OutputStream:
    """The text of one request as it grows.

    Text that may be the beginning of a stop string is held back until the next token decides; half a character is
    held back by the detokeniser.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.stop_reason: int | str | None = None
        num_scored = 0 if request.params.prompt_logprobs is None else request.num_prompt_tokens
        self.prompt_logprobs: list[Mapping[int, Logprob] | None] = [None] * num_scored
        """By prompt token; empty where they were not asked for."""
        self._decoder = tokenizer.decode_stream(request.params.skip_special_tokens, request.prompt_token_ids)
        self._held = ""

    def push(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Append a sampled token: the text that is now certain, and the reason to stop here, if any."""
        request, params = self.request, self.request.params
        request.output_token_ids.append(token_id)
        if token_id in request.stop_token_ids:
            # The stop token itself is not part of the text, unless the caller asked for it.
            self.stop_reason = token_id if token_id in (params.stop_token_ids or ()) else None
            text = self._decoder.step(token_id) if params.include_stop_str_in_output else ""
            return self._held + text + self._decoder.flush(), FinishReason.STOP
        self._held += self._decoder.step(token_id)
        may_stop = len(request.output_token_ids) >= params.min_tokens
        stopped = self._cut_at_stop_string() if may_stop else None
        if stopped is not None:
            return stopped, FinishReason.STOP
        if len(request.output_token_ids) >= request.max_tokens:
            self._held += self._decoder.flush()
            stopped = self._cut_at_stop_string()
            return (self._held, FinishReason.LENGTH) if stopped is None else (stopped, FinishReason.STOP)
        return self._release(), None

    def append(
        self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]] | None, now_seconds: float
    ) -> RequestDelta:
        """Add the tokens that a step has sampled, with their log-probabilities where those are asked for: what that
        adds to the output. Those behind its end are dropped.

        The delta's finish_reason says whether the request ends with them; nothing else has ended it by then.
        """
        request = self.request
        prompt_logprobs = None
        if request.params.prompt_logprobs is not None and not request.output_token_ids:
            prompt_logprobs = self.prompt_logprobs
        if request.max_tokens == 0:  # nothing but those was asked for
            return self._delta((), "", None, prompt_logprobs, FinishReason.LENGTH)
        text, reason, number = "", None, 0
        while reason is None and number < len(token_ids):
            more, reason = self.push(token_ids[number])
            text, number = text + more, number + 1
            request.metrics.token_seconds.append(now_seconds)
        kept = None if logprobs is None else list(logprobs[:number])
        return self._delta(token_ids[:number], text, kept, prompt_logprobs, reason)

    def end(self, error: str | None = None) -> RequestDelta:
        """The rest of the text when the request ends from outside, or cannot go on: then ``error`` says why."""
        reason = FinishReason.ABORT if error is None else FinishReason.ERROR
        return self._delta((), self._held + self._decoder.flush(), None, None, reason)._replace(error=error)

    def _delta(
        self,
        token_ids: Sequence[int],
        text: str,
        logprobs: list[Mapping[int, Logprob]] | None,
        prompt_logprobs: list[Mapping[int, Logprob] | None] | None,
        finish_reason: FinishReason | None,
    ) -> RequestDelta:
        request = self.request
        return RequestDelta(
            request_id=request.request_id,
            token_ids=list(token_ids),
            text=text,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=self.stop_reason,
            metrics=request.metrics,
            num_prompt_tokens=request.num_prompt_tokens,
        )

    def _cut_at_stop_string(self) -> str | None:
        """The text up to the earliest stop string in what is held, or None."""
        stops = self.request.params.stop
        if not stops:
            return None
        found = [(at, stop) for stop in stops if (at := self._held.find(stop)) >= 0]
        if not found:
            return None
        at, stop = min(found)
        self.stop_reason = stop
        return self._held[: at + len(stop)] if self.request.params.include_stop_str_in_output else self._held[:at]

    def _release(self) -> str:
        """Give out what can no longer become a stop string."""
        stops = self.request.params.stop
        keep = max(overlap(self._held, stop) for stop in stops) if stops else 0
        split = len(self._held) - keep
        text, self._held = self._held[:split], self._held[split:]
        return text


def host_logprobs(logprobs: TokenLogprobs[jax.Array]) -> TokenLogprobs[np.ndarray]:
    """The same on the host, as numpy arrays."""
    return TokenLogprobs(*(np.asarray(array) for array in logprobs))


def logprob_entry(logprobs: TokenLogprobs[np.ndarray], row: int, token_id: int, num_top: int) -> PositionLogprobs:
    """Row ``row`` with the ``num_top`` likeliest, all that there are for -1."""
    chosen = Logprob(float(logprobs.chosen[row]), int(logprobs.rank[row]))
    top = slice(num_top if num_top >= 0 else None)
    # Copies, which do not keep the rows of others alive.
    return PositionLogprobs(token_id, chosen, logprobs.top_ids[row, top].copy(), logprobs.top[row, top].copy())


class DrawnTokens(NamedTuple):
    """What a step has drawn of one request."""

    chunk: Chunk
    token_ids: list[int]
    """The drafts that hold, and the token behind them."""
    logprobs: list[Mapping[int, Logprob]] | None
    """Of these, where the request asked for them."""
    num_verified: int
    """Drafts that there were, of those that it was granted."""


def drawn_tokens(step: Step, token_ids: Sequence[int]) -> Iterator[DrawnTokens]:
    """Of each request of the step that is still there and draws, from ``token_ids`` ``[R]``."""
    draws = [(draw, chunk) for draw, chunk in step.draws() if chunk.request.status is not RequestStatus.FINISHED]
    wanted = any(chunk.request.params.logprobs is not None for _, chunk in draws)
    logprobs = host_logprobs(step.outputs.logprobs) if wanted and step.outputs is not None else None
    for draw, chunk in draws:
        drawn = token_ids[draw : draw + chunk.num_draws]
        held = [token_id for token_id in drawn if token_id >= 0]
        entries: list[Mapping[int, Logprob]] | None = None
        num_top = chunk.request.params.logprobs
        if logprobs is not None and num_top is not None:
            entries = [logprob_entry(logprobs, draw + i, token_id, num_top) for i, token_id in enumerate(held)]
        yield DrawnTokens(chunk, held, entries, chunk.num_drafts - drawn.count(ABSENT))


def collect_prompt_logprobs(step: Step, streams: Mapping[str, OutputStream]) -> None:
    """Give the streams of a step's requests what they want of the log-probabilities of its rows."""
    if step.prompt_logprobs is None:
        return
    logprobs, row = host_logprobs(step.prompt_logprobs), 0
    for chunk in step.chunks:
        request, num_top = chunk.request, chunk.request.params.prompt_logprobs
        if num_top is not None and request.status is not RequestStatus.FINISHED:
            stream = streams[request.request_id]
            for position in scored_tokens(chunk):
                entry_row, token_id = row + position - 1 - chunk.start, request.prompt_token_ids[position]
                stream.prompt_logprobs[position] = logprob_entry(logprobs, entry_row, token_id, num_top)
        row += chunk.num_tokens
