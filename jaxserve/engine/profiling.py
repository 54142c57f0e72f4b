"""One-time profiling (arXiv 2403.02310, section 4.3): times stated batches on a runner to model its steps."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
import time
from collections.abc import Mapping

import jax
import numpy as np

from jaxserve.config import ResolvedConfig
from jaxserve.engine.programs import SWAP_BLOCKS
from jaxserve.engine.runner import ModelRunner
from jaxserve.engine.step import Packer, Step
from jaxserve.errors import ConfigError
from jaxserve.request import Request, RequestMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Chunk
from jaxserve.scheduler.blocks import BlockManager
from jaxserve.scheduler.buckets import bucket_of
from jaxserve.scheduler.step_time import BatchShape, Profile, Sample, StepTimeModel, held_out_error
from jaxserve.scheduler.swap_space import Copy

NUM_REPEATS = 3
DRAFT_ROUNDS = 4


class Profiler:
    """Batches of every bucket, at stated numbers of decodes and contexts, on an engine's runner that is idle."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._token_ids = np.random.default_rng(0).integers(
            runner.model_config.vocab_size, size=runner.config.max_model_len
        )
        config = runner.config
        blocks_per_seq = (runner.num_blocks - 1) // config.max_num_seqs
        self.context_tokens = max(2, min(config.max_model_len, blocks_per_seq * config.block_size))
        """Of every sequence in the worst batch: what the cache holds of all sequences at once."""

    def profile(self, stop_seconds: float) -> tuple[Profile, list[Sample]]:
        """Measure, fit, and say how well. Buckets too slow to meet ``stop_seconds`` in any batch are left out."""
        samples = self._samples(stop_seconds)
        profile = Profile(
            **_identity(self._runner.config),
            date=datetime.date.today().isoformat(),
            error=held_out_error(samples),
            step_time=StepTimeModel.fit(samples),
        )
        return profile, samples

    def seconds_per_prefill_token(self) -> float:
        """Of a whole step of prompts' beginnings, where a token costs the least."""
        batches = [self._batch(rows, 0, min(rows, self.context_tokens)) for rows in reversed(self._runner.buckets)]
        batch = next(batch for batch in batches if self._fits(batch))
        return self._seconds(batch) / sum(chunk.num_tokens for chunk in batch)

    def seconds_per_swapped_block(self) -> float:
        """Of a block's way to the swap space and back, among others."""
        times, places = [], range(SWAP_BLOCKS)
        for _ in range(1 + NUM_REPEATS):
            start = time.perf_counter()
            self._runner.copy_blocks([Copy(0, place, is_out) for is_out in (True, False) for place in places])
            self._runner.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:]) / len(places)

    def draft_times(self) -> StepTimeModel:
        """Of decodes and drafts alone, by their number, at half of the longest context."""
        config, limits = self._runner.config, self._runner.layout(1).limits
        buckets, skips = self._runner.buckets, self._runner.skips_padding
        sizes = {2**power for power in range(limits.max_decodes.bit_length())} | {limits.max_decodes}
        if not skips:
            sizes = {bucket_of(min(rows, buckets[-1]), buckets) for rows in sizes}
        steps = {rows: self._decodes(rows) for rows in sorted(sizes) if rows <= config.token_budget}
        # The least of rounds through all sizes: they differ by little, beside what else a machine has to do.
        rounds = [[self._run_seconds(step) for step in steps.values()] for _ in range(1 + DRAFT_ROUNDS)]
        least = np.maximum.accumulate(np.min(rounds[1:], axis=0))
        return StepTimeModel(dict(zip(steps, least.tolist(), strict=True)), 0.0, 0.0, interpolates=skips)

    def _decodes(self, num_rows: int) -> Step:
        """So many rows, shared by the sequences as decodes and drafts."""
        num_seqs = min(num_rows, self._runner.config.max_num_seqs)
        shares = [len(share) for share in np.array_split(np.arange(num_rows), num_seqs)]
        start = self.context_tokens // 2
        chunks = [self._chunk(slot, start, share, decodes=True) for slot, share in enumerate(shares)]
        return pack_alone(self._runner, [chunk._replace(num_drafts=chunk.num_tokens - 1) for chunk in chunks])

    def worst_shapes(self) -> dict[int, BatchShape]:
        """For every bucket that could be the budget: all sequences but one decode, and the rest is a prefill chunk,
        all at the longest context."""
        at_once = self._runner.config.max_num_seqs
        budgets = [rows for rows in self._runner.buckets if rows >= at_once]
        return {rows: self._shape(self._batch(rows, at_once - 1, self.context_tokens)) for rows in budgets}

    def _samples(self, stop_seconds: float) -> list[Sample]:
        samples: list[Sample] = []
        for rows in self._runner.buckets:
            measured = [Sample(self._shape(batch), self._seconds(batch)) for batch in self._batches(rows)]
            samples += measured
            if measured and min(sample.seconds for sample in measured) > stop_seconds:
                break
        return samples

    def _batches(self, rows: int) -> list[list[Chunk]]:
        """Chunks alone, beside some decodes and beside many, and decodes alone; at short, medium and long contexts."""
        at_once, longest = self._runner.config.max_num_seqs, self.context_tokens
        cases = sorted(
            (num_decodes, context)
            for num_decodes in {0, at_once // 2, at_once - 1, at_once}
            for context in {max(2, longest // 4), max(2, longest // 2), longest}
        )
        batches = [self._batch(rows, *case) for case in cases if case[0] <= rows]
        return [batch for batch in batches if self._shape(batch).num_rows == rows and self._fits(batch)]

    def _batch(self, rows: int, num_decodes: int, context: int) -> list[Chunk]:
        """``num_decodes`` at ``context``; chunks that end there, if they are not longer, fill the other rows."""
        config = self._runner.config
        pieces = [(context - 1, 1)] * num_decodes
        left = rows - num_decodes
        while left and len(pieces) < config.max_num_seqs:
            num_tokens = min(left, config.max_model_len)
            pieces.append((max(0, context - num_tokens), num_tokens))
            left -= num_tokens
        return [self._chunk(slot, *piece, decodes=slot < num_decodes) for slot, piece in enumerate(pieces)]

    def _chunk(self, slot: int, start: int, num_tokens: int, *, decodes: bool) -> Chunk:
        token_ids = self._token_ids[: start + num_tokens].tolist()
        prompt, output = (token_ids[:-1], token_ids[-1:]) if decodes else (token_ids, [])
        request = Request(str(slot), prompt, SamplingParams(), 1, RequestMetrics(0.0), output_token_ids=output)
        return Chunk(request, start, num_tokens, slot, samples=True)

    def _shape(self, batch: list[Chunk]) -> BatchShape:
        return BatchShape.of(batch, self._runner.buckets, self._runner.model_config.window)

    def _fits(self, batch: list[Chunk]) -> bool:
        block_size = self._runner.config.block_size
        return sum(-(-(c.start + c.num_tokens) // block_size) for c in batch) < self._runner.num_blocks

    def _seconds(self, batch: list[Chunk]) -> float:
        """Median time from a launch to its tokens, after a run that is not counted."""
        step = pack_alone(self._runner, batch)
        return statistics.median([self._run_seconds(step) for _ in range(1 + NUM_REPEATS)][1:])

    def _run_seconds(self, step: Step) -> float:
        start = time.perf_counter()
        run_alone(self._runner, step)
        step.tokens()
        return time.perf_counter() - start


def pack_alone(runner: ModelRunner, batch: list[Chunk]) -> Step:
    """A batch that samples and whose sequences have the whole KV cache to themselves, to be launched any number of
    times."""
    config = runner.config
    blocks = BlockManager(runner.num_blocks, config.block_size, config.max_num_seqs, config.max_model_len)
    for chunk in batch:
        blocks.grow(chunk.slot, chunk.start + chunk.num_tokens)
    layout = runner.layout(sum(chunk.num_tokens for chunk in batch))
    step = Packer(blocks, absolute=True).pack(layout, batch)
    run_alone(runner, step)
    return dataclasses.replace(step, admissions=())


def run_alone(runner: ModelRunner, step: Step) -> None:
    """Start a step, with nothing else in a pipeline's stages, as far as to its samples."""
    entered = runner.launch(step)
    while entered is not step:
        entered = runner.launch(None)
    runner.sample(step)


def _identity(config: ResolvedConfig) -> dict[str, str]:
    """What a profile is of."""
    return {"model": config.model, "dtype": config.dtype, "device": jax.devices()[0].device_kind}


def read_profile(path: str, config: ResolvedConfig) -> Profile:
    """Raises ConfigError, also where the profile is of something else."""
    profile = Profile.read(path)
    for name, value in _identity(config).items():
        if getattr(profile, name) != value:
            raise ConfigError(f"profile: {path!r} is of {name} {getattr(profile, name)!r}, the engine has {value!r}")
    return profile


def largest_budget(step_time: StepTimeModel, worst_shapes: Mapping[int, BatchShape], slo_tbt_seconds: float) -> int:
    """The largest token budget whose worst step meets the objective. Raises ConfigError if none does."""
    seconds = {rows: step_time.predict(shape) for rows, shape in worst_shapes.items()}
    meeting = [rows for rows in seconds if seconds[rows] <= slo_tbt_seconds]
    if not meeting:
        fastest = min(seconds, key=seconds.__getitem__)
        raise ConfigError(
            f"slo_tbt_seconds must be at least {seconds[fastest]:.4g}, what a step of {fastest} tokens takes with "
            f"every sequence at its longest, got {slo_tbt_seconds:g}"
        )
    return max(meeting)
