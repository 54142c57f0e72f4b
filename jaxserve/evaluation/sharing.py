"""What requests do to one another: shared beginnings, floods of long prompts, a prompt beside a stream, grammars."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.engine.engine import Engine, clear
from jaxserve.engine.metrics import StepRecord
from jaxserve.evaluation.throughput import measure_throughput, random_prompts
from jaxserve.request import RequestMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Chunk

ITEMS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "minItems": 50,
}
"""Of outputs of many hundred tokens."""
ANSWER_TOKENS = 16


def forced(num_tokens: int, **fields: Any) -> SamplingParams:
    """Parameters of an output of so many tokens."""
    return SamplingParams(max_tokens=num_tokens, **{"temperature": 0, "ignore_eos": True} | fields)


@dataclass
class Asked:
    """A request of a run."""

    prompt: list[int]
    params: SamplingParams
    after_seconds: float = 0.0
    """When it comes, after the start of the run."""
    client: str = ""
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))
    """Once the run is over."""


def run(engine: Engine, asked: Sequence[Asked], beside: Sequence[Asked] = ()) -> float:
    """Serve these, in the order in which they come, to their ends; the seconds that this takes. ``beside``: what is
    there from the start, and aborted in the end."""
    everyone = [*beside, *asked]
    start, waiting = time.monotonic(), deque(enumerate(everyone))
    unfinished = {str(len(beside) + index) for index in range(len(asked))}
    while unfinished:
        while waiting and start + waiting[0][1].after_seconds <= time.monotonic():
            index, one = waiting.popleft()
            arrival_seconds, grammar = start + one.after_seconds, engine.grammar_of(one.params)
            engine.add_request(str(index), one.prompt, one.params, arrival_seconds, grammar, one.client)
        for delta in engine.step():
            everyone[int(delta.request_id)].metrics = delta.metrics
            if delta.finish_reason is not None:
                unfinished.discard(delta.request_id)
        if waiting and not engine.has_unfinished():
            time.sleep(max(0.0, start + waiting[0][1].after_seconds - time.monotonic()))
    seconds = time.monotonic() - start
    clear(engine, map(str, range(len(beside))))
    return seconds


def ttft_seconds(asked: Sequence[Asked]) -> list[float]:
    """Of each request."""
    return [one.metrics.token_seconds[0] - one.metrics.arrival_seconds for one in asked]


def tbt_seconds(asked: Sequence[Asked]) -> np.ndarray:
    """Of all requests' tokens."""
    return np.concatenate([one.metrics.tbt_seconds for one in asked])


@dataclass(frozen=True)
class GrammarRound:
    """Streams side by side, all free, all constrained, or half of them; the same number and lengths."""

    free_seconds: float
    constrained_seconds: float
    alone_p50_seconds: float
    """TBT of the first half, while the others are free as well,"""
    alone_p99_seconds: float
    beside_p50_seconds: float
    """and while they are constrained."""
    beside_p99_seconds: float


def measure_grammars(engine: Engine, *, streams: int, output_tokens: int, seed: int = 0) -> GrammarRound:
    """Random sampling, so that no two outputs are alike."""
    prompts = random_prompts(streams, 32, engine.model_config.vocab_size, seed)
    free = forced(output_tokens, temperature=1.0, seed=seed)
    # Never whole before it ends, so ignore_eos, which structured outputs refuse, makes no difference.
    items = {"ignore_eos": False, "structured_outputs": {"json": ITEMS_SCHEMA}}
    constrained = forced(output_tokens, temperature=1.0, seed=seed, **items)

    def measure(*params: SamplingParams) -> tuple[float, list[float]]:
        asked = [Asked(prompt, params[i * len(params) // streams]) for i, prompt in enumerate(prompts)]
        seconds = run(engine, asked)
        tbt = tbt_seconds(asked[: streams // 2])
        return seconds, [float(np.percentile(tbt, share)) for share in (50, 99)]

    free_seconds, alone = measure(free, free)
    _, beside = measure(free, constrained)
    constrained_seconds, _ = measure(constrained, constrained)
    return GrammarRound(free_seconds, constrained_seconds, *alone, *beside)


@dataclass(frozen=True)
class PrefixRound:
    """Seconds that the same requests take with a prefix cache, and without."""

    no_hit: tuple[float, float]
    """Of prompts that share nothing, to the end of all."""
    again: tuple[float, float]
    """TTFT of a prompt that was there before."""
    together: tuple[float, float]
    """Of sixteen prompts that share their beginnings, to the last first token."""
    turns: tuple[list[float], list[float]]
    """TTFT of each turn of a chat."""


def measure_prefixes(cached: Engine, plain: Engine, *, prompt_tokens: int, turns: int, seed: int) -> PrefixRound:
    """Two engines that differ in that only; which goes first changes with the seed."""
    vocab = cached.model_config.vocab_size
    order = (cached, plain) if seed % 2 else (plain, cached)

    def both[T](measured: dict[int, T]) -> tuple[T, T]:
        return measured[id(cached)], measured[id(plain)]

    no_hit, again, together, chats = {}, {}, {}, {}
    for engine in order:
        fresh = random_prompts(16, 151, vocab, 1000 * seed + (engine is cached))
        no_hit[id(engine)] = measure_throughput(engine, fresh, 64).seconds
    for engine in order:
        (prompt,) = random_prompts(1, prompt_tokens, vocab, 1000 * seed + 2)
        run(engine, [Asked(prompt, forced(2))])
        second = [Asked(prompt, forced(2))]
        run(engine, second)
        again[id(engine)] = ttft_seconds(second)[0]
    for engine in order:
        (beginning,) = random_prompts(1, prompt_tokens * 2 // 3, vocab, 1000 * seed + 3)
        asked = [Asked(beginning + end, forced(2)) for end in random_prompts(16, 32, vocab, 1000 * seed + 4)]
        run(engine, asked)
        together[id(engine)] = max(ttft_seconds(asked))
    for engine in order:
        chat, found = list[int](), list[float]()
        for user in random_prompts(turns, prompt_tokens // turns, vocab, 1000 * seed + 5):
            chat = chat + user
            turn = [Asked(chat, forced(ANSWER_TOKENS))]
            run(engine, turn)
            found += ttft_seconds(turn)
            chat = chat + user[:ANSWER_TOKENS]
        chats[id(engine)] = found
    return PrefixRound(both(no_hit), both(again), both(together), both(chats))


@dataclass(frozen=True)
class FairnessRound:
    """TTFT of one client's short prompts, alone and while another client's long ones keep the engine busy."""

    alone_seconds: list[float]
    beside_seconds: list[float]


def measure_fairness(
    engine: Engine, *, long_tokens: int, short_tokens: int, num_short: int, gap_seconds: float, seed: int = 0
) -> FairnessRound:
    """``gap_seconds``: the mean of the times between short prompts, which are those of a Poisson process."""
    vocab, gaps = engine.model_config.vocab_size, np.random.default_rng(seed).exponential(gap_seconds, num_short)
    prompts = random_prompts(2 * num_short, short_tokens, vocab, seed)

    def short(prompts: Sequence[list[int]]) -> list[Asked]:
        return [
            Asked(prompt, forced(1), float(after), "short")
            for prompt, after in zip(prompts, gaps.cumsum(), strict=True)
        ]

    alone, with_flood = short(prompts[:num_short]), short(prompts[num_short:])
    run(engine, alone)
    # More than can be computed in the meantime.
    flood = [Asked(prompt, forced(1), 0.0, "long") for prompt in random_prompts(50, long_tokens, vocab, seed + 1)]
    run(engine, with_flood, flood)
    return FairnessRound(ttft_seconds(alone), ttft_seconds(with_flood))


@dataclass(frozen=True)
class FloorRound:
    """A stream, alone and while a long prompt is computed beside it."""

    alone_tbt_seconds: float
    """The median."""
    beside_tbt_seconds: np.ndarray
    prompt_ttft_seconds: float
    step_seconds: np.ndarray
    """Of the steps with a part of the prompt."""

    def share_of_room(self, objective_seconds: float) -> float:
        """Of the time that an objective leaves beside the stream, what steps give to the prompt, in the mean."""
        room_seconds = objective_seconds - self.alone_tbt_seconds
        return float((self.step_seconds - self.alone_tbt_seconds).mean() / room_seconds)


def measure_floor(engine: Engine, *, prompt_tokens: int, seed: int = 0) -> FloorRound:
    vocab, steps = engine.model_config.vocab_size, list[float]()

    def observe(record: StepRecord, chunks: list[Chunk]) -> None:
        if record.num_tokens > 1:
            steps.append(record.ready_seconds - record.device_start_seconds)

    stream, beside = (Asked(prompt, forced(40)) for prompt in random_prompts(2, 64, vocab, seed))
    run(engine, [stream])
    (long,) = random_prompts(1, prompt_tokens, vocab, seed + 1)
    alone = float(np.median(stream.metrics.tbt_seconds))
    # The prompt comes once the stream decodes, and long before its end, however fast steps are.
    beside.params, prompt = forced(engine.max_model_len - 64), Asked(long, forced(1), 40 * alone)
    engine.on_step.append(observe)
    run(engine, [prompt], [beside])
    engine.on_step.remove(observe)
    times = np.array(beside.metrics.token_seconds)
    during = np.diff(times)[times[1:] > prompt.metrics.arrival_seconds]
    # The first step with several tokens is the stream's own prompt.
    return FloorRound(alone, during, ttft_seconds([prompt])[0], np.array(steps[1:]))
