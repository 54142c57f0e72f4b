"""The AVX-512 code of products by codes, its instructions in plain C++, against what this processor's own give."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels import cpu_codes, native
from jaxserve.kernels.instruction_sets import AVX2, Processor
from jaxserve.models.layers import gate_of
from jaxserve.models.matrix import PanelCodes
from tests.kernels.test_cpu_codes import drawn, rows_of

EMULATED = Path(__file__).parent / "emulated"
PARTS = {"avx512": ("F", "BW"), "avx512_vnni": ("F", "BW", "VNNI")}

pytestmark = pytest.mark.skipif(
    not native.available() or not AVX2.runs_on(Processor.here()),
    reason="needs a C++ compiler, and AVX2 to compare with",
)


@pytest.fixture(scope="module", params=PARTS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The product's name, compiled for a set."""
    library, name = tmp_path_factory.mktemp(request.param) / "codes.so", f"jaxserve_multiply_codes_{request.param}"
    command = [
        native._compiler() or "", *native.FLAGS, "-O1", *AVX2.flags, f"-I{EMULATED}", f"-I{jax.ffi.include_dir()}",
        *(f"-D__AVX512{part}__" for part in PARTS[request.param]),
        "-shared", str(native.FOLDER / "cpu_codes.cc"), "-o", str(library),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).jaxserve_multiply_codes
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    return name


@pytest.fixture
def emulated(target: str, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Products are its, until the patches are undone."""
    monkeypatch.setattr(cpu_codes, "MULTIPLY_CODES", target)
    return monkeypatch


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_to_the_last_bit(bits: int, is_int8: bool, dtype: str, emulated: pytest.MonkeyPatch) -> None:
    matrix = PanelCodes.of(drawn(90, 160, bits, 32)[0], is_int8=is_int8)
    x = rows_of(23, 160, dtype)
    found = [np.asarray(matrix.multiply(x[:rows]), np.float32) for rows in (1, 3, 9, 23)]
    emulated.undo()
    for rows in found:  # by float32 rows: AMX has products of its own for others
        expected = matrix.multiply(x[: len(rows)].astype("float32")).astype(dtype)
        np.testing.assert_array_equal(rows, np.asarray(expected, np.float32))


def test_gates(emulated: pytest.MonkeyPatch) -> None:
    """One panel more than pairs of them."""
    matrix = PanelCodes.of(drawn(80, 64, gate="silu")[0])
    x = rows_of(5, 64)
    found = matrix.gated(x, None, gate_of("silu"), None)
    emulated.undo()
    np.testing.assert_allclose(found, matrix.gated(x, None, gate_of("silu"), None), rtol=1e-6)
    assert jnp.isfinite(found).all()
