"""Hugging Face folders: config.json in all its layouts, safetensors files, and parameters built from them."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import ModelError
from jaxserve.models import llama
from jaxserve.models.config import Rope
from jaxserve.models.decoder import Decoder
from jaxserve.models.loading.assemble import STAGING_BYTES, Staging, check
from jaxserve.models.loading.checkpoint import HuggingFaceCheckpoint, open_checkpoint
from jaxserve.models.loading.hf import SafetensorsSource
from jaxserve.models.registry import family_of, read_config
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import abstract_model, abstract_parameters
from tests.models.golden import Golden, names

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def tensors(raw: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random weights of ``raw`` under Hugging Face's names."""
    hidden, inner, vocab = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    kv = hidden * raw["num_key_value_heads"] // raw["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(raw["num_hidden_layers"]):
        sizes = {"self_attn.q": (hidden, hidden), "self_attn.k": (kv, hidden), "self_attn.v": (kv, hidden)}
        sizes |= {"self_attn.o": (hidden, hidden), "mlp.gate": (inner, hidden), "mlp.up": (inner, hidden)}
        shapes |= {f"model.layers.{i}.{k}_proj.weight": s for k, s in (sizes | {"mlp.down": (hidden, inner)}).items()}
        shapes |= {f"model.layers.{i}.{k}_layernorm.weight": (hidden,) for k in ("input", "post_attention")}
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(folder: Path, weights: dict[str, np.ndarray], raw: dict[str, Any] = RAW, shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard, members in enumerate(np.array_split(sorted(weights), shards)):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: weights[name] for name in map(str, members)}, folder / file)
        weight_map |= dict.fromkeys(map(str, members), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def abstract(raw: dict[str, Any] = RAW, tensor: int = 1, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    _, state = abstract_model(Decoder, read_config(raw), max_len=64, dtype=dtype)
    return abstract_parameters(state, make_mesh(tensor))


def load(folder: Path, **options: Any) -> dict[str, jax.Array]:
    checkpoint = open_checkpoint(str(folder))
    wanted, weights = abstract(**options), llama.weights(checkpoint.config)
    checkpoint.check(wanted, weights)
    return checkpoint.load(wanted, weights)


def test_config_and_its_defaults() -> None:
    config = read_config(RAW)
    assert (config.head_dim, config.num_kv_heads, config.norm_eps) == (8, 2, 1e-6)
    assert config.rope == Rope(theta=10000.0, dim=8)
    assert read_config(RAW | {"head_dim": 16, "num_key_value_heads": None}).head_dim == 16


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("kind", "options", "outside", "expected"),
    [
        ("linear", {"factor": 2.0}, {}, {"factor": 2.0}),
        ("dynamic", {"factor": 2.0}, {}, {"factor": 2.0}),
        ("yarn", {"factor": 4.0}, {}, {"factor": 4.0, "original_max_position_embeddings": 4096}),
        ("llama3", LLAMA3 | {"original_max_position_embeddings": 512}, {}, {"original_max_position_embeddings": 512}),
        ("longrope", LONGROPE, {"original_max_position_embeddings": 256}, {"original_max_position_embeddings": 256}),
    ],
)
def test_rope_kinds_in_every_layout(
    kind: str, options: dict[str, Any], outside: dict[str, Any], expected: dict[str, Any]
) -> None:
    layouts = [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **options}},
        {"rope_theta": 5e5, "rope_scaling": {"type": kind, **options}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "ignored", "rope_type": kind, **options}},
        {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **options}},
    ]
    for layout in layouts:
        config = read_config(RAW | outside | layout)
        assert config.rope == Rope(theta=5e5, dim=8, kind=kind, options=options | expected)


def test_default_rope_in_new_layout() -> None:
    config = read_config(RAW | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert config.rope == Rope(theta=1e6, dim=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope kind 'mrope' is not supported; supported: default, linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {"type": "longrope", **LONGROPE, "long_factor": [1.0]}}, "long_factor must hold 4 numbers"),
        ({"partial_rotary_factor": 0.4}, "rotary embeddings need an even number of dimensions, got 3"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; supported: silu, gelu"),
        ({"hidden_size": "32"}, r"hidden_size must be an integer in \[1, 16777216\], found '32'"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers must be an integer in \[1, 4096\], found 0"),
    ],
)
def test_config_that_cannot_be_served(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_config(RAW | change)


@pytest.mark.parametrize("found", [["MambaForCausalLM"], None, []])
def test_unknown_architecture(found: Any, tmp_path: Path) -> None:
    write(tmp_path, {}, RAW | {"architectures": found})
    with pytest.raises(ModelError, match=r"(?=.*architecture).*(LlamaForCausalLM|one name)"):
        open_checkpoint(str(tmp_path))


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither config\.json"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object, found list"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_as_stored(dtype: Any, shards: int, tmp_path: Path) -> None:
    weights = tensors(RAW, dtype)
    source = SafetensorsSource(write(tmp_path, weights, shards=shards))
    assert source.names() == set(weights)
    for name, expected in weights.items():
        read = source.read(name)
        assert (source.shape(name), read.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(read, expected)


def test_parameters_are_built_cast_and_sharded(tmp_path: Path) -> None:
    weights = tensors(RAW)
    whole = load(write(tmp_path, weights))
    gate, up = (weights[f"model.layers.1.mlp.{k}_proj.weight"] for k in ("gate", "up"))
    np.testing.assert_array_equal(whole["layers.1.mlp.gate_up"], np.stack([gate, up]))
    split = load(tmp_path, tensor=2, dtype=jnp.bfloat16)
    assert list(split) == list(whole)
    for name, spec in abstract(tensor=2, dtype=jnp.bfloat16).items():
        assert (split[name].sharding, split[name].dtype) == (spec.sharding, jnp.bfloat16)
        np.testing.assert_array_equal(split[name], whole[name].astype(jnp.bfloat16))


def test_parameters_outlive_their_file(tmp_path: Path) -> None:
    weights = tensors(RAW)
    loaded = load(write(tmp_path, weights))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    np.testing.assert_array_equal(loaded["embedding"], weights["model.embed_tokens.weight"])


def test_no_sharding_means_the_first_device(tmp_path: Path) -> None:
    write(tmp_path, tensors(RAW))
    bare = {name: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for name, spec in abstract().items()}
    loaded = open_checkpoint(str(tmp_path)).load(bare, llama.weights(read_config(RAW)))
    assert {device for array in loaded.values() for device in array.devices()} == {jax.devices()[0]}


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    weights = tensors(RAW)
    extras = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    extras["lm_head.weight"] = weights["model.embed_tokens.weight"]
    assert load(write(tmp_path, weights | extras)).keys() == abstract().keys()


def test_everything_that_does_not_fit_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tensors(RAW)
    del weights["model.norm.weight"], weights["model.layers.0.self_attn.k_proj.weight"]
    weights["model.layers.7.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
    weights["model.layers.1.mlp.down_proj.weight"] = np.ones((32, 47), np.float32)
    weights["model.layers.1.self_attn.q_proj.weight"] = np.ones((33, 32), np.float32)
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *args: pytest.fail("device memory was taken"))
    with pytest.raises(ModelError) as caught:
        load(write(tmp_path, weights))
    for problem in (
        "missing model.layers.0.self_attn.k_proj.weight; missing model.norm.weight",
        "unexpected model.layers.7.mlp.up_proj.weight",
        "mis-shaped model.layers.1.mlp.down_proj.weight (32, 47) for layers.1.mlp.down (32, 48)",
        "mis-shaped model.layers.1.self_attn.q_proj.weight (33, 32), model.layers.1.self_attn.k_proj.weight (16, 32)",
    ):
        assert problem in str(caught.value)
    assert str(caught.value).count(";") == 4


def test_untied_head_is_required(tmp_path: Path) -> None:
    untied = RAW | {"tie_word_embeddings": False}
    write(tmp_path, tensors(RAW), untied)
    with pytest.raises(ModelError, match=r"missing lm_head\.weight \(tie_word_embeddings is false"):
        load(tmp_path, raw=untied)


def test_damaged_files(tmp_path: Path) -> None:
    write(tmp_path, tensors(RAW), shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for kept in (0, 20, len(whole) - 1):
        shard.write_bytes(whole[:kept])
        with pytest.raises(ModelError, match=f"{shard.name}: cannot be read"):
            SafetensorsSource(tmp_path)
    shard.unlink()
    with pytest.raises(ModelError, match=f"index.json: names files that are not there: {shard.name}"):
        SafetensorsSource(tmp_path)
    held = dict(list(load_file(tmp_path / "model-00001-of-00003.safetensors").items())[1:])
    save_file(held, shard)
    with pytest.raises(ModelError, match=f"{shard.name}: missing tensors that model.safetensors.index.json places"):
        SafetensorsSource(tmp_path)


def test_no_weights_and_wrong_types(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no \.safetensors files"):
        SafetensorsSource(tmp_path)
    save_file({"a": np.ones(2, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"a \(I8\); supported: F32, F16, BF16"):
        SafetensorsSource(tmp_path)


def test_assemble_names_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, {"a": np.ones(2, np.float32)})
    with pytest.raises(ModelError, match=r"^here does not fit the model: missing"):
        check("here", SafetensorsSource(tmp_path), abstract(), llama.weights(read_config(RAW)))


@pytest.mark.parametrize("name", names())
def test_parts_are_views_of_the_file(name: str) -> None:
    """So that a device's shard costs the reading of its own bytes, and no host memory besides."""
    checkpoint = open_checkpoint(str(Golden(name).checkpoint))
    if not isinstance(checkpoint, HuggingFaceCheckpoint):
        return  # GGUF: quantised tensors have to be worked out
    family = family_of(checkpoint.config.architecture)
    source = SafetensorsSource(checkpoint.path, family.names_for(checkpoint.config), divide=family.divide)
    for weight in family.weights(checkpoint.config).values():
        for part in weight:
            tensor = source.read(part.name)
            assert np.shares_memory(part.view(tensor), tensor)
            assert not tensor.flags.writeable


def test_staging_bounds_what_is_in_flight_and_lets_a_larger_parameter_go_alone() -> None:
    staging, running, most = Staging(100), [0], [0]

    def stage(num_bytes: int) -> None:
        with staging.reserve(num_bytes):
            running[0] += num_bytes
            most[0] = max(most[0], running[0] if num_bytes <= 100 else running[0] - num_bytes + 100)
            time.sleep(0.001)
            running[0] -= num_bytes

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(stage, [30, 60, 250, 50, 100, 20, 20, 20, 20, 20, 250, 70]))
    assert most[0] <= 100
    assert STAGING_BYTES == 2**30
