"""A draft model: a small one on the same mesh, whose tokens are the drafts of the model that is served.

It computes every step's rows too, so its keys and values, under the same block numbers, are there for all tokens; then,
behind each token that has been drawn, it draws the next ones one by one. Its draws take the noise of the served
model's, that of their seed and position, so that the two agree about as often as their distributions allow
(arXiv 2408.07978), and a model that drafts for itself is never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.config import ResolvedConfig
from jaxserve.engine.forward import ModelState
from jaxserve.engine.programs import SWAP_BLOCKS, StepPrograms
from jaxserve.engine.sampler import SamplingInputs, sample
from jaxserve.engine.speculation import SequenceState
from jaxserve.engine.step import Step
from jaxserve.engine.swapped import SwappedBlocks
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading.checkpoint import Checkpoint
from jaxserve.models.matrix import Parameter
from jaxserve.models.rope import longest_sequence
from jaxserve.scheduler import Chunk
from jaxserve.scheduler.buckets import bucket_of
from jaxserve.sharding.rows import over_rows


class DraftModel:
    """Its programs, its parameters once loaded, and its keys and values."""

    def __init__(self, config: ResolvedConfig, checkpoint: Checkpoint, served: ModelConfig, mesh: Mesh) -> None:
        """``config``: the engine's, with the number of its blocks. Raises ConfigError."""
        model = checkpoint.config
        if model.vocab_size != served.vocab_size:
            raise ConfigError(
                f"draft_model must have the model's vocabulary of {served.vocab_size} tokens, got {model.vocab_size}"
            )
        if longest_sequence(model) < config.max_model_len:
            raise ConfigError(
                f"max_model_len must not exceed the draft_model's {longest_sequence(model)} positions, "
                f"got {config.max_model_len}"
            )
        self._config, self._checkpoint = config, checkpoint
        self._programs = programs = StepPrograms(config, model, mesh)
        rows = bucket_of(min(config.max_num_seqs, config.token_budget), programs.buckets)
        self.layout = programs.layouts[rows]
        """Of the rows that drafts are made from: one for each sequence."""
        self.block_bytes = programs.kv_cache.block_bytes
        """Of a block of its KV cache, on all devices of the mesh together."""
        self._swapped = SwappedBlocks(programs.abstract_block)
        self._parameters: list[Parameter]
        self._state: ModelState[jax.Array]

    def load(self) -> None:
        """Raises ModelError."""
        self._programs.check(self._checkpoint)
        self._parameters = self._programs.load(self._checkpoint)
        self._state = self._programs.new_state(self._checkpoint.kv_scales)

    def arrays(self) -> list[jax.Array]:
        """All that it has on the devices."""
        return jax.tree.leaves((self._parameters, self._state))

    def packed(self, step: Step, num_rows: int) -> np.ndarray:
        """A step for the program of so many rows."""
        return step.packed_for(self._programs.layouts[num_rows])

    def forward(self, program: jax.stages.Compiled, sequences: SequenceState[jax.Array], ints: jax.Array) -> None:
        """Keep the keys and values of a step's rows. ints: ``int32[1, layout.num_ints]``."""
        self._state, _ = program(self._parameters, self._state, sequences, ints)

    def propose(
        self, program: jax.stages.Compiled, sequences: SequenceState[jax.Array], ints: jax.Array
    ) -> SequenceState[jax.Array]:
        """The sequences, which are donated, with drafts. ints: ``int32[1, layout.num_ints]``, of a row for the last
        token of each that gets some."""
        self._state, sequences = program(self._parameters, self._state, sequences, ints)
        return sequences

    def swap_out(self, program: jax.stages.Compiled, numbers: jax.Array, places: Sequence[int]) -> None:
        """Copy blocks to these places of the swap space. numbers: ``int32[SWAP_BLOCKS]``"""
        self._swapped.keep(places, program(self._state.cache, numbers))

    def swap_in(self, program: jax.stages.Compiled, numbers: jax.Array, places: Sequence[int]) -> None:
        """The way back."""
        blocks = self._swapped.fetch(places, SWAP_BLOCKS)
        self._state = self._state._replace(cache=program(self._state.cache, numbers, blocks))

    def close(self) -> None:
        """Give the memory of swapped blocks back."""
        self._swapped.clear()

    def following(self, chunks: list[Chunk]) -> list[Chunk]:
        """Of a step's sequences that draw, the token behind, as far as drafts of it may reach."""
        ahead, longest = self._config.max_seq_drafts - 1, self._config.max_model_len
        return [
            Chunk(c.request, min(c.start + c.num_tokens + ahead, longest - 1), 1, c.slot, samples=True)
            for c in chunks
            if c.samples
        ]

    def lower_forward(self, rows: int) -> jax.stages.Lowered:
        """See ``forward``."""
        return self._programs.lower_forward(rows)

    def lower_swap_out(self) -> jax.stages.Lowered:
        """See ``swap_out``."""
        return self._programs.lower_swap_out()

    def lower_swap_in(self) -> jax.stages.Lowered:
        """See ``swap_in``."""
        return self._programs.lower_swap_in()

    def lower_propose(self) -> jax.stages.Lowered:
        """See ``propose``."""
        programs = self._programs
        ints = jax.ShapeDtypeStruct((1, self.layout.num_ints), jnp.int32, sharding=programs.staged)
        return programs.lower_with_parameters(self._propose, programs.abstract_sequences(), ints)

    def _propose(
        self,
        parameters: list[Parameter],
        state: ModelState[jax.Array],
        sequences: SequenceState[jax.Array],
        ints: jax.Array,
    ) -> tuple[ModelState[jax.Array], SequenceState[jax.Array]]:
        forward, layout = self._programs.forward, self.layout
        head = forward.head(forward.outside(parameters))
        fields = layout.split_draws(layout.draws_of(ints[0]))
        num_slots, max_len = sequences.history.shape
        is_draw = fields["draw_rows"] >= 0
        drawn = jnp.where(is_draw, jnp.arange(layout.num_draws, dtype=jnp.int32), -1)
        slots = jnp.where(is_draw, fields["draw_seqs"], num_slots)
        none = jnp.zeros_like(sequences.lengths)

        def draft(
            number: jax.Array, carried: tuple[ModelState[jax.Array], jax.Array]
        ) -> tuple[ModelState[jax.Array], jax.Array]:
            """The number-th draft follows the ones before as if they were tokens."""
            state, history = carried
            lengths = jnp.minimum(sequences.lengths + number, max_len)
            state, rows = forward(layout, parameters, state, SequenceState(history, lengths, none), ints)
            positions = lengths.at[slots].get(mode="fill", fill_value=max_len)
            given = fields | {"draw_positions": positions}
            inputs = SamplingInputs(*(given[name] for name in SamplingInputs._fields))
            tokens = over_rows(sample, self._programs.mesh, head.logits(rows.rows, drawn), inputs)
            return state, history.at[slots, positions].set(tokens, mode="drop")

        number = self._config.max_seq_drafts
        state, history = jax.lax.fori_loop(0, number, draft, (state, sequences.history))
        counts = none.at[slots].set(number, mode="drop")
        counts = jnp.minimum(counts, max_len - sequences.lengths)
        return state, SequenceState(history, sequences.lengths, counts)
