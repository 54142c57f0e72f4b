"""Whole steps of an engine on the device at hand: how long they take beside the roofline of the model's arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.profiling import pack_alone
from jaxserve.engine.programs import StepPrograms
from jaxserve.engine.runner import ModelRunner, prepare
from jaxserve.errors import ConfigError
from jaxserve.evaluation.compiled import Launches, compile_into_cache
from jaxserve.evaluation.device_bench import THOROUGH, Ceilings, Effort, Timing, Work, time_launches, write_results
from jaxserve.evaluation.throughput import ThroughputResult
from jaxserve.models.config import ModelConfig
from jaxserve.request import Request, RequestMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Chunk
from jaxserve.scheduler.buckets import bucket_of, token_buckets
from jaxserve.scheduler.step_time import num_seen_keys
from jaxserve.sharding.mesh import make_mesh

METHOD = (
    "A step is launched again and again without a wait for at least 50 ms, each launch with its two copies of inputs "
    "to the device, as the engine does; its time is the wall time by the number of launches, the median of up to 20 "
    "such measurements. The floor is the longer of reading what a step must read (every weight once, of experts as "
    "many as even routing would choose; every visible key and value once) at the copy's rate, and of its operations "
    "(two for each weight and row, attention, logits of the sampled rows) at the product's rate."
)


@dataclass(frozen=True)
class StepCase:
    name: str
    spans: tuple[tuple[int, int], ...]
    """(start, number of tokens) of each sequence's chunk; every one samples, as a decode does."""

    @property
    def num_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.spans)


def step_cases() -> Iterator[StepCase]:
    """Decodes, chunks of a prompt, and 32 decodes with a new prompt's first chunk in the rest of the budget."""
    for context in (1024, 4096):
        for batch in (1, 32, 128):
            yield StepCase(f"decode {batch} x {context}", ((context - 1, 1),) * batch)
    for start in (0, 4096):
        for num_tokens in (512, 2048):
            yield StepCase(f"chunk of {num_tokens} at {start}", ((start, num_tokens),))
    for budget in (512, 2048):
        yield StepCase(f"32 decodes x 1024 + chunk of {budget - 32}", (*((1023, 1),) * 32, (0, budget - 32)))


def why_not(case: StepCase, runner: ModelRunner) -> str | None:
    """What keeps the engine from running the case, if anything does."""
    config = runner.config
    num_blocks = 1 + sum(-(-(start + num_tokens) // config.block_size) for start, num_tokens in case.spans)
    limits = {
        "max_num_seqs": (len(case.spans), config.max_num_seqs),
        "token_budget": (case.num_tokens, runner.buckets[-1]),
        "max_model_len": (max(start + num_tokens for start, num_tokens in case.spans), config.max_model_len),
        "num_blocks": (num_blocks, runner.num_blocks),
    }
    short = [f"{name} of {needed}, got {limit}" for name, (needed, limit) in limits.items() if needed > limit]
    if short:
        return f"needs {' and '.join(short)}"
    num_rows = bucket_of(case.num_tokens, token_buckets(config.token_budget))
    return None if num_rows in runner.buckets else f"the program of {num_rows} rows was not compiled"


def step_work(
    model: ModelConfig,
    parameters: Mapping[str, jax.ShapeDtypeStruct],
    spans: Iterable[tuple[int, int]],
    cache_dtype: jnp.dtype,
) -> Work:
    """What one step must compute and read. ``parameters`` are all of them, as dense ones."""
    spans = list(spans)
    rows = sum(num_tokens for _, num_tokens in spans)
    head = "embedding" if model.tie_word_embeddings else "lm_head"
    flops = num_bytes = 0.0
    for name, parameter in parameters.items():
        if not name.startswith("layers.") and name != head:
            continue  # a few rows of the embeddings are read, and the last norm
        share = _expert_share(model, name)
        computing = len(spans) if name == head else rows * share
        if parameter.ndim > 1 and not name.endswith("bias"):
            flops += 2 * computing * parameter.size
        read = 1 - (1 - share) ** rows
        num_bytes += read * parameter.size * parameter.dtype.itemsize
    for layer in range(model.num_layers):
        window = model.layer_window(layer)
        pairs = sum(num_seen_keys(start, num_tokens, window) for start, num_tokens in spans)
        flops += 4 * pairs * model.num_heads * model.head_dim
        keys = sum(start + n if window is None else min(start + n, window - 1 + n) for start, n in spans)
        num_bytes += keys * model.num_kv_heads * model.kv_width * cache_dtype.itemsize
    return Work(flops, num_bytes)


def _expert_share(model: ModelConfig, name: str) -> float:
    """Of a parameter, the part that one row uses: routed evenly, per_token of all experts."""
    experts = model.experts
    if experts is None or not name.endswith(("mlp.gate_up", "mlp.down")):
        return 1.0
    if int(name.split(".")[1]) not in experts.layers:
        return 1.0
    return experts.per_token / experts.count


@dataclass(frozen=True)
class StepRow:
    case: StepCase
    num_rows: int
    """Of the program: the case's tokens and padding."""
    seconds: Timing
    work: Work
    launches: Launches | None
    """Of its forward pass. None where the program was in the cache: XLA says it only when it compiles."""


class StepBench:
    """Measures steps on an engine of its own. Without ``buckets`` they are the engine's own.

    The programs are compiled before the engine is there, which finds them in the persistent cache: compiling one later
    would throw away the CUDA graphs of those that run. Raises ConfigError and ModelError.
    """

    def __init__(
        self, config: EngineConfig, effort: Effort = THOROUGH, *, buckets: Sequence[int] | None = None
    ) -> None:
        self._effort = effort
        checkpoint, resolved = prepare(config)
        mesh, plan_codes = make_mesh(config.tensor_parallel), checkpoint.planned_codes
        self._programs = StepPrograms(resolved, checkpoint.config, mesh, plan_codes=plan_codes)
        compiled = _chosen(buckets, self._programs.buckets)
        with ThreadPoolExecutor() as pool:
            launches = pool.map(lambda rows: compile_into_cache(self._programs.lower_forward(rows)), compiled)
            self._launches = dict(zip(compiled, launches, strict=True))
        # Of the same size, whatever the memory holds by then; and warm-up would compile the other programs.
        same = dataclasses.replace(config, num_blocks=self._programs.num_blocks)
        self.engine = Engine(same if buckets is None else dataclasses.replace(same, warmup=False))
        self.runner = self.engine.runner
        self.runner.buckets = compiled

    def measure(self, case: StepCase) -> StepRow:
        num_rows = bucket_of(case.num_tokens, self.runner.buckets)
        cache_dtype = self._programs.kv_cache.dtype
        parameters = self._programs.forward.abstract_parameters
        work = step_work(self.runner.model_config, parameters, case.spans, cache_dtype)
        seconds = time_launches(self._launcher(case), self._effort)
        return StepRow(case, num_rows, seconds, work, self._launches[num_rows])

    def _launcher(self, case: StepCase) -> Callable[[], jax.Array]:
        runner = self.runner
        chunks = [_chunk(runner.model_config, slot, *span) for slot, span in enumerate(case.spans)]
        step = pack_alone(runner, chunks)

        def launch() -> jax.Array:
            runner.sample(runner.launch(step))
            assert step.outputs is not None
            return step.outputs.tokens

        return launch


def _chosen(buckets: Sequence[int] | None, known: Sequence[int]) -> list[int]:
    """Ascending. Raises ConfigError where they are not the engine's, or do not hold its largest step."""
    if buckets is None:
        return list(known)
    if not {known[-1]} <= set(buckets) <= set(known):
        raise ConfigError(
            f"buckets must be of {', '.join(map(str, known))}, the last among them, got {', '.join(map(str, buckets))}"
        )
    return sorted(set(buckets))


def _chunk(model: ModelConfig, slot: int, start: int, num_tokens: int) -> Chunk:
    token_ids = np.random.default_rng(slot).integers(model.vocab_size, size=start + num_tokens).tolist()
    greedy = SamplingParams(temperature=0)
    return Chunk(Request(str(slot), token_ids, greedy, 1, RequestMetrics(0.0)), start, num_tokens, slot, samples=True)


def describe(row: StepRow, ceilings: Ceilings) -> dict[str, str]:
    """A row of the table."""
    floor = row.work.floor_seconds(ceilings)
    bound = "compute" if row.work.compute_seconds(ceilings) == floor else "memory"
    return {
        "step": row.case.name,
        "rows": str(row.num_rows),
        "ms": f"{1e3 * row.seconds.median:.3f}",
        "spread": f"{row.seconds.spread:.0%}",
        "floor ms": f"{1e3 * floor:.3f}",
        "bound by": bound,
        "floor / time": f"{floor / row.seconds.median:.0%}",
        "GB/s": f"{row.work.num_bytes / row.seconds.median / 1e9:.0f}",
        "TFLOP/s": f"{row.work.flops / row.seconds.median / 1e12:.2f}",
        "CUDA graphs": str(row.launches.num_graphs) if row.launches else "-",
        "other launches": str(row.launches.num_others) if row.launches else "-",
    }


def host_gap(served: ThroughputResult) -> dict[str, float | int]:
    """What the device waited for between the steps of an engine under load, in seconds."""
    steps = served.steps
    return {
        "num_steps": steps.num_steps,
        "seconds": served.seconds,
        "gap_seconds_per_step": steps.host_seconds / steps.num_steps,
        "device_seconds_per_step": steps.device_seconds / steps.num_steps,
        "output_tokens_per_second": served.output_tokens_per_second,
    }


def to_json(row: StepRow, ceilings: Ceilings) -> dict[str, Any]:
    """Everything measured, in seconds, bytes and operations."""
    return {
        "step": row.case.name,
        "num_rows": row.num_rows,
        "seconds": row.seconds._asdict(),
        "work": row.work._asdict(),
        "floor_seconds": row.work.floor_seconds(ceilings),
        "launches": row.launches and row.launches._asdict(),
    }


def write_steps(
    folder: Path,
    rows: Sequence[StepRow],
    ceilings: Ceilings,
    *,
    left_out: Mapping[str, str],
    gap: Mapping[str, float | int] | None,
    settings: Mapping[str, Any],
) -> tuple[Path, Path]:
    """step-<device>.json and .md of what has been measured so far. ``left_out``: cases and why they were not measured;
    ``gap``: of ``host_gap``."""
    under_load = (
        [
            {
                "steps": str(gap["num_steps"]),
                "device ms per step": f"{1e3 * gap['device_seconds_per_step']:.3f}",
                "device idle ms per step": f"{1e3 * gap['gap_seconds_per_step']:.3f}",
                "output tokens/s": f"{gap['output_tokens_per_second']:.1f}",
            }
        ]
        if gap
        else []
    )
    return write_results(
        folder, "step",
        title=f"Steps of {settings['model']}",
        method=METHOD,
        ceilings=ceilings,
        tables={"Steps": [describe(row, ceilings) for row in rows], "The engine under load": under_load},
        notes=[f"{name}: not measured, {why}" for name, why in left_out.items()],
        raw={
            "settings": dict(settings),
            "rows": [to_json(row, ceilings) for row in rows],
            "left_out": dict(left_out),
            "under_load": gap and dict(gap),
        },
    )  # fmt: skip
