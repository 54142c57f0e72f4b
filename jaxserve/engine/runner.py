"""What runs an engine's programs: parameters and state on the devices, and the steps in a pipeline's stages."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from functools import partial
from itertools import batched, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxserve.config import EngineConfig, ResolvedConfig, cache_dir
from jaxserve.engine.compile import CompiledPrograms, use_persistent_cache
from jaxserve.engine.draft import DraftModel
from jaxserve.engine.forward import Drawn
from jaxserve.engine.memory import claim_gpu_memory
from jaxserve.engine.programs import SWAP_BLOCKS, StepPrograms
from jaxserve.engine.sampler import TokenLogprobs
from jaxserve.engine.speculation import no_suggestions
from jaxserve.engine.startup import timed
from jaxserve.engine.step import Step, StepLayout, StepOutputs, wanted_scores
from jaxserve.engine.swapped import SwappedBlocks
from jaxserve.errors import ConfigError, ModelError
from jaxserve.models.loading.checkpoint import Checkpoint, OrbaxCheckpoint, open_checkpoint
from jaxserve.models.loading.probes import read_probes
from jaxserve.models.matrix import Parameter
from jaxserve.models.rope import longest_sequence
from jaxserve.scheduler.buckets import bubble_share, bucket_of
from jaxserve.scheduler.swap_space import Copy

RUNS_OF_A_GRAPH = 3
"""XLA runs a program op by op at first, captures its CUDA graph the second time, and replays that from the third on."""

logger = logging.getLogger(__name__)


class Kind(IntEnum):
    """What a program does; see StepPrograms, and DraftModel."""

    FORWARD = 0
    SAMPLE = 1
    ADMIT = 2
    SCORE = 3
    SAMPLE_EDITED = 4
    SWAP_OUT = 5
    SWAP_IN = 6
    DRAFT_FORWARD = 7
    PROPOSE = 8
    SUGGEST = 9
    DRAFT_SWAP_OUT = 10
    DRAFT_SWAP_IN = 11


def prepare(config: EngineConfig) -> tuple[Checkpoint, ResolvedConfig]:
    """What a runner is made of, from files alone. Raises ConfigError and ModelError."""
    claim_gpu_memory(config.gpu_memory_utilization)
    use_persistent_cache(Path(config.compilation_cache or cache_dir() / "compiled"))
    checkpoint = open_checkpoint(config.model, config.load_format)
    max_len, on_gpu = longest_sequence(checkpoint.config), jax.default_backend() == "gpu"
    resolved = config.resolve(model_max_len=max_len, on_gpu=on_gpu)
    return checkpoint, resolved if checkpoint.config.recurrent is None else _without_going_back(resolved)


def _without_going_back(config: ResolvedConfig) -> ResolvedConfig:
    """For a model that cannot take up a sequence in its middle, as its memory is of all tokens. Raises ConfigError."""
    for name, only in (("speculative", "off"), ("swap_space_bytes", 0)):
        if (value := getattr(config, name)) != only:
            raise ConfigError(f"{name} must be {only} for a model with recurrent layers, got {value}")
    if config.enable_prefix_caching:
        logger.info("no prefix cache: a model with recurrent layers remembers a sequence as a whole")
    return dataclasses.replace(config, enable_prefix_caching=False)


class ModelRunner:
    """Runs steps, one after the other. On a mesh with several stages every launch moves the steps on by one stage.

    Where the mesh spans several processes, each has a runner, and all must ``run`` the same programs on the same
    arrays. ``config`` is resolved; ``num_blocks`` is the KV cache's size in blocks.
    """

    def __init__(self, config: ResolvedConfig, checkpoint: Checkpoint, mesh: Mesh, *, show_progress: bool) -> None:
        self.num_stages = mesh.shape["pipe"]
        if self.num_stages > 1 and isinstance(checkpoint, OrbaxCheckpoint):
            raise ModelError(
                f"{checkpoint.path}: Orbax checkpoints cannot be divided into the stages of a pipeline; "
                f"pipeline_parallel must be 1, got {self.num_stages}"
            )
        draft_checkpoint, beside = None, None
        if config.draft_model is not None:
            draft_checkpoint = open_checkpoint(config.draft_model, config.load_format)
            if draft_checkpoint.config.recurrent is not None:
                raise ConfigError(f"draft_model must have no recurrent layers, got {config.draft_model!r}")
            least = dataclasses.replace(config, num_blocks=1 + config.blocks_per_seq)
            beside = StepPrograms(least, draft_checkpoint.config, mesh)
        probes = None
        if config.ppd_probes is not None:
            probes = read_probes(Path(config.ppd_probes), config.num_speculative_tokens, checkpoint.config.hidden_size)
        self._programs = programs = StepPrograms(
            config, checkpoint.config, mesh, beside=beside, plan_codes=checkpoint.planned_codes, probes=probes
        )
        self.model_config = programs.model_config
        programs.check(checkpoint)
        self._layouts, self.buckets, self.edits = programs.layouts, list(programs.layouts), programs.edits
        self.num_blocks, self.skips_padding = programs.num_blocks, programs.skips_padding
        self.config = dataclasses.replace(config, num_blocks=self.num_blocks)
        self.draft: DraftModel | None = None
        if draft_checkpoint is not None:
            self.draft = DraftModel(self.config, draft_checkpoint, checkpoint.config, mesh)
        rare = {(Kind.SAMPLE_EDITED, n): partial(programs.lower_sample_edited, n) for n in programs.draw_layouts}
        rare |= {(Kind.SCORE, rows): partial(programs.lower_score, rows) for rows in self.buckets}
        common = {(Kind.ADMIT, 0): programs.lower_admit}
        common |= {(Kind.FORWARD, rows): partial(programs.lower_forward, rows) for rows in self.buckets}
        common |= {(Kind.SAMPLE, draws): partial(programs.lower_sample, draws) for draws in programs.draw_layouts}
        if config.swap_space_bytes:
            common |= {(Kind.SWAP_OUT, 0): programs.lower_swap_out, (Kind.SWAP_IN, 0): programs.lower_swap_in}
        if config.max_seq_drafts:
            common[Kind.SUGGEST, 0] = programs.lower_suggest
        if self.draft is not None:
            common |= {(Kind.DRAFT_FORWARD, rows): partial(self.draft.lower_forward, rows) for rows in self.buckets}
            common[Kind.PROPOSE, 0] = self.draft.lower_propose
            if config.swap_space_bytes:
                common[Kind.DRAFT_SWAP_OUT, 0] = self.draft.lower_swap_out
                common[Kind.DRAFT_SWAP_IN, 0] = self.draft.lower_swap_in
        self._rare, self._compiled = rare, CompiledPrograms(common | rare)
        ahead = [*common, *(rare if programs.uses_graphs else ())] if config.warmup else []

        def load() -> list[Parameter]:
            if self.draft is not None:
                self.draft.load()
            return programs.load(checkpoint)

        def load_and_compile() -> None:
            with ThreadPoolExecutor(max_workers=1) as pool:
                loading = pool.submit(timed, load)
                if programs.uses_graphs:
                    # XLA times kernels on the GPU to choose among them: not while weights come in.
                    loading.result()
                compile_ahead = partial(self._compiled.compile, ahead, show_progress=show_progress)
                _, self.compile_seconds = timed(compile_ahead)
                self._parameters, self.weights_seconds = loading.result()

        _, self.loading_seconds = timed(load_and_compile)
        self._outside = programs.forward.outside(self._parameters)
        self._state, self._sequences = programs.new_state(checkpoint.kv_scales), programs.new_sequences()
        self._swapped = SwappedBlocks(programs.abstract_block)
        self.block_bytes = programs.kv_cache.block_bytes
        """Of a block of the KV cache, that of a draft model included, on all devices of the mesh together."""
        if self.draft is not None:
            self.block_bytes += self.draft.block_bytes
        self._drawn: Drawn
        """By the last forward pass."""
        smallest = self._layouts[self.buckets[0]]
        self._in_stages = deque((Step.empty(smallest) for _ in range(self.num_stages)), maxlen=self.num_stages)
        """The steps of the last launch, by stage."""

    def layout(self, num_tokens: int) -> StepLayout:
        """The layout of the smallest program that holds ``num_tokens`` rows."""
        return self._layouts[bucket_of(num_tokens, self.buckets)]

    @property
    def has_steps(self) -> bool:
        """Whether there are steps that have not reached the last stage."""
        return any(step.chunks for step in list(self._in_stages)[:-1])

    def launch(self, step: Step | None) -> Step:
        """Start a step, or an empty one, and return at once, with the step that has entered the last stage: without a
        pipeline the step itself, which may then be sampled.
        """
        step = step or Step.empty(self._layouts[self.buckets[0]])
        for slot, token_ids in step.admissions:
            self.run(Kind.ADMIT, 0, self._admission(slot, token_ids))
        if step.suggestions is not None:
            self.run(Kind.SUGGEST, 0, step.suggestions)
        self._in_stages.appendleft(step)
        layout, last = max((one.layout for one in self._in_stages), key=attrgetter("num_rows")), self._in_stages[-1]
        ints = np.stack([one.packed_for(layout) for one in self._in_stages])
        last.hidden = self.run(Kind.FORWARD, layout.num_rows, ints)
        last.record.num_rows = layout.num_rows
        if self.draft is not None:
            self.run(Kind.DRAFT_FORWARD, layout.num_rows, self.draft.packed(last, layout.num_rows))
        if self.num_stages > 1:
            tokens = [one.record.num_tokens for one in self._in_stages]
            last.record.bubble_share = bubble_share(tokens, layout.num_rows)
        return last

    def sample(self, step: Step, edits: np.ndarray | None = None) -> None:
        """Start to sample what ``step``, which the last launch returned, draws; its tokens will be copied to the host.

        ``edits``: ``int32[R, edits.width]`` of its layout's R draws, if any of them has some.
        """
        if any(chunk.samples for chunk in step.chunks):
            kind = Kind.SAMPLE if edits is None else Kind.SAMPLE_EDITED
            step.outputs = self.run(kind, self.num_draws(step), edits)
            if step.last_tokens is not None:
                self.run(Kind.PROPOSE, 0, step.last_tokens)

    def num_draws(self, step: Step) -> int:
        """R of the program that has run the step's last stage."""
        return self._layouts[step.record.num_rows].num_draws

    def copy_blocks(self, copies: Iterable[Copy]) -> None:
        """Start to copy blocks between the KV cache and the swap space, one after the other, after what runs now."""
        for is_out, alike in groupby(copies, attrgetter("is_out")):
            kind = Kind.SWAP_OUT if is_out else Kind.SWAP_IN
            for some in batched(alike, SWAP_BLOCKS):
                self.run(kind, 0, np.array([(copy.block, copy.place) for copy in some], np.int32))

    def wait(self) -> None:
        """Until the devices have done all that has been started."""
        jax.block_until_ready((self._state, self._sequences))

    def score(self, step: Step) -> TokenLogprobs[jax.Array]:
        """Log-probabilities of the prompt tokens that follow the rows of ``step``, which the last launch returned."""
        rows = step.record.num_rows
        return self.run(Kind.SCORE, rows, wanted_scores(rows, step.chunks))

    def prepare_rare(self) -> None:
        """Compile the programs of scores and of edits in the background: rare, so nobody's start waits for them.

        Not on GPUs, where they have been compiled ahead: a new CUDA graph throws away those of all other programs.
        """
        if self.config.warmup and not self._programs.uses_graphs:
            self._compiled.compile_in_background(self._rare)

    def has_rare(self, timeout_seconds: float = 0.0) -> bool:
        """Whether they are there, after waiting for at most ``timeout_seconds``; who needs them would wait."""
        return self._compiled.wait(timeout_seconds)

    def run(self, kind: Kind, size: int, array: np.ndarray | None = None) -> Any:
        """Start the program of this kind and size, on the int32 ``array`` of the host's that it takes, if any."""
        starts: dict[Kind, Callable[..., Any]] = {
            Kind.FORWARD: self._forward,
            Kind.SAMPLE: self._sample,
            Kind.ADMIT: self._admit,
            Kind.SCORE: self._score,
            Kind.SAMPLE_EDITED: self._sample_edited,
            Kind.SWAP_OUT: self._swap_out,
            Kind.SWAP_IN: self._swap_in,
            Kind.DRAFT_FORWARD: self._draft_forward,
            Kind.PROPOSE: self._propose,
            Kind.SUGGEST: self._suggest,
        }
        return starts[kind](size, array)

    def warm_up(self) -> None:
        """Run every program on padding, so that what its first runs cost is paid before the first request.

        All have been compiled before, and none is afterwards: see ``prepare_rare``.
        """
        graphs = self._programs.uses_graphs
        for _ in range(RUNS_OF_A_GRAPH if graphs else 1):
            self.run(Kind.ADMIT, 0, np.zeros(2 + self.config.max_model_len, np.int32))
            if self.config.max_seq_drafts:
                self.run(Kind.SUGGEST, 0, no_suggestions(self.config.max_num_seqs, self.config.max_seq_drafts))
            if self.config.swap_space_bytes:
                self.copy_blocks([Copy(0, 0, is_out=True), Copy(0, 0, is_out=False)])
        for rows, layout in self._layouts.items():
            ints = np.stack([Step.empty(layout).ints] * self.num_stages)
            for _ in range(RUNS_OF_A_GRAPH if graphs else 1):
                self.run(Kind.FORWARD, rows, ints)
                if self.draft is not None:
                    self.run(Kind.DRAFT_FORWARD, rows, self.draft.packed(Step.empty(layout), rows))
                    self.run(Kind.PROPOSE, 0, self.draft.layout.blank)
                jax.block_until_ready(self.run(Kind.SAMPLE, layout.num_draws))
                if graphs:
                    blank = self.edits.blank(layout.num_draws)
                    jax.block_until_ready(self.run(Kind.SAMPLE_EDITED, layout.num_draws, blank))
                    jax.block_until_ready(self.run(Kind.SCORE, rows, wanted_scores(rows, ())))

    def close(self) -> None:
        """Wait for the devices and give their memory back. A step that failed may have taken the state with it."""
        drafts = [] if self.draft is None else self.draft.arrays()
        for array in [*jax.tree.leaves((self._parameters, self._state, self._sequences)), *drafts]:
            if not array.is_deleted():
                array.block_until_ready().delete()
        self._swapped.clear()
        if self.draft is not None:
            self.draft.close()
        self._compiled.close()

    def _forward(self, rows: int, ints: np.ndarray) -> jax.Array:
        """ints: ``int32[stages, layout.num_ints]``. The hidden states of its rows, for whom has to wait for them."""
        packed = _put(ints, self._programs.staged)
        program = self._compiled[Kind.FORWARD, rows]
        self._state, self._drawn = program(self._parameters, self._state, self._sequences, packed)
        return self._drawn.hidden

    def _sample(self, num_draws: int, _: None) -> StepOutputs:
        """What the last forward pass has drawn."""
        return self._sampled(self._compiled[Kind.SAMPLE, num_draws])

    def _sample_edited(self, num_draws: int, edits: np.ndarray) -> StepOutputs:
        """The same, of logits that are edited first."""
        return self._sampled(self._compiled[Kind.SAMPLE_EDITED, num_draws], self._put(edits.reshape(num_draws, -1)))

    def _sampled(self, program: jax.stages.Compiled, *edits: jax.Array) -> StepOutputs:
        drawn = self._drawn
        self._sequences, outputs = program(self._outside, self._sequences, drawn.rows, drawn.draws, *edits)
        outputs.tokens.copy_to_host_async()
        return outputs

    def _draft_forward(self, rows: int, ints: np.ndarray) -> None:
        assert self.draft is not None
        packed = _put(ints.reshape(1, -1), self._programs.staged)
        self.draft.forward(self._compiled[Kind.DRAFT_FORWARD, rows], self._sequences, packed)

    def _propose(self, size: int, ints: np.ndarray) -> None:
        assert self.draft is not None
        packed = _put(ints.reshape(1, -1), self._programs.staged)
        self._sequences = self.draft.propose(self._compiled[Kind.PROPOSE, size], self._sequences, packed)

    def _suggest(self, size: int, suggestions: np.ndarray) -> None:
        packed = self._put(suggestions.reshape(self.config.max_num_seqs, -1))
        self._sequences = self._compiled[Kind.SUGGEST, size](self._sequences, packed)

    def _admit(self, size: int, admission: np.ndarray) -> None:
        self._sequences = self._compiled[Kind.ADMIT, size](self._sequences, self._put(admission))

    def _swap_out(self, size: int, copies: np.ndarray) -> None:
        numbers, places = self._blocks_of(copies)
        self._swapped.keep(places, self._compiled[Kind.SWAP_OUT, size](self._state.cache, numbers))
        if self.draft is not None:
            self.draft.swap_out(self._compiled[Kind.DRAFT_SWAP_OUT, size], numbers, places)

    def _swap_in(self, size: int, copies: np.ndarray) -> None:
        numbers, places = self._blocks_of(copies)
        blocks = self._swapped.fetch(places, SWAP_BLOCKS)
        cache = self._compiled[Kind.SWAP_IN, size](self._state.cache, numbers, blocks)
        self._state = self._state._replace(cache=cache)
        if self.draft is not None:
            self.draft.swap_in(self._compiled[Kind.DRAFT_SWAP_IN, size], numbers, places)

    def _blocks_of(self, copies: np.ndarray) -> tuple[jax.Array, list[int]]:
        """Numbers of blocks, that of the dummy one for those that are missing, and places. copies: ``int32[n, 2]``"""
        numbers, places = copies.reshape(-1, 2).T
        return self._put(np.pad(numbers, (0, SWAP_BLOCKS - len(numbers)))), places.tolist()

    def _score(self, rows: int, wanted: np.ndarray) -> TokenLogprobs[jax.Array]:
        return self._compiled[Kind.SCORE, rows](self._outside, self._drawn.hidden, self._put(wanted))

    def _admission(self, slot: int, token_ids: Sequence[int]) -> np.ndarray:
        packed = np.zeros(2 + self.config.max_model_len, np.int32)
        packed[:2] = slot, len(token_ids)
        packed[2 : 2 + len(token_ids)] = token_ids
        return packed

    def _put(self, array: np.ndarray) -> jax.Array:
        return _put(array, self._programs.replicated)


def _put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # device_put would ask all processes whether they put the same.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
