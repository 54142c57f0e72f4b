"""Whole steps of Mistral-7B with random weights, what the device waits for between them, and how often the host updates
a CUDA graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from jaxserve.engine.memory import claim_gpu_memory
from jaxserve.evaluation.device_bench import QUICK, Effort, measure_ceilings
from jaxserve.evaluation.gpu_check.models import STEPS, write_tiny
from jaxserve.evaluation.gpu_check.runner import LOG
from jaxserve.evaluation.gpu_check.stage import Context
from jaxserve.evaluation.step_bench import StepBench, host_gap, step_cases, to_json, why_not
from jaxserve.evaluation.throughput import measure_throughput, random_prompts

TINY_EFFORT = Effort(1, 0.0, 0.1)
TINY_BUCKETS = (16, 64)
LOAD, TINY_LOAD = (128, 512, 48), (4, 20, 4)
"""Requests, tokens of each prompt, and of each output."""
GRAPH_EVENTS = {
    "warm_up": "Executing warm up iteration of command buffer thunk",
    "capture": "Initialize command buffer on device",
    "update": "Update command buffer on device",
}
"""What XLA logs, with TF_CPP_VMODULE=command_buffer_thunk=3."""


def run(context: Context) -> None:
    """``context.arguments``: the gemm_backend and the buckets."""
    effort = TINY_EFFORT if context.tiny else QUICK
    if context.tiny:
        config = replace(
            STEPS, model=write_tiny(context.out / "tiny"), token_budget=64, max_num_seqs=32, max_model_len=1024,
            num_blocks=2200,
        )  # fmt: skip
        buckets = list(TINY_BUCKETS)
    else:
        gemm_backend, *numbers = context.arguments
        config, buckets = replace(STEPS, gemm_backend=gemm_backend), list(map(int, numbers))
    claim_gpu_memory(config.gpu_memory_utilization)
    ceilings = measure_ceilings(effort)  # before the engine takes the memory
    context.records.add("ceilings", **ceilings._asdict())
    bench = StepBench(config, effort, buckets=buckets)
    context.records.add("startup", seconds=bench.engine.startup._asdict(), num_blocks=bench.runner.num_blocks)
    for case in step_cases():
        reason = why_not(case, bench.runner)
        if reason is None:
            context.records.add("step", **to_json(bench.measure(case), ceilings))
        else:
            context.records.add("step", step=case.name, left_out=reason)
    _under_load(context, bench)
    bench.engine.close()


def _under_load(context: Context, bench: StepBench) -> None:
    num_requests, num_prompt_tokens, num_output_tokens = TINY_LOAD if context.tiny else LOAD
    vocab_size = bench.runner.model_config.vocab_size
    prompts = random_prompts(num_requests, num_prompt_tokens, vocab_size)
    measure_throughput(bench.engine, prompts, 4)  # warm, discarded
    before = _graph_events(context)
    gap = host_gap(measure_throughput(bench.engine, prompts, num_output_tokens))
    context.records.add("under_load", **gap, graph_events=_graph_events(context) - before)


def _graph_events(context: Context) -> Counter[str]:
    """How often XLA has logged each, by the stages so far."""
    text = (context.out / LOG).read_text(errors="replace")
    return Counter({name: text.count(message) for name, message in GRAPH_EVENTS.items()})
