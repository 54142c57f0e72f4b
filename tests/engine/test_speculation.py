"""Outputs with drafts are those without, token for token, whatever the drafts, the company, and the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxserve.config import EngineConfig
from jaxserve.engine import speculation
from jaxserve.engine.engine import Engine
from jaxserve.engine.metrics import StepRecord
from jaxserve.engine.profiling import Profiler
from jaxserve.engine.sampler import SamplingInputs, sample
from jaxserve.engine.speculation import ABSENT, REJECTED, Draws, Proposal, SequenceState, ngrams, probed, verify
from jaxserve.errors import ConfigError
from jaxserve.request import Completion
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.step_time import StepTimeModel
from tests.models.golden import Golden

BLOCK_SIZE, MAX_LEN, VOCAB = 8, 112, 96
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
FLAT = StepTimeModel({1: 1.0, 64: 1.0}, 0.0, 0.0)
numbers = count()
jit_ngrams = jax.jit(ngrams, static_argnums=1)


class Oracle:
    """Proposes how texts go on, now and then wrongly or not at all, and anything where none of them is known."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []
        self._random = np.random.default_rng(0)

    def __call__(self, sequences: SequenceState[jax.Array], num_speculative_tokens: int, _: Draws) -> Proposal:
        counts = jnp.zeros_like(sequences.lengths)
        shapes = Proposal(jnp.zeros((len(counts), num_speculative_tokens), jnp.int32), counts)
        return jax.pure_callback(self._propose, shapes, sequences.history, sequences.lengths, shapes.token_ids)

    def _propose(self, history: jax.Array, lengths: jax.Array, blank: jax.Array) -> Proposal:
        num_slots, most = blank.shape
        token_ids = self._random.integers(0, VOCAB, blank.shape, np.int32)
        for slot, (row, length) in enumerate(zip(np.asarray(history).tolist(), np.asarray(lengths), strict=True)):
            for text in self.texts:
                if length and text[:length] == row[:length] and self._random.random() < 0.95:
                    following = text[length : length + self._random.integers(most + 1)]
                    token_ids[slot, : len(following)] = following
        return Proposal(token_ids, self._random.integers(0, most + 1, num_slots, np.int32))


def make_engine(name: str, tokenizer: Path, **options: Any) -> Engine:
    """Its memory holds little more than two of the longest sequences."""
    config = EngineConfig(
        model=str(Golden(name).checkpoint), tokenizer=str(tokenizer), token_budget=16, max_num_seqs=4,
        max_model_len=MAX_LEN, block_size=BLOCK_SIZE, num_blocks=1 + 30, **options,
    )  # fmt: skip
    return Engine(config, show_progress=False)


def finish(engine: Engine, completions: dict[str, Completion]) -> None:
    while engine.has_unfinished():
        for delta in engine.step():
            completions[delta.request_id].add(delta)
        engine.blocks.check()
    assert engine.blocks.num_used == 0
    assert engine.compiles.count == 0


def serve(engine: Engine, prompts: list[list[int]], *params: SamplingParams) -> list[Completion]:
    """What comes of all prompts at once."""
    names = [str(next(numbers)) for _ in prompts]
    asked = [params[index % len(params)] for index in range(len(prompts))]
    completions = {n: Completion(n, p, a) for n, p, a in zip(names, prompts, asked, strict=True)}
    for name, completion in completions.items():
        engine.add_request(name, completion.prompt_token_ids, completion.params)
    finish(engine, completions)
    return list(completions.values())


def counted(engine: Engine, prompts: list[list[int]], *params: SamplingParams) -> tuple[list[Completion], int]:
    """The same, and the number of steps."""
    steps: list[StepRecord] = []
    engine.on_step.append(lambda record, _: steps.append(record))
    completions = serve(engine, prompts, *params)
    engine.on_step.pop()
    return completions, len(steps)


def outcome(completion: Completion) -> tuple[Any, ...]:
    output = completion.output(0)
    return output.text, output.token_ids, output.finish_reason, output.stop_reason


def logprobs_of(completions: list[Completion]) -> list[float]:
    entries = [entry for completion in completions for entry in completion.logprobs or ()]
    return [logprob.logprob for entry in entries for logprob in entry.values()]


def prompts_of(seed: int, number: int) -> list[list[int]]:
    """Some of them repeat themselves."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(3, VOCAB, random.integers(1, 30)).tolist() for _ in range(number)]
    return [prompt * 2 if index % 2 else prompt for index, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def plain(tiny_tokenizer: Path) -> Iterator[Callable[[str], Engine]]:
    """Engines without drafts, by model."""
    made: dict[str, Engine] = {}

    def get(name: str) -> Engine:
        if name not in made:
            made[name] = make_engine(name, tiny_tokenizer)
        return made[name]

    yield get
    for engine in made.values():
        engine.close()


class Pair(NamedTuple):
    """The same model without and with drafts."""

    plain: Engine
    speculating: Engine
    oracle: Oracle

    def check(self, prompts: list[list[int]], *params: SamplingParams) -> float:
        """That outputs are the same; the second one's steps by the first one's."""
        want, plain_steps = counted(self.plain, prompts, *params)
        self.oracle.texts = [[*one.prompt_token_ids, *one.token_ids] for one in want]
        got, steps = counted(self.speculating, prompts, *params)
        assert list(map(outcome, got)) == list(map(outcome, want))
        # Who is preempted, computes outputs again in chunks: they round differently.
        assert logprobs_of(got) == pytest.approx(logprobs_of(want), abs=1e-4)
        return steps / plain_steps


@pytest.fixture(
    scope="module",
    params=[("yi_gqa", 1), ("yi_gqa", 3), ("yi_gqa", 7), ("mistral_window", 7)],
    ids="{0[0]}-{0[1]}".format,
)
def pair(request: pytest.FixtureRequest, plain: Callable[[str], Engine], tiny_tokenizer: Path) -> Iterator[Pair]:
    (name, number), oracle = request.param, Oracle()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(speculation.PROPOSERS, "ngram", oracle)
        # Whether drafts pay is not to depend on how busy this machine is.
        patch.setattr(Profiler, "draft_times", lambda _: FLAT)
        engine = make_engine(name, tiny_tokenizer, speculative="ngram", num_speculative_tokens=number)
        yield Pair(plain(name), engine, oracle)
        engine.close()


sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.8]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 3),
    max_tokens=st.integers(1, 45),
    ignore_eos=st.just(True),
    stop=st.sampled_from([(), ("<7>",), (" <1", "<40> <")]),
    stop_token_ids=st.sampled_from([(), (11, 12, 13)]),
    logprobs=st.sampled_from([None, 0, 2]),
    allowed_token_ids=st.sampled_from([None, None, tuple(range(5, 20))]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    min_tokens=st.sampled_from([0, 0, 1]),
    bad_words=st.sampled_from([(), (), ("<9>",)]),
    num_speculative_tokens=st.sampled_from([None, None, None, 0, 2]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.lists(sampling, min_size=1, max_size=6), st.integers(1, 8))
def test_outputs_are_those_without_drafts(pair: Pair, seed: int, params: list[SamplingParams], number: int) -> None:
    """In company, preempted for want of blocks, with every kind of end."""
    pair.check(prompts_of(seed, number), *params)


def test_drafts_that_hold_spare_steps(pair: Pair) -> None:
    metrics, most = pair.speculating.metrics, pair.speculating.config.num_speculative_tokens

    def counts() -> np.ndarray:
        """Drafts, those that held, the same by place, and rows that gained nothing."""
        value, name = metrics.registry.get_sample_value, "jaxserve_spec_decode_num_accepted_tokens_per_pos_total"
        counters = metrics.draft_tokens, metrics.accepted_tokens, metrics.wasted_rows
        places = [value(name, {"position": str(place)}) or 0.0 for place in range(most)]
        return np.array([*(next(iter(c.collect())).samples[0].value for c in counters), *places])

    before = counts()
    share = pair.check(prompts_of(1, 1), GREEDY)
    drafted, held, wasted, *places = (counts() - before).tolist()
    assert share < (0.95 if most == 1 else 0.7)
    assert drafted > held > 0
    assert wasted >= drafted - held
    assert sum(places) == held
    assert places == sorted(places, reverse=True)


def test_every_place_of_a_run_may_be_the_end(pair: Pair) -> None:
    prompt = [5, 6, 7] * 3
    token_ids = serve(pair.plain, [prompt], GREEDY)[0].token_ids
    asked = [replace(GREEDY, max_tokens=1 + place, logprobs=1) for place in range(0, 40, 3)]
    for place in range(0, 40, 3):
        asked.append(replace(GREEDY, stop_token_ids=[token_ids[place]], min_tokens=place, logprobs=1))
        asked.append(replace(GREEDY, stop=f"<{token_ids[place]}>", logprobs=1))
    pair.check([prompt] * len(asked), *asked)


def test_a_request_may_be_as_long_as_the_model(pair: Pair) -> None:
    pair.check(prompts_of(2, 3), replace(GREEDY, max_tokens=None))


def test_an_aborted_request_leaves_nothing_behind(pair: Pair) -> None:
    prompts = prompts_of(3, 8)
    want = [completion.token_ids for completion in serve(pair.plain, prompts, GREEDY)]
    pair.oracle.texts = [[*prompt, *output] for prompt, output in zip(prompts, want, strict=True)]
    engine, names = pair.speculating, [str(next(numbers)) for _ in prompts]
    completions = {n: Completion(n, p, GREEDY) for n, p in zip(names, prompts, strict=True)}
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, prompt, GREEDY)
    for name in names[::2]:
        for _ in range(3):
            for delta in engine.step():
                completions[delta.request_id].add(delta)
        engine.abort(name)
    finish(engine, completions)
    for index, completion in enumerate(completions.values()):
        assert completion.token_ids == want[index][: len(completion.token_ids)]
        assert index % 2 == 0 or len(completion.token_ids) == 40


@pytest.mark.parametrize(
    ("tensor", "pipe", "speculative"), [(2, 1, "ngram"), (1, 2, "ngram"), (2, 2, "suffix")], ids=str
)
def test_several_devices(
    plain: Callable[[str], Engine],
    tiny_tokenizer: Path,
    tensor: int,
    pipe: int,
    speculative: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Preempted and aborted in every stage as well."""
    monkeypatch.setattr(Profiler, "draft_times", lambda _: FLAT)
    engine = make_engine(
        "yi_gqa", tiny_tokenizer, speculative=speculative, tensor_parallel=tensor, pipeline_parallel=pipe
    )
    pair = Pair(plain("yi_gqa"), engine, Oracle())
    sampled = replace(GREEDY, temperature=0.8, top_p=0.9, seed=1)
    forced = SamplingParams(temperature=0, max_tokens=40, structured_outputs={"regex": "(<5><6><7><8>){9}"})
    pair.check(prompts_of(4, 7), GREEDY, sampled, forced)
    want, prompt = serve(pair.plain, [[5, 6, 7] * 5], GREEDY)[0].token_ids, [5, 6, 7] * 5
    for num_steps in range(6, 10):
        completions = {name: Completion(name, prompt, GREEDY) for name in (str(next(numbers)) for _ in range(6))}
        for name in completions:
            engine.add_request(name, prompt, GREEDY)
        for _ in range(num_steps):
            for delta in engine.step():
                completions[delta.request_id].add(delta)
        for name in list(completions)[1:4]:
            engine.abort(name)
        finish(engine, completions)
        assert [len(c.token_ids) == 40 for c in completions.values()] == [True, False, False, False, True, True]
        assert all(c.token_ids == want[: len(c.token_ids)] for c in completions.values())
    metrics = engine.metrics
    assert metrics.registry.get_sample_value("jaxserve_num_preemptions_total")
    assert metrics.registry.get_sample_value("jaxserve_spec_decode_num_accepted_tokens_total")
    engine.close()


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=3, max_size=3))
@settings(deadline=None)
def test_ngrams(texts: list[list[int]]) -> None:
    """Against a search by hand: of the longest match of the last tokens, up to four and at least two, the latest."""
    history = np.zeros((len(texts), 24), np.int32)
    for slot, text in enumerate(texts):
        history[slot, : len(text)] = text
    lengths = np.array([len(text) for text in texts], np.int32)
    sequences = SequenceState(jnp.array(history), jnp.array(lengths), jnp.zeros_like(lengths))
    proposal = jit_ngrams(sequences, 5)
    for slot, text in enumerate(texts):
        found = [
            end
            for size in (4, 3, 2)
            for end in range(len(text) - 1, size - 1, -1)
            if text[end - size : end] == text[-size:]
        ]
        assert proposal.counts[slot] == (5 if found else 0)
        for drafted in proposal.token_ids[slot].tolist() if found else ():
            assert drafted == text[found[0]]
            text = [*text, drafted]
            found[0] += 1


def test_what_is_drawn_behind_probes() -> None:
    """Where all drafts held, where there were none, and where one did not hold."""
    texts, lengths = [[1, 2, 3, 7, 8, -1, -2], [1, 2, -1, -2], [1, 2, 9, -1]], np.array([3, 2, 2], np.int32)
    drawn = [[7, 8, 50, 51, 52], [40, 41, 42], [30, 31, 32]]
    history = np.zeros((3, 12), np.int32)
    for row, text in zip(history, texts, strict=True):
        row[: len(text)] = text
    slots, offsets = np.array([(slot, i) for slot, row in enumerate(drawn) for i in range(len(row))], np.int32).T
    positions = lengths[slots] + offsets
    given = slots, offsets, positions, history[slots, positions - 1], np.concatenate(drawn)
    draws = Draws(*map(jnp.asarray, given))
    drafted = np.array([4, 2, 2], np.int32)
    known, tokens = verify(SequenceState(*map(jnp.asarray, (history, lengths, drafted))), draws)
    assert tokens.tolist() == [7, 8, 50, ABSENT, ABSENT, 40, ABSENT, ABSENT, 30, REJECTED, ABSENT]
    proposal = probed(known, 4, draws)
    guesses = [ids[:n] for ids, n in zip(proposal.token_ids.tolist(), proposal.counts.tolist(), strict=True)]
    assert guesses == [[51, 52, -1, -2], [41, 42, -1, -2], [-1, -2]]


@pytest.mark.parametrize(("drafter", "most_share"), [("yi_gqa", 0.3), ("llama_gqa_tied", 1.1)])
def test_a_draft_model(
    plain: Callable[[str], Engine],
    tiny_tokenizer: Path,
    drafter: str,
    most_share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model's drafts for itself all hold, sampled ones too; those of another one's do not; outputs are the same."""
    monkeypatch.setattr(Profiler, "draft_times", lambda _: FLAT)
    monkeypatch.setattr(Profiler, "seconds_per_swapped_block", lambda _: 1e-9)
    engine = make_engine(
        "yi_gqa", tiny_tokenizer, speculative="draft", draft_model=str(Golden(drafter).checkpoint),
        swap_space_bytes=2**20,
    )  # fmt: skip
    pair = Pair(plain("yi_gqa"), engine, Oracle())
    sampled = replace(GREEDY, temperature=0.8, top_p=0.9, seed=5)
    # A prompt so short that its block has room for the keys of the first drafts as well.
    assert pair.check([[5]], GREEDY) < most_share
    assert pair.check([[5]], sampled) < most_share
    # Each has left the cache when it comes again, and comes back from the swap space.
    prompts = np.random.default_rng(8).integers(3, VOCAB, (4, 90)).tolist()
    for prompt in prompts * 2:
        pair.check([prompt], replace(GREEDY, max_tokens=6))
    assert engine.metrics.registry.get_sample_value("jaxserve_swapped_in_blocks_total")
    drafted, held = (next(iter(c.collect())).samples[0].value for c in
                     (engine.metrics.draft_tokens, engine.metrics.accepted_tokens))  # fmt: skip
    assert drafted > 0
    assert (held == drafted) == (drafter == "yi_gqa")
    pair.check(prompts_of(6, 6), GREEDY, sampled)
    engine.close()


def test_outputs_have_the_models_distribution() -> None:
    """Two tokens of 20,000 sequences, of a vocabulary of five: drafts of another distribution with the same noise hold
    about as often as the two allow, and what comes is what would have come."""
    num_seqs, vocab = 20_000, 5
    random = np.random.default_rng(1)
    first, after = random.normal(size=vocab), random.normal(size=(vocab, vocab))
    other = first + random.normal(size=vocab)
    slots, zeros = np.arange(num_seqs, dtype=np.int32), np.zeros(num_seqs, np.int32)

    def draw(logits: np.ndarray, position: int) -> np.ndarray:
        ones = jnp.ones(num_seqs)
        inputs = SamplingInputs(ones, ones, 0 * ones, jnp.array(zeros), jnp.array(slots), jnp.array(zeros + position))
        return np.asarray(jax.jit(sample)(jnp.array(np.broadcast_to(logits, (num_seqs, vocab)), jnp.float32), inputs))

    drafts = draw(other, 1)
    history = np.stack([zeros, drafts, zeros], axis=1)
    sequences = SequenceState(*map(jnp.array, (history, zeros + 1, zeros + 1)))
    drawn = np.stack([draw(first, 1), draw(after[drafts], 2)], axis=1).reshape(-1)
    offsets = np.tile(np.array([0, 1], np.int32), num_seqs)
    followed = np.stack([zeros, drafts], axis=1).reshape(-1)
    known, tokens = verify(
        sequences, Draws(*map(jnp.array, (np.repeat(slots, 2), offsets, 1 + offsets, followed, drawn)))
    )
    one, two = np.asarray(tokens).reshape(-1, 2).T
    held = two >= 0
    assert (np.asarray(known.lengths) == 2 + held).all()
    assert (two[~held] == REJECTED).all()
    assert (held == (drafts == one)).all()
    p, q = (np.exp(x) / np.exp(x).sum() for x in (first, other))
    distance = 0.5 * np.abs(p - q).sum()
    assert (1 - distance) / (1 + distance) - 0.02 < held.mean() <= 1 - distance + 0.02
    # Where the draft did not hold, the next step draws the second token.
    two = np.where(held, two, draw(after[one], 2))
    expected = p[:, None] * np.exp(after) / np.exp(after).sum(axis=1, keepdims=True)
    counts = np.bincount(one * vocab + two, minlength=vocab * vocab)
    assert chisquare(counts, num_seqs * expected.reshape(-1)).pvalue > 0.001


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative": "draft"}, "draft_model must be given with speculative draft .*got None with draft"),
        ({"draft_model": "x"}, "draft_model must be given with speculative draft .*got 'x' with off"),
        ({"speculative": "ppd"}, "ppd_probes must be given with speculative ppd .*got None with ppd"),
        ({"speculative": "ngram", "ppd_probes": "x"}, "ppd_probes must be given with .* ppd .*got 'x' with ngram"),
        ({"speculative": "medusa"}, "speculative must be one of off, ngram, suffix, draft, ppd, got 'medusa'"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be an integer of at least 1, got 0"),
        (
            {"suffix_decoding_max_cached_tokens": 0},
            "suffix_decoding_max_cached_tokens must be an integer of at least 1",
        ),
        (
            {"speculative": "draft", "draft_model": "x", "pipeline_parallel": 2},
            "pipeline_parallel must be 1 with a draft_model, which has no stages, got 2",
        ),
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)
