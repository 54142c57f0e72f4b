"""Probes are trained, and what they guess are drafts that change no output."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.engine.engine import Engine
from jaxserve.engine.profiling import Profiler
from jaxserve.errors import ConfigError, ModelError
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.loading.probes import read_probes, write_probes
from jaxserve.training.dense import DenseModel
from jaxserve.training.probes import ProbeTrainer, Text, batches
from tests.engine.test_speculation import FLAT, GREEDY, Oracle, Pair, make_engine, prompts_of, serve
from tests.models.golden import Golden

NUMBER = 2
PROMPT = [82, 62, 50, 28, 31, 6, 9, 4]
LONG = dataclasses.replace(GREEDY, max_tokens=80)


@pytest.fixture(scope="module")
def plain(tiny_tokenizer: Path) -> Iterator[Engine]:
    engine = make_engine("yi_gqa", tiny_tokenizer)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def trained(plain: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Probes that know one text, which a tiny model writes: what others they could learn of it are few."""
    (written,) = serve(plain, [PROMPT], LONG)
    text = Text([*PROMPT, *written.token_ids], len(PROMPT))
    checkpoint = open_checkpoint(str(Golden("yi_gqa").checkpoint))
    config = dataclasses.replace(checkpoint.config, num_probes=NUMBER)
    plan = list(batches([text], 1, epochs=150))
    trainer = ProbeTrainer(
        DenseModel(checkpoint, config, max_len=96), num_anchors=48, num_steps=len(plan), learning_rate=0.05
    )
    before = trainer.accuracy([text])
    losses = [trainer.step(batch) for batch in plan]
    after = trainer.accuracy([text])
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    for depth in range(1, 1 + NUMBER):
        assert after[depth][-1] > 1.3 * before[depth][-1]
    path = tmp_path_factory.mktemp("probes") / "probes.safetensors"
    write_probes(path, np.asarray(trainer.probes))
    return path


@pytest.mark.parametrize("options", [{}, {"pipeline_parallel": 2, "tensor_parallel": 2}], ids=["one", "TP2-PP2"])
def test_outputs_are_those_without(
    plain: Engine, trained: Path, tiny_tokenizer: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Profiler, "draft_times", lambda _: FLAT)
    engine = make_engine(
        "yi_gqa", tiny_tokenizer, speculative="ppd", ppd_probes=str(trained), num_speculative_tokens=NUMBER, **options
    )
    pair = Pair(plain, engine, Oracle())
    # A tick of a pipeline is a step, and a request's token takes as many as there are stages.
    assert pair.check([PROMPT], LONG) < engine.config.pipeline_parallel
    forced = dataclasses.replace(
        GREEDY, ignore_eos=False, structured_outputs={"regex": "(<5><6>){3}(<5>|<6>){1,9}<7><8>"}
    )
    edited = dataclasses.replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=2)
    sampled = dataclasses.replace(GREEDY, temperature=0.8, top_p=0.9, seed=1, max_tokens=None)
    pair.check(prompts_of(2, 8), GREEDY, sampled, forced, edited)
    value = engine.metrics.registry.get_sample_value
    drafted, held = (value(f"jaxserve_spec_decode_num_{name}_tokens_total") for name in ("draft", "accepted"))
    assert drafted
    assert held
    engine.close()


def test_a_probe_that_is_a_token() -> None:
    """The dense forward pass beside the engine's: a probe that is a token guesses what the model says behind it."""
    checkpoint = open_checkpoint(str(Golden("yi_gqa").checkpoint))
    golden = Golden("yi_gqa")
    model = DenseModel(checkpoint, dataclasses.replace(checkpoint.config, num_probes=1), max_len=golden.length)
    trainer = ProbeTrainer(model, num_anchors=1, num_steps=1)
    token_ids = [*golden.prompt, *golden.greedy]
    decoder = model.bind(model.parameters, trainer.probes)
    at = len(token_ids) - 2
    trainer.probes = decoder.embed(np.array([token_ids[at + 1]]), np.zeros(1, np.int32))
    assert trainer.accuracy([Text(token_ids, at)]) == {1: [1.0, 1.0, 1.0]}
    assert trainer.step([Text(token_ids, at)]) == pytest.approx(0, abs=1e-5)


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "probes.safetensors"
    write_probes(path, np.ones((3, 8)))
    assert read_probes(path, 2, 8).tolist() == np.ones((2, 8)).tolist()
    with pytest.raises(ConfigError, match=r"num_speculative_tokens must not exceed the 3 probes of .*, got 7"):
        read_probes(path, 7, 8)
    with pytest.raises(ConfigError, match=r"ppd_probes must hold probes of 9 numbers each, .* has \[3, 8\]"):
        read_probes(path, 3, 9)
    with pytest.raises(ModelError, match=r"none.safetensors: cannot be read"):
        read_probes(tmp_path / "none.safetensors", 1, 8)


@pytest.mark.parametrize("name", ["qwen3_5_hybrid", "deepseek_v3_groups", "gemma4_shared"])
def test_models_that_keep_something_else_are_refused(name: str) -> None:
    checkpoint = open_checkpoint(str(Golden(name).checkpoint))
    with pytest.raises(ModelError, match="probes are for models whose layers keep keys and values, all of one shape"):
        DenseModel(checkpoint, dataclasses.replace(checkpoint.config, num_probes=1), max_len=8)
