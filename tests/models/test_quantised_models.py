"""Whole models with quantised weights, beside the same with the weights that these stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models import test_hf
from tests.models.golden import Golden, load, paged_logits
from tests.models.quantised_cases import CASES, Case, Drawn, Tensors


def rewritten(folder: Path, name: str, case: Case, quantised: bool) -> Path:
    """The golden ``name`` with other weights in its layers' projections, and in its head where the configuration says
    so, which ``case`` stores, or else floats."""
    folder.mkdir()
    raw = json.loads((Golden(name).checkpoint / "config.json").read_text())
    config = {"quantization_config": case.config} if quantised else {}
    (folder / "config.json").write_text(json.dumps(raw | config))
    written: Tensors = {}
    for seed, (tensor_name, tensor) in enumerate(
        sorted(load_file(Golden(name).checkpoint / "model.safetensors").items())
    ):
        drawn: Drawn | None = None
        if tensor_name.endswith(("_proj.weight", "_proj_with_mqa.weight")) or (
            tensor_name == "lm_head.weight" and "lm_head" in case.config
        ):
            drawn, tensors = case.encode(tensor.shape, seed)
        if drawn is None:
            written[tensor_name] = tensor
        elif quantised:
            module = tensor_name.removesuffix(".weight")
            written |= {f"{module}.{suffix}": np.ascontiguousarray(t) for suffix, t in (tensors | case.extras).items()}
            # As AutoGPTQ writes it for models that have no biases.
            written.setdefault(f"{module}.bias", np.zeros(tensor.shape[0], np.float16))
        else:
            written[tensor_name] = drawn.truth
    save_file(written, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("golden", "case"),
    [
        ("llama_gqa_wide_heads", "gptq 4 bits, act-order"),
        ("qwen3_moe", "awq"),
        ("phi3_fused", "packed 4 bits, zeros"),
        ("deepseek_v3_groups", "fp8 blocks"),
    ],
)
def test_whole_models(golden: str, case: str, tmp_path: Path) -> None:
    """In families that stack, split and fuse their tensors in every way."""
    tokens = Golden(golden).prompt
    quantised, dense = (
        load(rewritten(tmp_path / str(kind), golden, CASES[case], kind), len(tokens)) for kind in (True, False)
    )
    expected = paged_logits(dense, tokens, [len(tokens)])
    np.testing.assert_allclose(paged_logits(quantised, tokens, [len(tokens)]), expected, atol=1e-3, rtol=0)
    assert np.ptp(expected) > 1


def written(folder: Path, case: Case) -> tuple[Path, Path]:
    """Folders of test_hf's model with quantised projections, and with what they stand for."""
    stored: Tensors = {}
    dense: Tensors = {}
    for seed, (name, tensor) in enumerate(test_hf.tensors(test_hf.RAW).items()):
        if name.endswith("_proj.weight"):
            drawn, encoded = case.encode(tensor.shape, seed)
            prefix = name.removesuffix("weight")
            stored |= {f"{prefix}{suffix}": np.ascontiguousarray(value) for suffix, value in encoded.items()}
            dense[name] = drawn.truth
        else:
            stored[name] = dense[name] = tensor
    config = test_hf.RAW | {"quantization_config": case.config}
    return test_hf.write(folder / "quantised", stored, config, shards=2), test_hf.write(folder / "dense", dense)


def test_divided_among_devices(tmp_path: Path) -> None:
    quantised, dense = written(tmp_path, CASES["awq"])
    expected = test_hf.load(dense)
    for name, found in test_hf.load(quantised, tensor=2).items():
        np.testing.assert_array_equal(found, expected[name])
