"""Beam search by requests for one token, with vLLM's parameters and results; the prefix cache keeps the beams' KV."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import isfinite

from jaxserve.errors import RequestError
from jaxserve.request import FinishReason, RequestOutput
from jaxserve.sampling_params import MAX_INT32, MAX_LOGPROBS, SamplingParams, checked_integer

MAX_BEAM_WIDTH = MAX_LOGPROBS // 2
"""Of each beam the ``2 * beam_width`` likeliest tokens are looked at: so many are left where some of them end it."""


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Names and defaults are vLLM's.

    beam_width: sequences that are followed at once, and given back.   max_tokens: of each.
    ignore_eos: whether sequences go on after the model's end-of-sequence tokens.
    length_penalty: a score is the sum of log-probabilities divided by the tokens, the prompt's too, to this power.
    Raises RequestError, naming the field and the limit.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        checked_integer("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        checked_integer("max_tokens", self.max_tokens, 1, MAX_INT32)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        if not isinstance(self.length_penalty, int | float) or not isfinite(self.length_penalty):
            raise RequestError(f"length_penalty must be a finite number, got {self.length_penalty!r}")


@dataclass
class BeamSearchSequence:
    """Tokens of a prompt and what follows it; ``cum_logprob`` is of the latter, ``text`` of both."""

    tokens: list[int]
    cum_logprob: float = 0.0
    text: str = ""
    finish_reason: str | None = None


@dataclass
class BeamSearchOutput:
    """The best sequences of one prompt, the best first."""

    sequences: list[BeamSearchSequence]


class BeamSearch:
    """One prompt's search, a token at a time (Hugging Face's and vLLM's: 2 * beam_width candidates of each beam)."""

    def __init__(self, prompt_token_ids: list[int], params: BeamSearchParams, eos_token_ids: Collection[int]) -> None:
        self.beams = [BeamSearchSequence(prompt_token_ids)]
        """Those that go on."""
        self._params, self._eos_token_ids = params, () if params.ignore_eos else eos_token_ids
        self._ended: list[BeamSearchSequence] = []

    def advance(self, outputs: Sequence[RequestOutput]) -> None:
        """Take the log-probabilities of the next token of every beam."""
        going_on = []
        for beam, output in zip(self.beams, outputs, strict=True):
            for token_id, entry in (output.outputs[0].logprobs or [{}])[0].items():
                longer = BeamSearchSequence([*beam.tokens, token_id], beam.cum_logprob + entry.logprob)
                if token_id in self._eos_token_ids:
                    longer.finish_reason = FinishReason.STOP.value
                    self._ended.append(longer)
                else:
                    going_on.append(longer)
        self.beams = self._best(going_on)

    def result(self, decode: Callable[[list[int]], str]) -> BeamSearchOutput:
        for beam in self.beams:
            beam.finish_reason = FinishReason.LENGTH.value
        best = self._best([*self._ended, *self.beams])
        for sequence in best:
            sequence.text = decode(sequence.tokens)
        return BeamSearchOutput(best)

    def _best(self, sequences: list[BeamSearchSequence]) -> list[BeamSearchSequence]:
        return sorted(sequences, key=self._score, reverse=True)[: self._params.beam_width]

    def _score(self, sequence: BeamSearchSequence) -> float:
        """The token that ends a sequence does not count."""
        num_tokens = len(sequence.tokens) - (sequence.finish_reason == FinishReason.STOP)
        return sequence.cum_logprob / num_tokens**self._params.length_penalty


def next_token(params: BeamSearchParams) -> SamplingParams:
    """What asks for the candidates that follow a beam."""
    return SamplingParams(temperature=0, max_tokens=1, logprobs=2 * params.beam_width)
