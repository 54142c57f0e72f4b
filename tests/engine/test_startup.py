"""The start by phase, programs compiled in the background, and starts without a warm-up. No test asserts on a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve import EngineConfig, SamplingParams
from jaxserve.engine.engine import Engine
from jaxserve.engine.programs import StepPrograms
from jaxserve.engine.runner import Kind, ModelRunner
from jaxserve.engine.startup import StartupTimes
from jaxserve.request import RequestDelta
from tests.models.golden import Golden

PROMPT = [5, 9, 33, 7, 21, 2]
PLAIN = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
SCORED = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=2)


def make(tiny_tokenizer: Path, **settings: Any) -> Engine:
    golden = Golden("llama_gqa_tied")
    sizes = {"max_model_len": golden.length, "max_num_seqs": 4, "block_size": 8, "token_budget": 32}
    config = {"model": str(golden.checkpoint), "tokenizer": str(tiny_tokenizer), **sizes, **settings}
    return Engine(EngineConfig(**config), show_progress=False)


def serve(engine: Engine, **requests: SamplingParams) -> dict[str, list[RequestDelta]]:
    """Deltas by request id, all requests with the same prompt."""
    for request_id, params in requests.items():
        engine.add_request(request_id, PROMPT, params)
    deltas: dict[str, list[RequestDelta]] = {request_id: [] for request_id in requests}
    while engine.has_unfinished():
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    return deltas


def tokens(deltas: list[RequestDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def metric(engine: Engine, name: str, **labels: str) -> float | None:
    return engine.metrics.registry.get_sample_value(f"jaxserve_{name}", labels)


def test_phases_add_up() -> None:
    """Weights may be loaded beside the compilation, so what both take together counts."""
    times = StartupTimes(
        2.0, weights_seconds=1.0, compile_seconds=4.0, loading_seconds=4.0, warm_up_seconds=0.5, total_seconds=7.25
    )
    assert times.phases == {"imports": 2.0, "weights": 1.0, "compile": 4.0, "warm_up": 0.5, "other": 0.75}
    assert str(times) == (
        "started in 7.2 s: imports 2.0, weights 1.0 and compile 4.0 (together 4.0), warm-up 0.5, other 0.8"
    )
    assert times._replace(loading_seconds=4.5).phases["other"] == 0.25


def test_an_engine_tells_how_it_started(tiny_tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "jaxserve"):
        engine = make(tiny_tokenizer)
    assert str(engine.startup) in caplog.messages
    assert engine.startup.imports_seconds == 0
    for phase, seconds in engine.startup.phases.items():
        assert metric(engine, "startup_seconds", phase=phase) == seconds
        assert seconds > 0 or phase == "imports"
    engine.close()


@pytest.fixture
def scores_go_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Programs for prompt logprobs are not compiled before it is set."""
    go_on, lower = threading.Event(), StepPrograms.lower_score

    def slow_lower(self: StepPrograms, rows: int) -> Any:
        go_on.wait()
        return lower(self, rows)

    monkeypatch.setattr(StepPrograms, "lower_score", slow_lower)
    yield go_on
    go_on.set()


def test_nobody_waits_for_rare_programs_but_who_needs_them(tiny_tokenizer: Path, scores_go_on: threading.Event) -> None:
    engine = make(tiny_tokenizer)
    engine.add_request("scored", PROMPT, SCORED)
    engine.add_request("impatient", PROMPT, SCORED)
    engine.step()
    assert metric(engine, "num_requests_waiting") == 2
    engine.add_request("plain", PROMPT, PLAIN)
    deltas: list[RequestDelta] = []
    while not deltas or deltas[-1].finish_reason is None:
        deltas += engine.step()
    assert {delta.request_id for delta in deltas} == {"plain"}
    assert engine.has_unfinished()
    engine.abort("impatient")
    assert [(delta.request_id, delta.finish_reason) for delta in engine.step()] == [("impatient", "abort")]

    scores_go_on.set()
    scored: list[RequestDelta] = []
    while engine.has_unfinished():
        scored += engine.step()
    assert tokens(scored) == tokens(deltas)
    assert scored[0].prompt_logprobs is not None
    assert [entry is None for entry in scored[0].prompt_logprobs] == [True] + [False] * (len(PROMPT) - 1)
    assert (engine.compiles.count, metric(engine, "num_requests_waiting")) == (0, 0)
    engine.close()


def test_nothing_compiles_for_prompt_logprobs_right_after_the_start(tiny_tokenizer: Path, tmp_path: Path) -> None:
    engine = make(tiny_tokenizer, compilation_cache=str(tmp_path))
    served = serve(engine, scored=SCORED, plain=PLAIN)
    assert tokens(served["scored"]) == tokens(served["plain"])
    assert engine.compiles.count == 0
    engine.close()


class NotesTaken:
    """What an engine's start does, in order, as it would on GPUs where ``graphs`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, graphs: bool) -> None:
        self.events: list[tuple[Any, ...]] = []
        monkeypatch.setattr(StepPrograms, "uses_graphs", graphs)
        names = [kind.name.lower() for kind in Kind]
        for name in (name for name in names if hasattr(StepPrograms, f"lower_{name}")):  # others are a draft model's
            self._watch(monkeypatch, StepPrograms, f"lower_{name}", lambda *size, name=name: (f"compile {name}", *size))
        self._watch(monkeypatch, StepPrograms, "load", lambda checkpoint: ("weights",))
        self._watch(monkeypatch, ModelRunner, "run", lambda kind, size, *array: (f"run {kind.name.lower()}", size))

    def _watch(
        self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, event: Callable[..., tuple[str | int, ...]]
    ) -> None:
        method = getattr(owner, name)

        def watched(mine: Any, *args: Any) -> Any:
            self.events.append(event(*args))
            return method(mine, *args)

        monkeypatch.setattr(owner, name, watched)

    def runs(self) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0].startswith("run")]


def test_programs_of_cuda_graphs_are_run_until_they_replay(
    tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first run goes op by op, a second captures. A program that is compiled later throws all graphs away."""
    notes = NotesTaken(monkeypatch, graphs=True)
    engine = make(tiny_tokenizer)
    buckets, runs = engine.runner.buckets, notes.runs()
    start, events = len(notes.events), notes.events
    assert events[0] == ("weights",)
    num_draws = {rows: min(rows, engine.config.max_num_seqs) for rows in buckets}
    compiled = {(f"compile {kind}", rows) for kind in ("forward", "score") for rows in buckets}
    samples = ("sample", "sample_edited")
    compiled |= {(f"compile {kind}", draws) for kind in samples for draws in num_draws.values()} | {("compile admit",)}
    assert set(events[1 : 1 + len(compiled)]) == compiled
    assert events[1 + len(compiled) :] == runs
    assert runs == [("run admit", 0)] * 3 + [
        run
        for rows in buckets
        for run in [
            ("run forward", rows),
            *((f"run {kind}", num_draws[rows]) for kind in samples),
            ("run score", rows),
        ]
        * 3
    ]
    assert engine.runner.has_rare()
    served = serve(engine, scored=SCORED, plain=PLAIN)
    assert tokens(served["scored"]) == tokens(served["plain"])
    assert {event.split()[0] for event, *_ in events[start:]} == {"run"}
    assert engine.compiles.count == 0
    engine.close()


def test_other_programs_are_run_once(
    tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, scores_go_on: threading.Event
) -> None:
    """On CPUs nobody's start waits for more; scores are compiled in the background."""
    notes = NotesTaken(monkeypatch, graphs=False)
    engine = make(tiny_tokenizer)
    num_draws = engine.config.max_num_seqs
    assert notes.runs() == [("run admit", 0)] + [
        run for rows in engine.runner.buckets for run in [("run forward", rows), ("run sample", min(rows, num_draws))]
    ]
    assert not engine.runner.has_rare()
    scores_go_on.set()
    assert engine.runner.has_rare(60.0)
    engine.close()


def test_without_a_warm_up(tiny_tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same tokens and logprobs, from programs that are compiled when they are needed, and counted."""
    warm, cold = make(tiny_tokenizer), make(tiny_tokenizer, warmup=False)
    assert "no warm-up: steps stall while programs compile at their first use; for development only" in caplog.messages
    assert (cold.startup.compile_seconds > 0, cold.startup.warm_up_seconds) == (True, 0)
    expected, served = (serve(engine, a=SCORED, b=PLAIN) for engine in (warm, cold))
    for request_id in ("a", "b"):
        assert tokens(served[request_id]) == tokens(expected[request_id])
    assert served["a"][0].prompt_logprobs == expected["a"][0].prompt_logprobs
    assert (warm.compiles.count, cold.compiles.count) == (0, 4), "one of each kind"
    assert metric(cold, "compiles_after_warmup") == 4
    serve(cold, c=PLAIN)
    assert cold.compiles.count == 4
    warm.close()
    cold.close()
