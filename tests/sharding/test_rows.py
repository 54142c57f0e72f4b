"""Logits that come divided by the vocabulary, and rows that every device works on alone."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.engine.sampler import SamplingInputs, sample
from jaxserve.evaluation.compiled import collectives
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rows import over_rows


@pytest.mark.parametrize(("num_rows", "tensor", "pipe"), [(6, 4, 1), (16, 1, 3), (16, 2, 4)])
def test_rows_are_sampled_as_on_one_device(num_rows: int, tensor: int, pipe: int) -> None:
    """Also where they do not divide over the devices."""
    mesh, rng = make_mesh(tensor, pipe), np.random.default_rng(num_rows)
    logits = jnp.array(rng.normal(size=(num_rows, 64)), jnp.float32)
    row = jnp.arange(num_rows)
    inputs = SamplingInputs(
        0.5 + row / 8, 1 - row / 32, jnp.full(num_rows, 1e-3), row % 5, row.astype(jnp.int32), row.astype(jnp.int32)
    )
    lowered = jax.jit(partial(over_rows, sample, mesh)).lower(
        jax.ShapeDtypeStruct(logits.shape, logits.dtype, sharding=NamedSharding(mesh, PartitionSpec(None, "tensor"))),
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())), inputs
        ),
    )
    compiled = lowered.compile()
    placed = jax.device_put((logits, inputs), compiled.input_shardings[0])
    np.testing.assert_array_equal(compiled(*placed), sample(logits, inputs))
    # Of logits there, and of tokens back: nothing in the sampler's branches and loops.
    assert collectives(compiled.as_text()).total() <= 2
