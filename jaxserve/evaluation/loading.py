"""Time and host memory that loading a checkpoint takes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.registry import family_of, read_config
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import abstract_model, abstract_parameters

SYNTHETIC: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 9, "num_attention_heads": 32, "num_key_value_heads": 8, "eos_token_id": 2,
}  # fmt: skip
"""Layers of Mistral-7B, as many as make 4 GiB in bfloat16."""


@dataclass(frozen=True)
class LoadResult:
    checkpoint_bytes: int
    largest_tensor_bytes: int
    seconds: float
    peak_host_bytes: int
    """Beyond what the process had before, and beyond the parameters where they lie in host memory themselves."""


def write_synthetic(folder: Path, raw: dict[str, Any] = SYNTHETIC) -> None:
    """A Hugging Face folder of random bfloat16 weights, a safetensors shard for each layer."""
    random = np.random.default_rng(0)
    shards: dict[str, dict[str, np.ndarray]] = {}
    for name, shape in _tensor_shapes(raw).items():
        values = random.integers(0x3C00, 0x3D00, size=shape, dtype=np.uint16).view(ml_dtypes.bfloat16)
        parts = name.split(".")
        shards.setdefault(f"layer-{parts[2]}" if "layers" in parts else "rest", {})[name] = values
    index: dict[str, str] = {}
    for shard, tensors in shards.items():
        save_file(tensors, folder / f"{shard}.safetensors")
        index |= dict.fromkeys(tensors, f"{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(raw))


def measure_load(folder: Path, *, tensor: int = 1) -> LoadResult:
    """Load the checkpoint in ``folder`` onto ``tensor`` devices."""
    checkpoint = open_checkpoint(str(folder))
    family = family_of(checkpoint.config.architecture)
    _, state = abstract_model(family.model, checkpoint.config, max_len=1, dtype=jnp.dtype("bfloat16"))
    mesh = make_mesh(tensor)
    abstract = abstract_parameters(state, mesh)
    weights = family.weights(checkpoint.config)
    start = time.perf_counter()
    with _peak_anonymous_bytes() as peak:
        parameters = checkpoint.load(abstract, weights)
    seconds = time.perf_counter() - start
    parameter_bytes = sum(array.nbytes for array in parameters.values())
    on_host = mesh.devices.flat[0].platform == "cpu"
    for array in parameters.values():
        array.delete()
    raw = json.loads((folder / "config.json").read_text())
    return LoadResult(
        checkpoint_bytes=parameter_bytes,
        largest_tensor_bytes=max(2 * int(np.prod(shape)) for shape in _tensor_shapes(raw).values()),
        seconds=seconds,
        peak_host_bytes=peak[0] - (parameter_bytes if on_host else 0),
    )


def _tensor_shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    config = read_config(raw)
    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    for i in range(config.num_layers):
        sizes = {"self_attn.q": (hidden, hidden), "self_attn.k": (kv, hidden), "self_attn.v": (kv, hidden)}
        sizes |= {"self_attn.o": (hidden, hidden), "mlp.gate": (inner, hidden), "mlp.up": (inner, hidden)}
        shapes |= {f"model.layers.{i}.{k}_proj.weight": s for k, s in (sizes | {"mlp.down": (hidden, inner)}).items()}
        shapes |= {f"model.layers.{i}.{k}_layernorm.weight": (hidden,) for k in ("input", "post_attention")}
    return shapes


@contextmanager
def _peak_anonymous_bytes(interval_seconds: float = 0.002) -> Iterator[list[int]]:
    """A list that holds the largest growth of the process's own memory, pages of mapped files not counted."""
    before, peak, done = _anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(interval_seconds):
            peak[0] = max(peak[0], _anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
    return kilobytes * 1024
