"""The stages, in the order in which they run: first what others rely on, then what is most worth knowing."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.evaluation.gpu_check.stage import Stage

SEVERAL_PROCESSES = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1"}
"""Of the device's memory, for each process that compiles and checks kernels beside others."""
COUNT_GRAPHS = {"TF_CPP_VMODULE": "command_buffer_thunk=3", "TF_CPP_MIN_LOG_LEVEL": "0"}
"""XLA says when it captures and when it updates a CUDA graph."""
HIGHEST_PRECISION = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
"""A GPU's products of float32 are TF32 otherwise, too coarse for comparisons with transformers."""

STAGES = (
    Stage("machine", "machine", 10, 30),
    Stage("graphs", "graphs", 15, 60, needs_graphs=True),
    Stage("correctness", "correctness", 40, 120, SEVERAL_PROCESSES),
    Stage("golden", "golden", 15, 40, HIGHEST_PRECISION),
    Stage("attention", "attention", 40, 110),
    Stage("products", "products", 30, 60),
    Stage("steps", "steps", 60, 150, COUNT_GRAPHS, ("cublaslt", "16", "32", "128", "512", "2048")),
    Stage("server", "server", 70, 160),
    Stage("counters", "counters", 25, 50),
    # What other products gain, which take longer to tune. With a budget of 470 seconds there is hardly ever time.
    Stage("tuned-steps", "steps", 90, 180, arguments=("auto", "128", "2048")),
    Stage("no-split-k-steps", "steps", 60, 150, arguments=("no_split_k", "128", "2048")),
    Stage("archive", "archive", 2, 15),
)
TINY_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}
"""Compiling is all that takes time."""
HANGING = Stage("hanging", "hanging", 0, 1, hangs=True)
"""Ignores SIGTERM."""


def tiny_stages() -> list[Stage]:
    """The same on a CPU, with time limits for a slow one and with a stage that hangs."""
    stages = [
        replace(stage, environment=TINY_ENVIRONMENT, least_seconds=1, limit_seconds=300, arguments=())
        for number, stage in enumerate(STAGES)
        if stage.module not in {earlier.module for earlier in STAGES[:number]}
    ]
    return [*stages[:1], HANGING, *stages[1:]]
