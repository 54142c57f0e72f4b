"""A request's life: what the engine tracks, and what the caller gets back."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Self

from jaxserve.drafting import Acceptance, Suggestion
from jaxserve.html_view import table_of
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    """It cannot go on: see RequestDelta.error."""


class RequestStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Logprob(NamedTuple):
    """Log-probability of one token under the model's unmodified distribution, and its rank (1 = most likely)."""

    logprob: float
    rank: int


class PositionLogprobs(Mapping[int, Logprob]):
    """Token id -> Logprob of a position, as vLLM's dict has it: the token that is there first, then the likeliest.

    Held in arrays, ``int32[n]`` and ``float32[n]``, likeliest first: eight bytes an alternative, where a dict has some
    two hundred.
    """

    __slots__ = ("_chosen", "_token_id", "_top", "_top_ids")

    def __init__(self, token_id: int, chosen: Logprob, top_ids: np.ndarray, top: np.ndarray) -> None:
        self._token_id, self._chosen, self._top_ids, self._top = token_id, chosen, top_ids, top

    def __getitem__(self, token_id: int) -> Logprob:
        return self._chosen if token_id == self._token_id else self._dict()[token_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._dict())

    def __len__(self) -> int:
        return len(self._dict())

    def items(self) -> ItemsView[int, Logprob]:
        return self._dict().items()

    def values(self) -> ValuesView[Logprob]:
        return self._dict().values()

    def __repr__(self) -> str:
        return repr(self._dict())

    def _dict(self) -> dict[int, Logprob]:
        entries = {self._token_id: self._chosen}
        for rank, (token_id, top) in enumerate(zip(self._top_ids.tolist(), self._top.tolist(), strict=True), 1):
            entries.setdefault(token_id, Logprob(top, rank))
        return entries


@dataclass(slots=True)
class RequestMetrics:
    """Times on the engine's clock, in seconds; None until they happen."""

    arrival_seconds: float
    first_scheduled_seconds: float | None = None
    token_seconds: list[float] = field(default_factory=list)
    """When each output token reached the host."""
    finished_seconds: float | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that were not computed: the prefix cache had them at the request's first admission."""
    num_preemptions: int = 0
    num_stalls: int = 0
    """Steps that ran without this request while it was ready to decode: zero under a stall-free policy."""

    @property
    def ttft_seconds(self) -> float | None:
        """Time to first token: from arrival to the first output token."""
        return self.token_seconds[0] - self.arrival_seconds if self.token_seconds else None

    @property
    def tbt_seconds(self) -> list[float]:
        """Times between consecutive output tokens; those that came in one step, drafts that held, count as one."""
        return [b - a for a, b in pairwise(dict.fromkeys(self.token_seconds))]

    @property
    def scheduling_delay_seconds(self) -> float | None:
        """From arrival to the first batch that held a part of the prompt."""
        if self.first_scheduled_seconds is None:
            return None
        return self.first_scheduled_seconds - self.arrival_seconds


@dataclass(eq=False, slots=True)
class Request:
    """One request inside the engine.

    There is no prefill or decode phase: ``num_computed_tokens`` chases ``num_tokens``. A token that was sampled on the
    device but has not reached the host yet counts as one and is pending, so the scheduler can run one step ahead.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    """Best a tuple: what the garbage collector need not look into, while thousands of requests wait."""
    params: SamplingParams
    max_tokens: int
    """Output tokens to make at most, as of ``SamplingParams.max_output_tokens``; 0: only the prompt is scored."""
    metrics: RequestMetrics
    stop_token_ids: frozenset[int] = frozenset()
    """Ids that end the output: the caller's, and the model's EOS unless ignore_eos."""
    seed: int = 0
    client: str = ""
    """Whose it is, where that has a name: the scheduler is fair among clients."""
    output_token_ids: list[int] = field(default_factory=list)
    num_prompt_tokens: int = field(init=False)
    num_tokens: int = field(init=False)
    """Prompt and output tokens, those still pending on the device included."""
    num_unverified_tokens: int = 0
    """Drafts in steps that the host has not read: so many tokens more there may be, with their keys and values."""
    acceptance: Acceptance = field(default_factory=Acceptance)
    suggestion: Suggestion | None = None
    """None where the device alone guesses what comes next, if anyone does."""
    num_unsampled_tokens: int = 0
    """Of a pipeline: the pending ones whose step has not left the last stage, so that not even the device has them."""
    num_computed_tokens: int = 0
    """Whose keys and values are in the KV cache, or will be once what has been launched has run. While a request waits
    they are those that the prefix cache had when the scheduler looked last."""
    block_digests: list[bytes] = field(default_factory=list)
    """Of its first blocks, as far as anyone has asked (scheduler/prefix_cache.py)."""
    rank: tuple[float, int] = (0.0, 0)
    """The scheduler's order of requests (scheduler/queue.py), from when it is added."""
    slot: int = -1
    """Row of the per-sequence device arrays while running, -1 otherwise."""
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.num_tokens = self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Prompt and output tokens, without pending ones."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_pending_tokens(self) -> int:
        return self.num_tokens - self.num_known_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose KV is not in the cache yet: 1 while decoding, more during prefill or after a preemption."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def first_scored(self) -> int | None:
        """The prompt token from which on log-probabilities are wanted, None where they are not; the first has none."""
        return None if self.params.prompt_logprobs is None else max(1, self.params.logprob_start_len)

    @property
    def num_cacheable_tokens(self) -> int:
        """As many tokens may be left out because the KV cache has them: not the last, which tells what is sampled after
        it, and none that tells a log-probability."""
        last = self.num_tokens - 1
        return last if self.first_scored is None else min(last, self.first_scored - 1)

    @property
    def furthest_start(self) -> int:
        """Of a decode, the position of its last token if all drafts hold; who goes on behind max_tokens, is cut."""
        return min(self.num_computed_tokens + self.num_unverified_tokens, self.num_prompt_tokens + self.max_tokens - 1)

    @property
    def may_draft(self) -> bool:
        """Whether its tokens may be guessed: by the host alone where what is allowed depends on the tokens before."""
        params = self.params
        known = self.suggestion is not None or not params.masks_by_tokens
        return known and self.num_tokens - self.num_prompt_tokens >= params.min_tokens

    @property
    def suggested_token_ids(self) -> Sequence[int]:
        """What the host suggests behind the tokens that it knows by now."""
        if self.suggestion is None:
            return ()
        start = self.suggestion.start
        return self.suggestion.left_after(self.known_token_ids(start, self.num_known_tokens))

    def known_token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens ``[start, stop)`` as far as the host knows them: a pending one is missing at the end."""
        prompt = self.num_prompt_tokens
        known = list(self.prompt_token_ids[start:stop])
        if stop > prompt:
            known += self.output_token_ids[max(start - prompt, 0) : stop - prompt]
        return known

    @property
    def decoding(self) -> bool:
        """True when one token of work is left and it follows an output token."""
        return self.num_computed_tokens + 1 == self.num_tokens > self.num_prompt_tokens

    @property
    def exhausted(self) -> bool:
        """True when every token the request may make has been sampled, processed by the host or not.

        The prompt's last step samples one even where none is wanted.
        """
        return self.num_tokens - self.num_prompt_tokens >= max(self.max_tokens, 1)


class RequestDelta(NamedTuple):
    """What one engine step added to one request."""

    request_id: str
    token_ids: list[int]
    text: str
    logprobs: list[Mapping[int, Logprob]] | None
    """One dict per new token: token id -> Logprob; the chosen token comes first."""
    prompt_logprobs: list[Mapping[int, Logprob] | None] | None
    """Given once, with the first token or the end: an entry per prompt token, the first None."""
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    """The stop string or stop token id that ended the output; None for EOS and other endings."""
    metrics: RequestMetrics
    num_prompt_tokens: int
    error: str | None = None
    """Why the request ended where it could not go on."""

    def followed_by(self, later: RequestDelta) -> RequestDelta:
        """Both as one."""
        return later._replace(
            token_ids=[*self.token_ids, *later.token_ids],
            text=self.text + later.text,
            logprobs=None if self.logprobs is None else self.logprobs + (later.logprobs or []),
            prompt_logprobs=self.prompt_logprobs or later.prompt_logprobs,
        )


@dataclass
class CompletionOutput:
    """One output of a prompt. ``stop_reason``: the stop string or stop token id that ended it, or the error."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[Mapping[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass
class RequestOutput:
    """A finished request, in vLLM's shape."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[Mapping[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics

    def _repr_html_(self) -> str:
        return table_of([self])


class Completion:
    """The output of one request, collected from its deltas. ``prompt`` is what is shown for the prompt, if anything.

    ``shows_logprobs``: false where those of the tokens only rank it among others.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        prompt: str | None = None,
        shows_logprobs: bool = True,
    ) -> None:
        self.request_id, self.prompt_token_ids, self.params, self.prompt = request_id, prompt_token_ids, params, prompt
        self.token_ids: list[int] = []
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        """The sum of the tokens', where they are known."""
        self.logprobs: list[Mapping[int, Logprob]] | None = None
        if params.logprobs is not None and shows_logprobs:
            self.logprobs = []
        self.prompt_logprobs: list[Mapping[int, Logprob] | None] | None = None
        self.finish_reason: FinishReason | None = None
        self._texts: list[str] = []
        self._last: RequestDelta | None = None

    @classmethod
    def choices(
        cls, request_id: str, prompt_token_ids: list[int], params: SamplingParams, prompt: str | None = None
    ) -> list[Self]:
        """A completion for each output that a prompt's parameters ask for, whose requests are named after it."""
        if params.num_choices == 1:
            return [cls(request_id, prompt_token_ids, params, prompt)]
        shows_logprobs = params.logprobs is not None or not params.ranks_choices
        return [
            cls(f"{request_id}-{number}", prompt_token_ids, params.of_choice(number), prompt, shows_logprobs)
            for number in range(params.num_choices)
        ]

    def add(self, delta: RequestDelta) -> None:
        """Append what a step has added."""
        if self.cumulative_logprob is not None and delta.logprobs is not None:
            chosen = zip(delta.logprobs, delta.token_ids, strict=True)
            self.cumulative_logprob += sum(entry[token].logprob for entry, token in chosen)
        if self.logprobs is not None and delta.logprobs is not None:
            self.logprobs += delta.logprobs
        self.token_ids += delta.token_ids
        self._texts.append(delta.text)
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self._last = delta.finish_reason, delta

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def metrics(self) -> RequestMetrics:
        """Once a delta has been added."""
        assert self._last is not None
        return self._last.metrics

    @property
    def has_begun(self) -> bool:
        """Whether a delta has been added."""
        return self._last is not None

    @property
    def error(self) -> str | None:
        """Why the request could not go on, once it has ended."""
        return None if self._last is None else self._last.error

    def output(self, index: int) -> CompletionOutput:
        """As far as deltas have been added. ``index``: among those of the prompt."""
        return CompletionOutput(
            index=index,
            text=self.text,
            token_ids=[*self.token_ids],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=self.logprobs,
            finish_reason=None if self.finish_reason is None else self.finish_reason.value,
            stop_reason=None if self._last is None else self._last.error or self._last.stop_reason,
        )


def best_of(completions: Sequence[Completion], n: int) -> list[Completion]:
    """The ``n`` of a prompt's completions whose tokens are likeliest in the mean, the best first; as they are where
    there are no more."""
    if len(completions) == n:
        return list(completions)

    def mean_logprob(completion: Completion) -> float:
        assert completion.cumulative_logprob is not None
        return completion.cumulative_logprob / max(1, len(completion.token_ids))

    return sorted(completions, key=mean_logprob, reverse=True)[:n]


def request_output(
    request_id: str, completions: Sequence[Completion], n: int, *, finished: bool = True
) -> RequestOutput:
    """Of a prompt's completions, which have all ended where more were made than are kept, the ``n`` best."""
    first = next(completion for completion in completions if completion.has_begun)
    return RequestOutput(
        request_id=request_id,
        prompt=first.prompt,
        prompt_token_ids=first.prompt_token_ids,
        prompt_logprobs=first.prompt_logprobs,
        outputs=[completion.output(index) for index, completion in enumerate(best_of(completions, n))],
        finished=finished,
        metrics=first.metrics,
    )
