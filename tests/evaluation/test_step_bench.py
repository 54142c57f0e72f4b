"""Whole steps beside their roofline, on a tiny model; no test asserts on a time."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.programs import StepPrograms
from jaxserve.errors import ConfigError
from jaxserve.evaluation.device_bench import Ceilings, Effort
from jaxserve.evaluation.step_bench import StepBench, StepCase, step_cases, step_work, why_not
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.sharding.mesh import make_mesh

BENCH = Path(__file__).parents[2] / "scripts" / "bench.py"
BFLOAT16 = jnp.dtype("bfloat16")
H100 = Ceilings(3.0e12, 798e12)
TINY = {
    "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "eos_token_id": 2,
}  # fmt: skip


def work_of(model: str, spans: list[tuple[int, int]]):
    config = open_checkpoint(model, "dummy").config
    settings = EngineConfig(model=model, load_format="dummy", dtype="bfloat16", max_model_len=64, num_blocks=8)
    resolved = settings.resolve(model_max_len=64, on_gpu=False)
    parameters = StepPrograms(resolved, config, make_mesh()).abstract_parameters
    return step_work(config, parameters, spans, BFLOAT16)


def test_the_work_of_mistral_7b() -> None:
    """By hand: 7.24e9 parameters less 131e6 of the embedding; 131,072 bytes of keys and values a token."""
    weights = 7_241_732_096 - 32000 * 4096 - 4096
    decodes = work_of("mistral-7b", [(1023, 1)] * 32)
    assert decodes.num_bytes == 2 * weights + 32 * 1024 * 131_072
    head = 32000 * 4096
    norms = 65 * 4096
    attention = 4 * 32 * 1024 * 4096 * 32
    assert decodes.flops == 2 * 32 * (weights - norms + 4096) + attention
    assert decodes.floor_seconds(H100) == pytest.approx(6.17e-3, rel=0.01)
    chunk = work_of("mistral-7b", [(0, 2048)])
    assert chunk.flops == 2 * 2048 * (weights - norms + 4096 - head) + 2 * head + 4 * 2048 * 2049 // 2 * 4096 * 32
    # The window of 4096 tokens: the last row sees that many, the chunk 4096 - 1 + its own.
    far = work_of("mistral-7b", [(20_000, 1)])
    assert far.num_bytes - 2 * weights == 4096 * 131_072
    far = work_of("mistral-7b", [(20_000, 100)])
    assert far.num_bytes - 2 * weights == 4195 * 131_072


def test_experts_are_read_as_far_as_rows_choose_them(tmp_path: Path) -> None:
    raw = TINY | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    one, many = (work_of(str(tmp_path), [(0, 1)] * rows) for rows in (1, 16))
    experts = 2 * 4 * 3 * 32 * 64
    cached = 2 * 2 * 2 * 8 * 2
    assert many.num_bytes - one.num_bytes == pytest.approx(2 * experts * (0.5 - 0.5**16) + 15 * cached)
    assert many.flops == 16 * one.flops


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"architectures": ["LlamaForCausalLM"]}))
    return str(tmp_path)


def test_what_the_engine_cannot_run_is_left_out(tiny: str) -> None:
    config = EngineConfig(
        model=tiny, load_format="dummy", max_num_seqs=4, token_budget=64, max_model_len=512, block_size=16,
        num_blocks=40,
    )  # fmt: skip
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    bench = StepBench(config, Effort(1, 0.0, 0.0), buckets=[64, 16])
    assert why_not(StepCase("", ((100, 1),) * 4), bench.runner) is None
    reason = why_not(StepCase("", ((200, 20),) * 5), bench.runner)
    assert reason == "needs max_num_seqs of 5, got 4 and token_budget of 100, got 64 and num_blocks of 71, got 40"
    assert why_not(StepCase("", ((0, 20),)), bench.runner) == "the program of 32 rows was not compiled"
    row = bench.measure(StepCase("", ((100, 1),) * 3))
    assert (row.num_rows, row.launches) == (16, None)
    assert row.seconds.median > 0
    hits.clear()
    assert bench.measure(StepCase("", ((0, 20),))).num_rows == 64, "32 was left out"
    assert "/jax/compilation_cache/cache_hits" in hits, "compiled before the engine was there"
    bench.engine.close()
    with pytest.raises(ConfigError, match="buckets must be of 16, 32, 64, the last among them, got 16, 32"):
        StepBench(config, buckets=[16, 32])


def test_steps_from_flags_to_files(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(BENCH))
    flags = ["--model", tiny, "--load-format", "dummy", "--quick", "--output-dir", str(tmp_path),
             "--max-num-seqs", "32", "--token-budget", "64", "--max-model-len", "1024", "--requests", "4",
             "--prompt-tokens", "8", "--output-tokens", "4"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["bench.py", "step", *flags])
    assert script["main"]() == 0
    raw = json.loads((tmp_path / "step-cpu.json").read_text())
    assert [row["step"] for row in raw["rows"]] == ["decode 1 x 1024", "decode 32 x 1024"]
    assert set(raw["left_out"]) == {case.name for case in step_cases()} - {row["step"] for row in raw["rows"]}
    assert all(row["floor_seconds"] > 0 for row in raw["rows"])
    assert raw["under_load"]["num_steps"] >= 4
    page = (tmp_path / "step-cpu.md").read_text()
    assert "- decode 128 x 1024: not measured, needs max_num_seqs of 128, got 32" in page
