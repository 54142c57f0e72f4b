"""The host's benchmark, small."""

from __future__ import annotations

from jaxserve.config import EngineConfig
from jaxserve.evaluation.host_bench import measure_host


def test_every_part_is_measured() -> None:
    config = EngineConfig(token_budget=64, max_num_seqs=4, max_model_len=2048)
    results = measure_host(config, queues=(2, 20), num_rounds=2, num_steps=3)
    assert list(results) == [2, 20]
    for times in results.values():
        assert {len(seconds) for seconds in vars(times).values()} == {6}
        assert all(seconds > 0 for part in vars(times).values() for seconds in part)
        assert all(seconds >= plan for seconds, plan in zip(times.step, times.process, strict=True))
        assert set(times.row()) == {*vars(times), "schedule + pack", "step P99", "step max"}
