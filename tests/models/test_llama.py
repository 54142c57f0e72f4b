"""Logits of tiny random Llamas against transformers (tests/golden), whatever the chunking."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.engine.batch import StepLayout, pack, plan_of
from jaxserve.engine.blocks import BlockManager
from jaxserve.kernels.attention import AttentionInputs, KVCache
from jaxserve.kernels.plan import PlanLimits
from jaxserve.models.config import ModelConfig, ModelError, RopeScaling
from jaxserve.models.llama import Llama
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.rope import longest_sequence, rope_frequencies
from jaxserve.request import Request, RequestMetrics, SamplingParams
from jaxserve.scheduler import Chunk
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import abstract_model, abstract_parameters

CASES = sorted(path.name for path in (Path(__file__).parents[1] / "golden" / "tiny").glob("llama_*"))
PAGE_SIZE, NUM_PAGES = 8, 20


def golden(case: str) -> tuple[Path, np.ndarray, np.ndarray]:
    """Folder, token ids (prompt and greedy continuation), and the reference logits of each."""
    folder = Path(__file__).parents[1] / "golden" / "tiny" / case
    expected = np.load(folder / "expected.npz")
    return folder, np.concatenate([expected["input_ids"], expected["greedy_ids"]]), expected["logits"]


def load(folder: Path, length: int) -> Llama:
    checkpoint = open_checkpoint(str(folder))
    graph, state = abstract_model(Llama, checkpoint.config, max_len=length, dtype=jnp.dtype("float32"))
    abstract = abstract_parameters(state, make_mesh())
    loaded = checkpoint.load(abstract, Llama.weight_map(checkpoint.config))
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), [loaded[name] for name in abstract]))


@partial(jax.jit, static_argnums=0)
def run(layout: StepLayout, model: Llama, cache: KVCache, ints: jax.Array) -> tuple[jax.Array, KVCache]:
    fields = layout.split(ints)
    inputs = AttentionInputs(fields["kv_slots"], fields["block_tables"], plan_of(fields), NUM_PAGES)
    hidden, cache = model(fields["token_ids"], fields["positions"], cache, inputs)
    return model.logits(hidden), cache


def paged_logits(model: Llama, token_ids: list[int], chunk_sizes: list[int]) -> np.ndarray:
    """``float32[len(token_ids), vocab]`` of a sequence computed in chunks of the given sizes."""
    config = model.config
    shape = (config.num_layers * NUM_PAGES, PAGE_SIZE, config.num_kv_heads, config.head_dim)
    cache = KVCache(jnp.zeros(shape), jnp.zeros(shape))
    blocks = BlockManager(NUM_PAGES, PAGE_SIZE)
    blocks.grow("other", 17)  # so that pages are not simply 1, 2, 3
    request = Request("r", token_ids, SamplingParams(), 1, RequestMetrics(0.0), slot=1)
    start, rows = 0, []
    for size in chunk_sizes:
        blocks.grow("r", start + size)
        layout = StepLayout(PlanLimits(16 if size <= 16 else 64, 3, len(token_ids), PAGE_SIZE, NUM_PAGES))
        step = pack(layout, [Chunk(request, start, size, slot=1, samples=False)], blocks)
        logits, cache = run(layout, model, cache, step.ints)
        rows.append(np.asarray(logits)[:size])
        start += size
    return np.concatenate(rows)


@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers(case: str) -> None:
    folder, token_ids, expected = golden(case)
    length = len(token_ids)
    model = load(folder, length)
    assert np.abs(expected).max() > 1, "a reference this flat would prove little"
    for sizes in ([length], [5, 1, 16, length - 22], [1] * length):
        logits = paged_logits(model, token_ids.tolist(), sizes)
        assert np.abs(logits - expected).max() < 1e-3, sizes


def test_layers_share_one_trace() -> None:
    """Start-up depends on it: every layer but the first must hit the cache of the jitted layer."""
    config = open_checkpoint(str(golden(CASES[0])[0])).config
    model = Llama(config, max_len=64, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    graphs = {nnx.split(layer)[0] for layer in model.layers}
    assert len(model.layers) > 1
    assert len(graphs) == 1


def tiny_config(rope_scaling: RopeScaling | None) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=4, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1e4,
        rope_scaling=rope_scaling,
    )  # fmt: skip


def test_unknown_rope_kind_is_named() -> None:
    with pytest.raises(ModelError, match="'spiral' is not supported; supported: default, linear, dynamic"):
        rope_frequencies(tiny_config(RopeScaling(kind="spiral", options={})), 8)


@pytest.mark.parametrize(
    ("kind", "options", "tokens"),
    [
        ("linear", {"factor": 4.0}, 256),
        ("dynamic", {"factor": 2.0}, 128),
        ("yarn", {"factor": 8.0, "original_max_position_embeddings": 16}, 128),
        ("yarn", {"original_max_position_embeddings": 16}, 64),
        ("llama3", {"factor": 8.0}, 64),
        ("longrope", {}, 64),
    ],
)
def test_longest_sequence(kind: str, options: dict, tokens: int) -> None:
    assert longest_sequence(tiny_config(None)) == 64
    assert longest_sequence(tiny_config(RopeScaling(kind=kind, options=options))) == tokens
