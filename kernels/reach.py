"""How far back the queries of a layer see."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Reach(NamedTuple):
    """Everything, a window, or the query's own chunk of the sequence; see kernels.attention.paged_attention."""

    window: int | None = None
    chunk: int | None = None

    @property
    def is_bounded(self) -> bool:
        return self.window is not None or self.chunk is not None

    def first_key(self, position: jax.Array) -> jax.Array:
        """The first key that a query at ``position`` sees, where the reach is bounded; may be negative."""
        if self.chunk is not None:
            # Not by //, which rounds down in several operations: positions are not negative.
            # A GPU's kernel takes a number for a number: an array that is one has no place in it.
            chunk = jnp.full_like(position, self.chunk) if position.ndim else np.int32(self.chunk)
            return jax.lax.div(position, chunk) * chunk
        assert self.window is not None
        return position - (self.window - 1)
