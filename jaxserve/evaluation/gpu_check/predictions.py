"""What was expected of GPUs before any of this ran on one, so that a measurement can be a surprise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import jax
import jax.numpy as jnp

from jaxserve.evaluation.device_bench import Ceilings, Work
from jaxserve.evaluation.gpu_check.models import MODEL, SERVER
from jaxserve.evaluation.gpu_check.products import PAIRS
from jaxserve.evaluation.gpu_check.server import LOAD
from jaxserve.evaluation.kernel_bench import CASES, SHAPE
from jaxserve.evaluation.step_bench import StepCase, step_work
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.matrix import WordMatrix
from jaxserve.models.registry import family_of
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import abstract_model, abstract_parameters

CEILINGS = {"H100": Ceilings(3.0e12, 798e12), "H200": Ceilings(4.3e12, 788e12)}
"""By device: measured by others' programs, of a copy and of a product of random bfloat16."""

DECODE_EFFICIENCY, DECODE_SECONDS = 0.93, 12e-6
"""Of the copy's rate; three launches, and what programs do before their first key. A simulation of programs that share
the memory's rate, for an H100: 64 x 4k 390 - 410 us, 8 x 4k 58 - 62, 1 x 32k 57."""
PREFILL_FLOPS = {
    ("triton", False): 420e12,
    ("triton", True): 400e12,
    ("pod", False): 420e12,
    ("pod", True): 400e12,
    ("mosaic", False): 550e12,
    ("mosaic", True): 500e12,
}
"""By backend and whether there is a window. From instructions a tile: softmax overlaps no product in Triton's kernel,
and a window has more tiles at an edge, which are masked."""
HYBRID = {"triton": 0.95, "pod": 0.8, "mosaic": 1.0}
"""Of the time of its parts one after the other. Two launches that may run at once overlap where they happen to share a
multiprocessor; POD's programs do by design, and its paper (arXiv 2410.18038) gains 28 % of the two on average."""
LAUNCH_SECONDS = 5e-6
STEP = {"memory": (1.06, 1.1e-3), "compute": (1.22, 0.7e-3)}
"""Of whole steps by what bounds them: factor of the floor, and seconds besides. The line through what was expected of
H100_STEPS one by one: 470 launches with gaps, products at 0.8 of the ceiling, and the sampler."""
H100_STEPS = {"decode 1 x 1024": 6.2e-3, "decode 32 x 1024": 7.5e-3, "decode 128 x 1024": 12.3e-3,
              "chunk of 512 at 0": 12e-3, "chunk of 2048 at 0": 47e-3}  # fmt: skip
"""Seconds, expected before there was a formula."""

DENSE_PRODUCT = (0.88, 0.8)
"""Shares of the copy's rate and of the product's ceiling that cuBLASLt's products of a layer reach."""
PRODUCT_LAUNCH_SECONDS = 2e-6
CODES_MEMORY = {"MLP": 0.72, "attention": 0.5}
"""Of the copy's rate. By its loop's instructions a product of few rows could take 6.5 TB/s of codes, but its programs
wait for their loads at the beginning and for each other at the end, and attention's matrices are read in 3 to 4 us."""
CODES_COMPUTE = 0.4
"""Of the product's ceiling: weights are made between two matrix instructions, not beside them."""
CODES_WRITTEN_BYTES = 2.5
"""For each weight that is turned into a number before a large product: it is read as a code and written."""


def product_seconds(name: str, rows: int, kind: str, ceilings: Ceilings) -> float:
    """Of one of products.PAIRS."""
    pair, shares, written_bytes = PAIRS[name], DENSE_PRODUCT, 0.0
    if kind == "codes" and rows <= WordMatrix.MOST_ROWS:
        work, shares = pair.work(rows, "codes"), (CODES_MEMORY[name], CODES_COMPUTE)
    else:
        work = pair.work(rows, "bfloat16")
        written_bytes = CODES_WRITTEN_BYTES * pair.values if kind == "codes" else 0.0
    seconds = max(work.memory_seconds(ceilings) / shares[0], work.compute_seconds(ceilings) / shares[1])
    return seconds + written_bytes / ceilings.copy_bytes_per_second + 2 * PRODUCT_LAUNCH_SECONDS


def attention_seconds(case: str, backend: str, window: int | None, ceilings: Ceilings) -> float:
    """Of one call of SHAPE."""
    found = CASES[case]
    if found.sum_of is not None:
        return HYBRID[backend] * sum(attention_seconds(part, backend, window, ceilings) for part in found.sum_of)
    work = found.work(SHAPE, window)
    if found.rotates:
        return work.floor_seconds(ceilings) + LAUNCH_SECONDS
    if all(rows == 1 for _, rows in found.sequences):
        return work.memory_seconds(ceilings) / DECODE_EFFICIENCY + DECODE_SECONDS
    return work.flops / PREFILL_FLOPS[backend, window is not None] + LAUNCH_SECONDS


def step_seconds(work: Work, ceilings: Ceilings) -> float:
    bound = "compute" if work.compute_seconds(ceilings) > work.memory_seconds(ceilings) else "memory"
    factor, seconds = STEP[bound]
    return factor * work.floor_seconds(ceilings) + seconds


def model_step(case: StepCase) -> Work:
    """Of MODEL in bfloat16."""
    model, parameters = _model()
    return step_work(model, parameters, case.spans, SHAPE.cache_dtype)


@cache
def _model() -> tuple[ModelConfig, Mapping[str, jax.ShapeDtypeStruct]]:
    model = open_checkpoint(MODEL, "dummy").config
    _, state = abstract_model(family_of(model.architecture).model, model, max_len=64, dtype=jnp.dtype("bfloat16"))
    return model, abstract_parameters(state, make_mesh())


def server_seconds(policy: str, ceilings: Ceilings) -> dict[str, float]:
    """Of gpu_check.server's load, by the name of what is recorded.

    Streams mostly see steps of decodes alone; one gap in 10 holds a chunk, or one in 30 a whole prompt, so P99 is that
    step. A prompt comes in the middle of a step, half of which it waits.
    """
    context = LOAD.stream_prompt + LOAD.stream_output // 2
    decodes = ((context, 1),) * LOAD.streams
    assert isinstance(SERVER.token_budget, int)

    def seconds(spans: Sequence[tuple[int, int]]) -> float:
        return step_seconds(model_step(StepCase("", tuple(spans))), ceilings)

    alone = seconds(decodes)
    if policy == "prefill_first":
        whole = seconds(((0, LOAD.prompt),))
        slow, first_token = whole + alone, whole + alone / 2
    else:
        rows = SERVER.token_budget - LOAD.streams
        chunks = [seconds((*decodes, (start, min(rows, LOAD.prompt - start)))) for start in range(0, LOAD.prompt, rows)]
        slow, first_token = max(chunks), sum(chunks) + alone / 2
    return {"tbt_p50_seconds": alone, "tbt_p99_seconds": slow, "ttft_p50_seconds": first_token}
