"""How many KV blocks a device's memory holds."""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxserve.config import ConfigError, ResolvedConfig
from jaxserve.models.config import ModelConfig

CPU_KV_CACHE_BYTES = 2**30
"""What the KV cache takes on a CPU when num_blocks is not given."""


def choose_num_blocks(
    config: ResolvedConfig,
    model: ModelConfig,
    mesh: Mesh,
    num_cache_layers: int,
    cache_dtype: jnp.dtype,
    parameters: Iterable[jax.ShapeDtypeStruct],
    gpu_memory_bytes: int | None = None,
) -> int:
    """What the memory holds besides the parameters, at most what all sequences can use. Raises ConfigError.

    num_cache_layers: of all devices of the mesh's axis ``pipe`` together.
    gpu_memory_bytes: of each GPU of the mesh; asked of its first one by default.
    """
    values_per_block = 2 * num_cache_layers * config.block_size * model.num_held_kv_heads * model.head_dim
    per_block_bytes = values_per_block * cache_dtype.itemsize
    blocks_per_seq = config.blocks_per_seq
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        memory_bytes = max(CPU_KV_CACHE_BYTES, (1 + blocks_per_seq) * per_block_bytes)
    else:
        weight_bytes = sum(math.prod(p.sharding.shard_shape(p.shape)) * p.dtype.itemsize for p in parameters)
        gpu_memory_bytes = gpu_memory_bytes or device.memory_stats()["bytes_limit"]
        memory_bytes = (int(gpu_memory_bytes * config.gpu_memory_utilization) - weight_bytes) * mesh.size
    num_blocks = min(memory_bytes // per_block_bytes, 1 + config.max_num_seqs * blocks_per_seq)
    if jax.process_count() > 1:  # hosts may have different memory left
        num_blocks = int(multihost_utils.process_allgather(np.int32(num_blocks)).min())
    if num_blocks < 1 + blocks_per_seq:
        raise ConfigError(
            f"max_model_len {config.max_model_len} needs {(1 + blocks_per_seq) * per_block_bytes} bytes of KV cache, "
            f"the device has {memory_bytes} left"
        )
    return num_blocks
