"""Pipeline parallelism on virtual devices: the same tokens as transformers, whatever is in flight."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.metrics import StepRecord
from jaxserve.engine.programs import StepPrograms
from jaxserve.errors import ConfigError, ModelError
from jaxserve.evaluation.compiled import collectives
from jaxserve.models.config import Experts, ModelConfig
from jaxserve.request import RequestDelta
from jaxserve.sampling_params import SamplingParams
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.pipeline import Stages
from tests.models.golden import Golden
from tests.sharding.test_tensor_parallel import LLAMA, serve


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def drain(engine: Engine) -> list[RequestDelta]:
    deltas = []
    while engine.has_unfinished():
        deltas += engine.step()
    engine.blocks.check()
    assert engine.blocks.num_used == 0
    assert engine.compiles.count == 0
    return deltas


CASES = [
    ("yi_gqa", 2, 1), ("yi_gqa", 2, 4), ("llama_mha_untied", 2, 2), ("mistral_window", 2, 1), ("mixtral_top2", 2, 2),
    ("gemma2_softcap", 2, 1), ("gemma3_local", 2, 1), ("gemma3_local", 2, 2), ("falcon_7b", 2, 2),
    ("gpt2_learned", 2, 1), ("smollm3_nope", 2, 1), ("llama4_experts", 2, 2), ("gpt_oss_sinks", 2, 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "pipe", "tensor"), CASES)
def test_families_give_the_tokens_of_transformers(name: str, pipe: int, tensor: int, tiny_tokenizer: Path) -> None:
    """Three requests that share nothing, in a cache that holds two as they start but not as they end: one is preempted
    in flight."""
    golden = Golden(name)
    config = EngineConfig(
        model=str(golden.checkpoint), tokenizer=str(tiny_tokenizer), pipeline_parallel=pipe, tensor_parallel=tensor,
        token_budget=16, max_num_seqs=3,
        max_model_len=golden.length + 1, block_size=8, num_blocks=1 + 2 * -(-(len(golden.prompt) + 5) // 8),
        enable_prefix_caching=False,
    )  # fmt: skip
    engine = Engine(config, show_progress=False)
    assert serve(engine, [golden.prompt] * 3, len(golden.greedy)) == [golden.greedy] * 3
    # A sequence in a window holds no more blocks as it ends than as it starts.
    windowed = engine.scheduler.limits.window is not None
    assert windowed != bool(engine.metrics.registry.get_sample_value("jaxserve_num_preemptions_total"))
    engine.close()


@pytest.fixture(scope="module")
def engine(tiny_tokenizer: Path) -> Engine:
    """Of two stages, idle before and after every test."""
    config = EngineConfig(
        model=str(Golden("yi_gqa").checkpoint), tokenizer=str(tiny_tokenizer), pipeline_parallel=2, token_budget=32,
        max_num_seqs=4, max_model_len=Golden("yi_gqa").length + 1, block_size=8,
    )  # fmt: skip
    return Engine(config, show_progress=False)


def test_aborts_in_every_stage(engine: Engine) -> None:
    """Blocks are free at once, and whoever gets them next is served right."""
    golden = Golden("yi_gqa")
    for num_steps in range(6):
        for index in range(4):
            engine.add_request(f"doomed-{index}", golden.prompt, greedy(len(golden.greedy)))
        for _ in range(num_steps):
            engine.step()
        for index in range(4):
            assert engine.abort(f"doomed-{index}")
        engine.blocks.check()
        assert engine.blocks.num_used == 0
        engine.add_request("next", golden.prompt, greedy(len(golden.greedy)))
        tokens = [token for delta in drain(engine) if delta.request_id == "next" for token in delta.token_ids]
        assert tokens == golden.greedy


def test_stop_tokens(engine: Engine) -> None:
    """What has entered the pipeline behind a stop is dropped."""
    golden = Golden("yi_gqa")
    stop = golden.greedy[2]
    want = golden.greedy[: golden.greedy.index(stop) + 1]
    params = SamplingParams(temperature=0, max_tokens=len(golden.greedy), stop_token_ids=[stop], ignore_eos=True)
    for index in range(3):
        engine.add_request(str(index), golden.prompt, params)
    deltas = drain(engine)
    for index in range(3):
        assert [t for d in deltas if d.request_id == str(index) for t in d.token_ids] == want


def test_sampling_and_logprobs(engine: Engine) -> None:
    """As without a pipeline: seeds, logprobs, and logprobs of the prompt, whose rows cross the stages in chunks."""
    golden = Golden("yi_gqa")
    config = dataclasses.replace(engine.config, pipeline_parallel=1)
    alone = Engine(EngineConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(EngineConfig)}),
                   show_progress=False)  # fmt: skip
    found = []
    for served in (engine, alone):
        params = SamplingParams(temperature=0.8, top_k=20, seed=3, max_tokens=8, logprobs=2, prompt_logprobs=2)
        for index, prompt in enumerate((golden.prompt, golden.prompt[:9], [5])):
            served.add_request(str(index), prompt, dataclasses.replace(params, seed=index))
        found.append(sorted(drain(served), key=lambda delta: delta.request_id))
    ours, theirs = found
    assert [(d.request_id, d.token_ids) for d in ours] == [(d.request_id, d.token_ids) for d in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        pairs = zip(mine.logprobs or (), other.logprobs or (), strict=True)
        prompts = zip((mine.prompt_logprobs or (None,))[1:], (other.prompt_logprobs or (None,))[1:], strict=True)
        for a, b in [*pairs, *prompts]:
            assert a is not None
            assert b is not None
            assert list(a) == list(b)
            assert [v.logprob for v in a.values()] == pytest.approx([v.logprob for v in b.values()], abs=1e-4)
    alone.close()


def test_bubbles_are_counted(engine: Engine) -> None:
    """One request cannot fill two stages: it waits for its token in every second tick. Two can."""
    for num_requests, entering in ((1, 1), (2, 2)):
        records: list[StepRecord] = []
        engine.on_step.append(lambda record, chunks, records=records: records.append(record))
        for index in range(num_requests):
            engine.add_request(str(index), [7] * 17, greedy(8))
        drain(engine)
        engine.on_step.pop()
        middle = records[6:12]
        assert [record.num_rows for record in middle] == [16] * 6
        assert [record.bubble_share for record in middle] == [1 - entering / 32] * 6
        assert sum(record.num_tokens for record in middle) == 3 * num_requests
    assert engine.metrics.registry.get_sample_value("jaxserve_pipeline_bubble_share_count")


def programs(model: ModelConfig, pipe: int, tensor: int = 1) -> StepPrograms:
    config = EngineConfig(
        token_budget=16, max_num_seqs=4, max_model_len=64, pipeline_parallel=pipe, tensor_parallel=tensor, num_blocks=20
    )
    return StepPrograms(config.resolve(model_max_len=64, on_gpu=False), model, make_mesh(tensor, pipe))


def test_a_tick_hands_rows_on_once() -> None:
    model = dataclasses.replace(LLAMA, num_layers=5)
    text = programs(model, 2).lower_forward(16).compile().as_text()
    moved = re.findall(r"= (\S+) collective-permute(?:-start)?\(", text)
    assert [shape.split("{")[0] for shape in moved] == [f"f32[16,{model.hidden_size}]"]
    found = collectives(text)
    assert found["all-reduce"] <= 2
    assert found["collective-permute"] == 1
    assert collectives(text, "run_layer") == {}


def test_a_device_holds_its_own_layers() -> None:
    made = programs(dataclasses.replace(LLAMA, num_layers=4), 2, tensor=2)
    qkv = made.abstract_parameters["layers.1.attention.qkv"]
    assert qkv.shape[0] == 2
    assert qkv.sharding.shard_shape(qkv.shape)[:2] == (1, 1)
    cache = made.abstract_state().cache
    pages, _, heads, _ = cache.k.sharding.shard_shape(cache.k.shape)
    assert (pages, heads) == (2 * 20, 1)


def test_layers_are_consecutive() -> None:
    stages = Stages(30, 4)
    held = [[stages.layer(s, slot) for slot in range(8) if s < stages.num_used(slot)] for s in range(4)]
    assert [len(layers) for layers in held] == [8, 8, 7, 7]
    assert [layer for layers in held for layer in layers] == list(range(30))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="pipeline_parallel must not exceed the model's 2 layers, got 3"):
        programs(LLAMA, 3)
    num_devices = len(jax.devices())
    with pytest.raises(
        ConfigError,
        match=rf"tensor_parallel \* pipeline_parallel must not exceed the {num_devices} devices, got 2 \* 32",
    ):
        make_mesh(2, 32)
    with pytest.raises(ConfigError, match="pipeline_parallel must be an integer of at least 1, got 0"):
        EngineConfig(pipeline_parallel=0)
    with pytest.raises(ConfigError, match=r"pipeline_parallel must be 1 for token_budget auto, .*, got 2"):
        EngineConfig(pipeline_parallel=2, token_budget="auto", slo_tbt_seconds=1.0)
    experts = Experts(count=4, per_token=2, intermediate_size=32, normalise=True, layers=(0, 2, 3))
    mixed = dataclasses.replace(LLAMA, num_layers=4, architecture="Qwen3MoeForCausalLM", experts=experts)
    with pytest.raises(
        ModelError, match=r"pipeline_parallel 2 puts layers 1 and 3 into the same place .* differ in mlp\.down"
    ):
        programs(mixed, 2)
