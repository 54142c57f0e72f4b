"""Ahead-of-time compilation: its options, parallel builds, the persistent cache, and the count of compilations."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import jax
import jax.monitoring

from jaxserve.errors import ConfigError
from jaxserve.progress import progress_bar

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

GPU_OPTIONS: dict[str, str | bool | int] = {
    # XLA's default and WHILE: without it the sampler's loops stay out of the step's CUDA graph and its branches with
    # them, and at each branch the host waits for the device. Collectives stay between graphs, as by default: with
    # COLLECTIVES a step is one graph on any mesh, but XLA captures its collectives anew in every run (see
    # docs/results/parallel.md), so it is to be measured first.
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    # Kernels of a graph that share no data may run at once.
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    # It counts the donated cache more than once, finds no room and computes again what it could keep, at worst what
    # writes to the cache.
    "xla_disable_hlo_passes": "rematerialization",
}
GEMM_OPTIONS: dict[str, dict[str, str | bool | int]] = {
    "auto": {},
    "no_split_k": {"xla_gpu_experimental_force_split_k": 1},
    "cublaslt": {"xla_gpu_enable_triton_gemm": False},
}
"""By config.GEMM_BACKENDS."""


def gpu_options(gemm_backend: str) -> dict[str, str | bool | int]:
    """XLA's options for an engine's programs on GPUs. ``gemm_backend``: one of config.GEMM_BACKENDS.

    Those that the environment's XLA_FLAGS name are left out: what the user says there holds.
    """
    given = {flag.removeprefix("--").partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    options = GPU_OPTIONS | GEMM_OPTIONS[gemm_backend]
    return {name: value for name, value in options.items() if name not in given}


def use_persistent_cache(folder: Path) -> None:
    """Keep compiled programs in ``folder``, so that the next start loads them instead of compiling.

    XLA's choices of GPU kernels, which it times, are kept there too, each by itself: programs that differ a little, or
    come with another version of the engine, find those of the products that they share.

    This is jax's process-wide setting; the first engine of a process decides. Raises ConfigError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"compilation_cache: cannot use {str(folder)!r}: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_all[Key: Hashable](
    lower: Mapping[Key, Callable[[], jax.stages.Lowered]], *, show_progress: bool
) -> dict[Key, jax.stages.Compiled]:
    """Lower and compile every program, in parallel threads, with a progress bar."""
    with (
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
        progress_bar("compiling", len(lower), "program", disable=not (show_progress and lower)) as bar,
    ):

        def build(key: Key) -> jax.stages.Compiled:
            compiled = lower[key]().compile()
            bar.update()
            return compiled

        return dict(zip(lower, pool.map(build, lower), strict=True))


class CompiledPrograms[Key: Hashable]:
    """Programs by key, compiled ahead, in the background, or else when first asked for."""

    def __init__(self, lower: Mapping[Key, Callable[[], jax.stages.Lowered]]) -> None:
        self._lower = lower
        self._compiled: dict[Key, jax.stages.Compiled] = {}
        self._background: dict[Key, Future[jax.stages.Compiled]] = {}
        # One after the other: somebody is being served.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile")

    def compile(self, keys: Iterable[Key], *, show_progress: bool) -> None:
        """At once and in parallel."""
        self._compiled |= compile_all({key: self._lower[key] for key in keys}, show_progress=show_progress)

    def compile_in_background(self, keys: Iterable[Key]) -> None:
        self._background |= {key: self._pool.submit(self._build, key) for key in keys}

    def wait(self, timeout_seconds: float) -> bool:
        """Whether nothing is being compiled in the background, after at most ``timeout_seconds``."""
        return not wait(self._background.values(), timeout_seconds).not_done

    def __getitem__(self, key: Key) -> jax.stages.Compiled:
        if key not in self._compiled:
            future = self._background.get(key)
            self._compiled[key] = self._build(key) if future is None else future.result()
        return self._compiled[key]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._background.clear()
        self._compiled.clear()

    def _build(self, key: Key) -> jax.stages.Compiled:
        return self._lower[key]().compile()


class CompileCounter:
    """Counts the programs that the thread inside ``with counter`` compiles, or loads from the persistent cache.

    After warm-up the engine steps inside it, and the count must stay 0: whatever raises it stalled a step.
    """

    def __init__(self) -> None:
        self.count = 0
        self._thread: int | None = None
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def __enter__(self) -> None:
        self._thread = threading.get_ident()

    def __exit__(self, *exception: object) -> None:
        self._thread = None

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILE_EVENT and self._thread == threading.get_ident():
            self.count += 1
