"""bench.py sharing on a tiny model: what it measures is what it says, and engines are left as they were."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from jaxserve.engine.engine import Engine
from jaxserve.evaluation.sharing import (
    Asked,
    FloorRound,
    forced,
    measure_fairness,
    measure_floor,
    measure_grammars,
    measure_prefixes,
    run,
)
from jaxserve.evaluation.sharing_report import SharingConfig, prefixes
from jaxserve.evaluation.tiny_model import tiny_config, write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    engine = Engine(tiny_config(folder, 8), show_progress=False)
    yield engine
    engine.close()


@pytest.fixture
def engine(tiny: Engine) -> Iterator[Engine]:
    yield tiny
    assert not tiny.has_unfinished()
    assert tiny.blocks.num_used == 0


def test_requests_come_when_they_should_and_what_is_beside_them_is_aborted(engine: Engine) -> None:
    asked = [Asked([5, 6, 7], forced(3)), Asked([5, 6, 7], forced(2), 0.3, "b")]
    beside = [Asked([9], forced(1000))]
    assert run(engine, asked, beside) >= 0.3
    assert [len(one.metrics.token_seconds) for one in asked] == [3, 2]
    assert asked[1].metrics.arrival_seconds - asked[0].metrics.arrival_seconds == pytest.approx(0.3)
    assert 3 < len(beside[0].metrics.token_seconds) < 1000


def test_grammars(engine: Engine) -> None:
    found = measure_grammars(engine, streams=4, output_tokens=8)
    assert all(value > 0 for value in vars(found).values())


def test_fairness(engine: Engine) -> None:
    found = measure_fairness(engine, long_tokens=200, short_tokens=5, num_short=4, gap_seconds=0.01)
    assert len(found.alone_seconds) == len(found.beside_seconds) == 4
    assert min(found.alone_seconds) > 0


def test_floor(engine: Engine) -> None:
    found = measure_floor(engine, prompt_tokens=300, seed=9)
    assert len(found.step_seconds) >= 300 // 15, "fifteen rows of sixteen are the prompt's"
    assert found.beside_tbt_seconds.sum() >= 0.5 * found.prompt_ttft_seconds


def test_what_the_room_is_shared_among() -> None:
    found = FloorRound(0.1, np.array([0.3]), 1.0, np.array([0.2, 0.4]))
    assert found.share_of_room(0.5) == pytest.approx(0.5)


def test_prefixes(engine: Engine) -> None:
    """Whichever is first, the first figure is that of the engine with the cache: here both have one."""
    for seed in (0, 1):
        found = measure_prefixes(engine, engine, prompt_tokens=100, turns=2, seed=seed)
        assert len(found.turns[0]) == 2
        assert found.no_hit[0] > 0


def test_the_table_of_prefixes(engine: Engine) -> None:
    config = replace(engine.config, token_budget=16, max_num_seqs=8, num_blocks=None)
    rows = prefixes(config, SharingConfig(rounds=1, prompt_tokens=120, turns=2))
    assert [row["what"] for row in rows][1:] == [
        "second prompt of 120 tokens, TTFT",
        "16 that share 80 tokens, last TTFT",
        "turn 1 of a chat, TTFT",
        "turn 2 of a chat, TTFT",
    ]
