"""Compiles for an H100 that is not there, as two starts of an engine would: gpu_programs.py FOLDER START [more].

FOLDER/cache is the engine's; FOLDER/START gets what XLA tells of a matrix product, the text of a step, the memory that
blocks which come back from the swap space take; with more the compiled sampler of 128 sequences and a vocabulary of
131,072, and reports of steps with quantised weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config import EngineConfig
from jaxserve.engine.compile import gpu_options, use_persistent_cache
from jaxserve.engine.programs import StepPrograms
from jaxserve.engine.sampler import SamplingInputs, sample
from jaxserve.evaluation.aot import DEVICES, ProgramReport, absent_mesh, compile_forward
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.matrix import MatrixLayout, QuantisedMatrix
from jaxserve.models.weights import Weight

CODES = ((4, 16), (4, 512), (8, 512))
"""Bits, and rows: products of the Triton kernel, and of XLA."""


def main(folder: Path, start: str, *more: str) -> None:
    device = DEVICES["h100"]
    mesh = absent_mesh(device)
    out = folder / start
    out.mkdir()

    def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec()))

    model = open_checkpoint("mistral-7b", "dummy").config
    shallow = dataclasses.replace(model, num_layers=2, windows=model.windows[:2])
    config = EngineConfig(model="mistral-7b", dtype="bfloat16", token_budget=16, attention_backend="triton")
    resolved = config.resolve(model_max_len=4096, on_gpu=True)
    programs = StepPrograms(
        resolved, shallow, mesh, target=device.target, gpu_memory_bytes=int(0.92 * device.memory_bytes)
    )
    (out / "step.mlir").write_text(programs.lower_forward(16).as_text() + programs.lower_sample(16).as_text())
    swap_in = programs.lower_swap_in().compile().memory_analysis()
    (out / "swap.json").write_text(json.dumps([swap_in.temp_size_in_bytes, swap_in.alias_size_in_bytes]))

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return x @ y

    use_persistent_cache(folder / "cache")
    lowered = jax.jit(product, compiler_options=gpu_options("auto")).lower(array(64, 64), array(64, 64))
    lowered.compile(compiler_options={"xla_dump_to": str(out)})
    if more:
        ints = (array(128, dtype="int32"),) * 3
        inputs = SamplingInputs(*(array(128),) * 3, *ints)
        compiled = jax.jit(sample, compiler_options=gpu_options("auto")).lower(array(128, 131072), inputs).compile()
        (out / "sampler.txt").write_text(compiled.as_text() or "")
        reports = [dataclasses.asdict(report(*case, shallow, mesh)) for case in CODES]
        (out / "codes.json").write_text(json.dumps(reports))


def report(bits: int, rows: int, model: ModelConfig, mesh: Mesh) -> ProgramReport:
    """Of a step whose layers' matrices stay codes."""
    config = EngineConfig(
        model="mistral-7b", dtype="bfloat16", token_budget=rows, max_num_seqs=16, num_blocks=1024,
        attention_backend="triton", quantization="codes",
    )  # fmt: skip
    programs = StepPrograms(
        config.resolve(model_max_len=4096, on_gpu=True), model, mesh, target=DEVICES["h100"].target,
        plan_codes=partial(planned, bits),
    )  # fmt: skip
    return compile_forward(programs, rows)


def planned(
    bits: int,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    weights: Mapping[str, Weight],
    layouts: Mapping[str, MatrixLayout],
) -> dict[str, QuantisedMatrix]:
    """Groups of 128 without zeros, as many files have them."""
    found = {}
    for name, layout in layouts.items():
        spec = abstract[name]
        outputs, inputs = spec.shape[: layout.num_outputs], math.prod(spec.shape[layout.num_outputs :])
        if name.startswith("layers."):
            codes, scales = (
                jax.ShapeDtypeStruct(
                    (*outputs, width), jnp.dtype(dtype), sharding=NamedSharding(spec.sharding.mesh, PartitionSpec())
                )
                for width, dtype in ((inputs * bits // 8, "uint8"), (inputs // 128, "float16"))
            )
            found[name] = QuantisedMatrix(
                codes, scales, zeros=None, minima=None, order=None, layout=layout, bits=bits, group=128,  # type: ignore[arg-type]
                zero=2 ** (bits - 1), dtype=spec.dtype, division=None,
            )  # fmt: skip
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
