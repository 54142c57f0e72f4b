"""What an engine takes of a device's memory, and how many KV blocks that holds."""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import xla_bridge  # nothing public tells whether jax has taken its memory
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxserve.config import AUTO_TOKEN_BUDGET, ResolvedConfig
from jaxserve.engine.gpus import check_gpu_is_free
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig

logger = logging.getLogger(__name__)

CPU_KV_CACHE_BYTES = 2**30
"""What the KV cache takes on a CPU when num_blocks is not given."""
FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Where jax reads which share of a GPU's memory to take, all at once, when it first needs a device."""
DEFAULT_FRACTION = 0.75
"""Jax's own."""
ENGINE_FRACTION = 0.92
"""Beside it CUDA has its context, graphs, kernels and what collectives take."""
STEP_BYTES = 2**28
"""What steps need besides logits and activations: inputs and outputs of those in flight, partial results."""
CPU_TOKEN_BUDGET = 512
"""Rows of larger steps cost a CPU as much (docs/results/capacity.md), and would be more programs to compile."""
STEP_SHARE = 0.1
"""Of the memory, for what is not weights or KV cache, where the token budget is ours to choose."""
KV_CACHE_STEP_BYTES = 2**28
"""The cache's size is a multiple, so that a few bytes more in use do not make other programs, not compiled yet."""
GIB = 2**30


def return_freed_memory() -> None:
    """Give the system back what the C library keeps of freed memory: after weights are loaded or programs compiled, by
    threads that each have a heap of their own, that is gigabytes. Nothing happens where the library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def claim_gpu_memory(gpu_memory_utilization: float) -> None:
    """Let jax take as much of the GPUs as engines use. The user's own choice stays, and jax's where it has taken it.

    Raises ConfigError for a GPU that others have taken.
    """
    if not xla_bridge.backends_are_initialized() and not any(map(os.environ.get, FRACTION_VARIABLES)):
        check_gpu_is_free(gpu_memory_utilization)
        os.environ[FRACTION_VARIABLES[0]] = str(max(ENGINE_FRACTION, gpu_memory_utilization))


def usable_gpu_bytes(bytes_limit: int, bytes_in_use: int, gpu_memory_utilization: float) -> int:
    """Of a GPU of whose memory jax takes ``bytes_limit``. Says so where that is less than the engine would use."""
    fraction = float(next(filter(None, map(os.environ.get, FRACTION_VARIABLES)), DEFAULT_FRACTION))
    wanted = int(bytes_limit / fraction * gpu_memory_utilization)
    if bytes_limit < wanted:
        logger.warning(
            "%.1f GiB of each GPU stay unused: jax takes %.0f %% of its memory, which was settled before the engine "
            "could ask for more. Make the engine before jax is first used, or set %s=%g",
            (wanted - bytes_limit) / GIB, 100 * fraction, FRACTION_VARIABLES[0],
            max(ENGINE_FRACTION, gpu_memory_utilization),
        )  # fmt: skip
    return min(wanted, bytes_limit - bytes_in_use)


def working_bytes(config: ResolvedConfig, model: ModelConfig) -> int:
    """The most that a program needs of a device besides parameters and KV cache: bounds of what XLA has been seen to
    take for full-size models (tests/engine/test_aot.py)."""
    share, itemsize = model.tensor_parallel, jnp.dtype(config.dtype).itemsize
    rows = config.token_budget
    wide = max(model.hidden_size, model.num_heads * model.head_dim // share)
    activations = rows * (4 * wide + max(3 * model.widest_mlp // share, _mixed(model))) * itemsize
    # Logits of a step's samples in five forms (see sampler.py), or of all its rows in three where prompts are scored.
    logits = max(5 * (config.max_num_seqs + config.max_drafts), 3 * rows) * model.vocab_size // share * 4
    history = 4 * config.max_num_seqs * config.max_model_len
    return activations + logits + history + STEP_BYTES


def _mixed(model: ModelConfig) -> int:
    """What a mixture has of a row at most, in values: of each expert that it chooses the inner ones, before and after
    their gate, and what the expert makes."""
    experts = model.experts
    if experts is None:
        return 0
    share = 1 if model.expert_parallel else model.tensor_parallel
    return experts.per_token * (3 * experts.intermediate_size // share + model.hidden_size)


def budget_in_memory(
    config: ResolvedConfig, model: ModelConfig, memory_bytes: int, most: int = AUTO_TOKEN_BUDGET
) -> int:
    """The largest of the budget and its halves, at ``most`` so much, whose steps need at most ``STEP_SHARE`` of a
    device's memory; all decodes fit in it."""
    budget = min(config.token_budget, max(most, config.max_num_seqs))
    while budget // 2 >= config.max_num_seqs:
        if working_bytes(replace(config, token_budget=budget), model) <= STEP_SHARE * memory_bytes:
            break
        budget //= 2
    return budget


def budget_on_device(config: ResolvedConfig, model: ModelConfig) -> int:
    """As ``budget_in_memory``, of the first device's memory as far as jax may take it, or of the machine's."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return budget_in_memory(config, model, machine_bytes, CPU_TOKEN_BUDGET)
    return budget_in_memory(config, model, int(device.memory_stats()["bytes_limit"]))


def choose_num_blocks(
    config: ResolvedConfig,
    model: ModelConfig,
    mesh: Mesh,
    block_bytes: int,
    parameters: Iterable[jax.ShapeDtypeStruct],
    gpu_memory_bytes: int | None = None,
) -> int:
    """What the memory holds besides the parameters, at most what all sequences can use. Raises ConfigError.

    block_bytes: of a block of the KV cache, on all devices of the mesh together.
    gpu_memory_bytes: that each GPU of the mesh has for the engine; found out from its first one by default.
    """
    blocks_per_seq = config.blocks_per_seq
    device, in_use_bytes = mesh.local_devices[0], 0
    if device.platform == "cpu":
        memory_bytes = max(CPU_KV_CACHE_BYTES, (1 + blocks_per_seq) * block_bytes)
    else:
        if gpu_memory_bytes is None:
            stats = device.memory_stats()
            in_use_bytes = stats["bytes_in_use"]
            gpu_memory_bytes = usable_gpu_bytes(stats["bytes_limit"], in_use_bytes, config.gpu_memory_utilization)
        weight_bytes = sum(math.prod(p.sharding.shard_shape(p.shape)) * p.dtype.itemsize for p in parameters)
        cache_bytes = gpu_memory_bytes - weight_bytes - working_bytes(config, model)
        memory_bytes = max(0, cache_bytes // KV_CACHE_STEP_BYTES * KV_CACHE_STEP_BYTES) * mesh.size
    num_blocks = min(memory_bytes // block_bytes, 1 + config.max_num_seqs * blocks_per_seq)
    if jax.process_count() > 1:  # hosts may have different memory left
        num_blocks = int(multihost_utils.process_allgather(np.int32(num_blocks)).min())
    if num_blocks < 1 + blocks_per_seq:
        raise ConfigError(
            f"max_model_len {config.max_model_len} needs {(1 + blocks_per_seq) * block_bytes} bytes of KV cache, "
            f"the device has {memory_bytes} left"
            + (
                f"; this process has {in_use_bytes / GIB:.1f} GiB of it: is there another LLM to close?"
                if in_use_bytes > GIB
                else ""
            )
        )
    return num_blocks
