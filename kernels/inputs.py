"""What attention takes besides queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxserve.kernels.backend import Backend
from jaxserve.kernels.plan import AttentionPlan, PlanLimits
from jaxserve.kernels.recurrent import Segments

Rotation = tuple[jax.Array, jax.Array] | None
"""cos and sin ``float32[T, rotated dims / 2]`` of the rows' positions; None for models without rotary embeddings."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionInputs:
    """What attention needs to know of a step, shared by all layers."""

    slots: jax.Array
    """``int32[T]``: where a row's key and value go, page * page_size + offset."""
    block_tables: jax.Array
    """``int32[max_num_seqs, pages of max_model_len]``: the pages of each sequence, 0 where it has none."""
    plan: AttentionPlan[jax.Array]
    """Made for ``limits``."""
    limits: PlanLimits = field(metadata={"static": True})
    """Whose tiling is the backend's."""
    backend: Backend = field(metadata={"static": True})
    mesh: Mesh | AbstractMesh | None = field(metadata={"static": True})
    """Its axis ``tensor`` divides the heads; None: there is one device."""
    segments: Segments | None = None
    """The rows as layers take them whose memory of a sequence does not grow, where there are any."""
