"""The backends of attention, and which of them computes it on a device."""

from __future__ import annotations

import logging

from jaxserve.kernels.backend import AttentionShape, Backend, Target
from jaxserve.kernels.cpu_attention import Native
from jaxserve.kernels.mosaic_attention import Mosaic
from jaxserve.kernels.pod_attention import Pod
from jaxserve.kernels.triton_attention import Triton
from jaxserve.kernels.xla import Xla

logger = logging.getLogger(__name__)

GPU_BACKENDS: dict[str, type[Triton]] = {backend.name: backend for backend in (Triton, Pod, Mosaic)}
BACKENDS: dict[str, type[Backend]] = {Xla.name: Xla, Native.name: Native, **GPU_BACKENDS}
"""By name."""


def choose_backend(name: str, target: Target, shape: AttentionShape, *others: AttentionShape) -> Backend:
    """The backend ``name``, one of config.ATTENTION_BACKENDS; ValueError where it cannot serve.

    One plan is for all layers: it is cut for ``shape``, that of the layers with the longest heads, and serves
    ``others``.

    auto: native on CPUs in float32 or bfloat16 with a C++ compiler, triton on GPUs with jax-triton, xla otherwise.
    """
    backend = _automatic(target, shape, *others) if name == "auto" else BACKENDS[name]
    if needed := _missing(backend, target, shape, *others):
        raise ValueError(f"attention_backend {name} needs {needed}")
    return backend.of(target, shape)


def gpu_variants(target: Target, shape: AttentionShape) -> dict[str, Backend]:
    """What is worth timing against each other on a GPU, by name; those of them that serve it. The default is first."""
    found: dict[str, Backend] = {
        name: backend.of(target, shape)
        for name, backend in GPU_BACKENDS.items()
        if not backend.needs(target, shape)
    }  # fmt: skip
    if found:
        found[f"{Triton.name}, 2 prefill programs"] = Triton.of(target, shape).with_prefill_programs(2)
    return found


def _missing(backend: type[Backend], target: Target, *shapes: AttentionShape) -> str | None:
    return next(filter(None, (backend.needs(target, shape) for shape in shapes)), None)


def _automatic(target: Target, *shapes: AttentionShape) -> type[Backend]:
    if target.platform == "cpu":
        return Xla if _missing(Native, target, *shapes) else Native
    if missing := _missing(Triton, target, *shapes):
        logger.warning("attention runs in plain XLA, which is slow on GPUs: its kernels need %s", missing)
        return Xla
    return Triton
