"""MXFP4 experts against ml_dtypes' formats, and a model that has them against one whose files are decoded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import ModelError
from jaxserve.models.loading import mxfp4
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.registry import family_of
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import abstract_model, abstract_parameters
from tests.models.golden import Golden


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """By definition: E2M1 times E8M0, the lower half of each byte first."""
    halves = np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(*scales.shape, 32)
    values = halves.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    values *= scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)[..., None]
    return values.reshape(*scales.shape[:-1], -1)


def test_every_code_at_every_scale() -> None:
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (251, 1, 1))
    scales = np.repeat(np.arange(2, 253, dtype=np.uint8)[:, None], 16, axis=1)
    got = mxfp4.decode(blocks, scales)
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.astype(np.float64), decoded(blocks, scales))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """gpt-oss's tiny model with random MXFP4 experts, and the same as bfloat16."""
    rng = np.random.default_rng(0)
    folders = tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("plain")
    source = Golden("gpt_oss_sinks").checkpoint
    plain = load_file(source / "model.safetensors")
    packed = dict(plain)
    for name in [name for name in plain if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = packed.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        scales = rng.integers(120, 128, (experts, outputs, inputs // 32), np.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = np.ascontiguousarray(decoded(blocks, scales).swapaxes(1, 2).astype(ml_dtypes.bfloat16))
    raw = json.loads((source / "config.json").read_text())
    for folder, tensors, more in zip(
        folders, (packed, plain), ({"quantization_config": {"quant_method": "mxfp4"}}, {}), strict=True
    ):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(raw | more))
    return folders


def test_a_model_is_loaded_as_if_its_experts_were_bfloat16(packed: tuple[Path, Path]) -> None:
    """Also divided over two devices."""
    loaded = []
    for folder in packed:
        checkpoint = open_checkpoint(str(folder))
        family = family_of(checkpoint.config.architecture)
        _, state = abstract_model(family.model, checkpoint.config, max_len=8, dtype=jnp.dtype("bfloat16"))
        abstract, weights = abstract_parameters(state, make_mesh(2)), family.weights(checkpoint.config)
        checkpoint.check(abstract, weights)
        loaded.append(checkpoint.load(abstract, weights))
    for name, value in loaded[0].items():
        np.testing.assert_array_equal(value, loaded[1][name], err_msg=name)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("down_proj_scales", None, r"missing model\.layers\.0\.mlp\.experts\.down_proj_scales"),
        ("down_proj_blocks", None, r"missing model\.layers\.0\.mlp\.experts\.down_proj_blocks"),
        (
            "down_proj_blocks",
            (4, 32, 1, 8),
            r"down_proj_blocks \(4, 32, 1, 8\) must be of 16 bytes for each of its scales",
        ),
    ],
)
def test_blocks_without_scales_that_fit(
    name: str, shape: tuple[int, ...] | None, message: str, packed: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(packed[0], folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.0.mlp.experts.{name}"]
    if shape is not None:
        tensors[f"model.layers.0.mlp.experts.{name}"] = np.zeros(shape, np.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        open_checkpoint(str(folder)).check({}, {})
