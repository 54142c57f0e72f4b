"""Runs a checkpoint of tests/golden through the model, in chunks of any size, and compares it with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.engine.forward import SequenceState, rows_of, segments_for
from jaxserve.engine.step import Packer, StepLayout, plan_of
from jaxserve.kernels import native
from jaxserve.kernels.backend import CPU_TILING, Backend, Target
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.cpu_attention import Native
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.kernels.plan import PlanLimits
from jaxserve.kernels.xla import Xla
from jaxserve.models.decoder import Decoder
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.matrix import DenseMatrix, layouts_of, taken
from jaxserve.models.memory import cache_shape
from jaxserve.models.registry import family_of
from jaxserve.request import Request, RequestMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Chunk
from jaxserve.scheduler.blocks import BlockManager
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import abstract_model, abstract_parameters

SAME_AS = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Gemma4ForConditionalGeneration": "Gemma4ForCausalLM",
    "Gemma4UnifiedForConditionalGeneration": "Gemma4ForCausalLM",
    "KimiK25ForConditionalGeneration": "DeepseekV3ForCausalLM",
    "Llama4ForConditionalGeneration": "Llama4ForCausalLM",
    "Mistral3ForConditionalGeneration": "Ministral3ForCausalLM",
    "Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
}
"""Architectures without a reference of their own: another's names, or the text of models that can see."""
FOLDER = Path(__file__).parents[1] / "golden"
PAGE_SIZE, NUM_PAGES, NUM_ROWS = 8, 20, 64
XLA = Xla(CPU_TILING, Target("cpu"))
SOONEST = Native(CPU_TILING, Target("cpu")) if native.available() else XLA
"""Compiling is most of what a golden costs, and there is least of it where attention is one call."""


class Golden:
    """A tiny checkpoint and what transformers makes of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        path = FOLDER / "tiny" / name
        self.checkpoint = FOLDER / "gguf" / f"{name}.gguf" if not path.is_dir() else path
        expected = np.load(path / "expected.npz" if path.is_dir() else FOLDER / "gguf" / f"{name}.npz")
        self.prompt: list[int] = expected["input_ids"].tolist()
        self.greedy: list[int] = expected["greedy_ids"].tolist()
        self.logits: np.ndarray = expected["logits"]
        """``float32[prompt and greedy tokens, vocab]``"""
        self.length = len(self.prompt) + len(self.greedy)

    @property
    def architecture(self) -> str:
        return open_checkpoint(str(self.checkpoint)).config.architecture

    def chunkings(self) -> dict[str, list[int]]:
        """Ways to cut prompt and continuation into steps."""
        return {
            "one chunk": [self.length],
            "chunks": [5, 1, 16, self.length - 22],
            "token by token": [1] * self.length,
        }

    def load(self) -> Decoder:
        return load(self.checkpoint, max_len=self.length)

    def compare(self, model: Decoder, chunk_sizes: Sequence[int], backend: Backend = SOONEST) -> tuple[float, bool]:
        """Largest absolute difference of any logit, and whether greedy sampling gives the same continuation."""
        logits = paged_logits(model, self.prompt + self.greedy, chunk_sizes, backend)
        sampled = logits[len(self.prompt) - 1 : -1].argmax(axis=-1).tolist()
        return float(np.abs(logits - self.logits).max()), sampled == self.greedy


def names() -> list[str]:
    """All cases, folders and GGUF files."""
    folders = [path.name for path in (FOLDER / "tiny").iterdir()]
    return sorted(folders) + sorted(path.stem for path in (FOLDER / "gguf").glob("*.gguf"))


def load(path: Path, max_len: int, tensor: int = 1, codes: bool = False) -> Decoder:
    """codes: with quantised matrices as such."""
    checkpoint = open_checkpoint(str(path))
    family = family_of(checkpoint.config.architecture)
    graph, state = abstract_model(family.model, checkpoint.config, max_len=max_len, dtype=jnp.dtype("float32"))
    abstract, weights = abstract_parameters(state, make_mesh(tensor)), family.weights(checkpoint.config)
    layouts = layouts_of(state)
    planned = checkpoint.planned_codes(abstract, weights, layouts) if codes else {}
    dense = {name: spec for name, spec in abstract.items() if name not in planned}
    parameters = taken(checkpoint.load(dense, weights), layouts, DenseMatrix)
    parameters |= dict(checkpoint.load_codes(planned, weights)) if planned else {}
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), [parameters[name] for name in abstract]))


@partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_llvm_disable_expensive_passes": True})
def _run(
    layout: StepLayout, backend: Backend, model: Decoder, cache: KVCache, history: jax.Array, ints: jax.Array
) -> tuple[jax.Array, KVCache]:
    fields = layout.split(ints)
    lengths = jnp.full(len(history), history.shape[1], jnp.int32)
    rows = rows_of(fields, SequenceState(history, lengths), PAGE_SIZE)
    segments = segments_for(model.config, layout, fields["row_seqs"], rows)
    inputs = AttentionInputs(
        rows.kv_slots, fields["block_tables"], plan_of(fields), layout.limits, backend, mesh=None, segments=segments
    )
    hidden, cache = model(rows.token_ids, rows.positions, None, cache, inputs)
    return model.logits(hidden), cache


def paged_logits(
    model: Decoder, token_ids: list[int], chunk_sizes: Sequence[int], backend: Backend = SOONEST
) -> np.ndarray:
    """``float32[len(token_ids), vocab]`` of a sequence computed in chunks of the given sizes."""
    config = model.config
    dtype = jnp.dtype("float32")
    kept = config.by_memory(range(config.num_layers))
    shape = cache_shape(config, kept, page_size=PAGE_SIZE, num_slots=3, dtype=dtype, cache_dtype=dtype)
    # Placed like the weights: otherwise the first step would be compiled for itself.
    cache = jax.device_put(shape.zeros(NUM_PAGES, make_mesh()), jax.devices()[0])
    blocks = BlockManager(NUM_PAGES, PAGE_SIZE, 3, max(len(token_ids), 17))
    blocks.grow(0, 17)  # so that pages are not simply 1, 2, 3
    packer = Packer(blocks)
    request = Request("r", token_ids, SamplingParams(), 1, RequestMetrics(0.0), slot=1)
    history = np.zeros((3, len(token_ids)), np.int32)
    history[1] = token_ids
    start, rows = 0, []
    for size in chunk_sizes:
        if config.window is not None:
            blocks.release_before(1, start - config.window + 1)
        blocks.grow(1, start + size)
        limits = PlanLimits(NUM_ROWS, 3, len(token_ids), PAGE_SIZE, NUM_PAGES, CPU_TILING, config.window)
        layout = StepLayout(limits)
        step = packer.pack(layout, [Chunk(request, start, size, slot=1, samples=False)])
        logits, cache = _run(layout, backend, model, cache, history, step.ints)
        rows.append(np.asarray(logits)[:size])
        start += size
    return np.concatenate(rows)
