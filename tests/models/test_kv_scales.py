"""Scales of an fp8 KV cache, from a checkpoint's tensors to the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve import LLM, SamplingParams
from jaxserve.errors import ModelError
from jaxserve.kernels.cache import KVCacheShape
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.loading.hf import DTYPES, SafetensorsSource
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.pipeline import Stages
from tests.models.golden import Golden
from tests.models.quantised_cases import CASES
from tests.models.test_head import opened
from tests.models.test_quantised_models import rewritten

NAMES = {
    "llm-compressor": ("{}.k_scale", "{}.v_scale"),
    "ModelOpt": ("{}.k_proj.k_scale", "{}.v_proj.v_scale"),
    "fused": ("{}.qkv_proj.k_scale", "{}.qkv_proj.v_scale"),
    "early compressed-tensors": ("{}.k_proj.output_scale", "{}.v_proj.output_scale"),
}
SCALES = np.array([[0.25, 0.5], [2.0, 4.0]], np.float32)


def with_scales(folder: Path, scales: dict[str, Any], original: Path | None = None) -> Path:
    """A checkpoint of two layers with these tensors besides its own."""
    original = original or Golden("llama_gqa_wide_heads").checkpoint
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((original / "config.json").read_text())
    source = SafetensorsSource(original, supported=DTYPES)
    tensors = {name: np.asarray(source.read(name)) for name in source.names()}
    save_file(tensors | {k: np.asarray(v) for k, v in scales.items()}, folder / "model.safetensors")
    return folder


def named(kind: str, scales: np.ndarray = SCALES) -> dict[str, np.ndarray]:
    return {
        name.format(f"model.layers.{layer}.self_attn"): value
        for layer, row in enumerate(scales)
        for name, value in zip(NAMES[kind], row, strict=True)
    }


@pytest.mark.parametrize("kind", NAMES)
def test_names_that_quantisers_have_for_them(kind: str, tmp_path: Path) -> None:
    checkpoint = opened(with_scales(tmp_path, named(kind)))
    assert checkpoint.kv_scales is not None
    np.testing.assert_array_equal(checkpoint.kv_scales, SCALES)
    assert not {name for name in checkpoint._source.names() if "scale" in name}


def test_one_for_keys_and_values(tmp_path: Path) -> None:
    scales = {f"model.layers.{i}.self_attn.kv_scale": np.float32([i + 1]) for i in range(2)}
    checkpoint = open_checkpoint(str(with_scales(tmp_path, scales)))
    assert checkpoint.kv_scales is not None
    assert checkpoint.kv_scales.tolist() == [[1, 1], [2, 2]]


def test_beside_quantised_weights(tmp_path: Path) -> None:
    """Some have names that a quantised module's own tensors could have."""
    whole = rewritten(tmp_path / "whole", "llama_gqa_wide_heads", CASES["float8 of compressed-tensors"], True)
    unused = {f"model.layers.0.self_attn.{name}": np.float32(1) for name in ("q_scale", "q_proj.output_scale")}
    checkpoint = opened(with_scales(tmp_path / "scaled", named("early compressed-tensors") | unused, whole))
    assert checkpoint.kv_scales is not None
    np.testing.assert_array_equal(checkpoint.kv_scales, SCALES)
    assert checkpoint._source.names() == opened(whole)._source.names()
    assert opened(whole).kv_scales is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.self_attn.v_scale": np.float32(0)}, "v_scale must be one positive number, found 0.0"),
        ({"model.layers.1.self_attn.v_scale": np.float32("nan")}, "v_scale must be one positive number, found nan"),
        (
            {"model.layers.1.self_attn.v_scale": np.ones(2, np.float32)},
            r"must be one positive number, found shape \[2\]",
        ),
        ({"model.layers.1.self_attn.v_scale": None}, "has scales of the KV cache, but not v of layer 1"),
    ],
)
def test_scales_that_make_no_sense(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    scales = {name: value for name, value in (named("llm-compressor") | change).items() if value is not None}
    with pytest.raises(ModelError, match=rf"{tmp_path}: .*{message}"):
        _ = open_checkpoint(str(with_scales(tmp_path, scales))).kv_scales


def test_scales_of_other_names_are_not_dropped(tmp_path: Path) -> None:
    checkpoint = opened(with_scales(tmp_path, {"model.layers.0.self_attn.key_scale": np.float32(1)}))
    assert checkpoint.kv_scales is None
    with pytest.raises(ModelError, match=r"unexpected model\.layers\.0\.self_attn\.key_scale"):
        checkpoint.check({}, {})


def test_a_caches_scales() -> None:
    shape = KVCacheShape(2, 2, 8, 8, jnp.dtype(jnp.float8_e4m3fn))
    assert shape.zeros(2, make_mesh()).scales.tolist() == [[1, 1], [1, 1]]
    assert shape.zeros(2, make_mesh(tensor=2, pipe=2), [SCALES]).scales.tolist() == SCALES.tolist()


def test_layers_in_a_pipelines_places() -> None:
    assert Stages(5, 2).all_layers() == [0, 1, 2, 3, 4, 2]


def first_logprob(folder: Path, tokenizer: Path) -> float:
    golden = Golden("llama_gqa_wide_heads")
    with LLM(
        model=str(folder), tokenizer=str(tokenizer), show_progress=False, token_budget=16, max_num_seqs=2,
        block_size=8, num_blocks=24, max_model_len=golden.length, warmup=False, kv_cache_dtype="fp8_e4m3",
    ) as llm:  # fmt: skip
        greedy = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=1)
        (output,) = llm.generate([golden.prompt], greedy, use_tqdm=False)
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    return logprobs[0][output.outputs[0].token_ids[0]].logprob


def test_an_engine_stores_keys_and_values_by_them(
    tmp_path: Path, tiny_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By scales for which most of them are too large for float8 the output changes; without scales, that is said."""
    golden = Golden("llama_gqa_wide_heads")
    plain = first_logprob(golden.checkpoint, tiny_tokenizer)
    warning = "kv_cache_dtype fp8_e4m3: the checkpoint has no scales for keys and values"
    assert any(message.startswith(warning) for message in caplog.messages)
    caplog.clear()
    small = with_scales(tmp_path / "small", named("llm-compressor", np.full((2, 2), 1e-4, np.float32)))
    assert first_logprob(small, tiny_tokenizer) != pytest.approx(plain, abs=0.01)
    assert not any(message.startswith(warning) for message in caplog.messages)
