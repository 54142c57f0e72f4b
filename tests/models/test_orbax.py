"""Orbax checkpoints: written from one mesh, restored onto others, and made by scripts/convert.py."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.errors import ModelError
from jaxserve.models.config import ModelConfig, Rope
from jaxserve.models.loading import orbax
from jaxserve.models.loading.checkpoint import OrbaxCheckpoint, open_checkpoint
from jaxserve.models.registry import family_of
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import abstract_model, abstract_parameters
from tests.models.golden import Golden, names

KV_SCALES = np.array([[0.5, 0.25], [2, 3]], np.float32)
SAMPLING = {"temperature": 0.7, "top_k": 20, "max_tokens": 100}
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
    num_kv_heads=4, head_dim=4, max_position_embeddings=64, norm_eps=1e-5,
    rope=Rope(theta=1e4, dim=4, kind="linear", options={"factor": 2.0}),
)  # fmt: skip


def abstract(
    tensor: int, dtype: jnp.dtype = jnp.float32, config: ModelConfig = CONFIG
) -> dict[str, jax.ShapeDtypeStruct]:
    _, state = abstract_model(family_of(config.architecture).model, config, max_len=64, dtype=dtype)
    return abstract_parameters(state, make_mesh(tensor))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, jax.Array]]:
    """A checkpoint written from two devices, and its parameters."""
    random = np.random.default_rng(0)
    parameters = {
        name: jax.device_put(random.normal(size=spec.shape).astype(np.float32), spec.sharding)
        for name, spec in abstract(2).items()
    }
    folder = tmp_path / "checkpoint"
    tokenizer = open_checkpoint("smollm2-135m").tokenizer()
    orbax.save(
        folder, parameters, CONFIG, eos_token_ids=(2, 5), sampling_defaults=SAMPLING, tokenizer=tokenizer,
        kv_scales=KV_SCALES,
    )  # fmt: skip
    return folder, parameters


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_restores_onto_other_meshes(tensor: int, saved: tuple[Path, dict[str, jax.Array]]) -> None:
    folder, parameters = saved
    checkpoint = open_checkpoint(str(folder))
    assert isinstance(checkpoint, OrbaxCheckpoint)
    assert (checkpoint.config, checkpoint.declared_eos) == (CONFIG, (2, 5))
    wanted = abstract(tensor)
    restored = checkpoint.load(wanted, {})
    assert list(restored) == list(wanted)
    for name, spec in wanted.items():
        assert restored[name].sharding == spec.sharding
        np.testing.assert_array_equal(restored[name], parameters[name])
    shard = restored["layers.0.mlp.down"].addressable_shards[0]
    assert shard.data.shape == (16, 24 // tensor)


def test_scales_of_the_kv_cache(saved: tuple[Path, dict[str, jax.Array]]) -> None:
    checkpoint = open_checkpoint(str(saved[0]))
    assert checkpoint.kv_scales is not None
    np.testing.assert_array_equal(checkpoint.kv_scales, KV_SCALES)
    path = saved[0] / orbax.CONFIG
    whole = json.loads(path.read_text())
    for wrong in ([[1, 1]], [[1, 1], [1, 0]], [[1, 1], [1]], "x"):
        path.write_text(json.dumps(whole | {"kv_scales": wrong}))
        with pytest.raises(ModelError, match="kv_scales must be two positive numbers for each of 2 layers"):
            _ = checkpoint.kv_scales
    path.write_text(json.dumps({key: value for key, value in whole.items() if key != "kv_scales"}))
    assert checkpoint.kv_scales is None


def test_casts_and_places_without_a_sharding(saved: tuple[Path, dict[str, jax.Array]]) -> None:
    folder, parameters = saved
    bare = {name: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16) for name, spec in abstract(1).items()}
    for name, restored in orbax.restore(folder, bare).items():
        assert restored.devices() == {jax.devices()[0]}
        np.testing.assert_array_equal(restored, parameters[name].astype(jnp.bfloat16))


def test_everything_that_does_not_fit_is_named_at_once(saved: tuple[Path, dict[str, jax.Array]]) -> None:
    wanted = abstract(1)
    del wanted["norm.weight"]
    wanted["extra"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    wanted["embedding"] = jax.ShapeDtypeStruct((33, 16), jnp.float32)
    with pytest.raises(ModelError, match=r"missing extra; unexpected norm\.weight; mis-shaped embedding \(32, 16\)"):
        orbax.check(saved[0], wanted)


def test_damaged_folders(saved: tuple[Path, dict[str, jax.Array]], tmp_path: Path) -> None:
    folder, parameters = saved
    tokenizer = open_checkpoint(str(folder)).tokenizer()
    with pytest.raises(ModelError, match="already exists, expected a new or empty folder"):
        orbax.save(folder, parameters, CONFIG, eos_token_ids=(), sampling_defaults={}, tokenizer=tokenizer)
    data = max(folder.glob("parameters/**/d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:10])
    with pytest.raises(ModelError, match="parameters: cannot be read: "):
        orbax.restore(folder, abstract(1))
    (folder / "parameters").rename(folder / "elsewhere")
    with pytest.raises(ModelError, match="not a readable Orbax checkpoint"):
        orbax.check(folder, abstract(1))
    (folder / orbax.CONFIG).write_text('{"model": {}}')
    with pytest.raises(ModelError, match=r"jaxserve_config\.json: not a configuration"):
        open_checkpoint(str(folder))


def test_sampling_defaults(saved: tuple[Path, dict[str, jax.Array]]) -> None:
    folder, _ = saved
    checkpoint, path = open_checkpoint(str(folder)), folder / orbax.CONFIG
    assert checkpoint.sampling_defaults == SAMPLING
    described = json.loads(path.read_text())

    def rewrite(sampling: Any) -> None:
        path.write_text(json.dumps(described | {"sampling_defaults": sampling}))

    rewrite({"max_tokens": 0})
    with pytest.raises(ModelError, match=r"jaxserve_config\.json: max_tokens must be an integer in .*, got 0"):
        _ = checkpoint.sampling_defaults
    rewrite([0.7])
    with pytest.raises(ModelError, match=r"sampling_defaults must be a JSON object, found \[0\.7\]"):
        _ = checkpoint.sampling_defaults
    del described["sampling_defaults"]
    path.write_text(json.dumps(described))
    assert open_checkpoint(str(folder)).sampling_defaults == {}, "a folder of before they were kept"


def convert_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert", Path(__file__).parents[2] / "scripts" / "convert.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_convert_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert, folder = convert_script(), tmp_path / "new"
    assert convert.main(["smollm2-135m", str(folder), "--tensor", "3"]) == 0
    assert capsys.readouterr().out == f"wrote {folder}\n"
    original, converted = open_checkpoint("smollm2-135m"), open_checkpoint(str(folder))
    assert converted.config == original.config
    assert converted.declared_eos == original.eos_token_ids(original.tokenizer()) == (2, 0)
    wanted = abstract(1, jnp.bfloat16, original.config)
    loaded = original.load(wanted, family_of(original.config.architecture).weights(original.config))
    for name, restored in converted.load(wanted, {}).items():
        np.testing.assert_array_equal(restored, loaded[name])
    chat = [{"role": "user", "content": "你好 1234"}]
    tokenizers = original.tokenizer(), converted.tokenizer()
    first, second = (t.encode(t.apply_chat_template(chat)) for t in tokenizers)
    assert first == second
    assert tokenizers[1].eos_token_id == 2


def test_convert_script_keeps_sampling_defaults(saved: tuple[Path, dict[str, jax.Array]], tmp_path: Path) -> None:
    assert convert_script().main([str(saved[0]), str(tmp_path / "new")]) == 0
    assert open_checkpoint(str(tmp_path / "new")).sampling_defaults == SAMPLING


def test_convert_script_names_the_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_script().main(["nothing", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith("convert: unknown model 'nothing': expected smollm2-135m")
    assert not (tmp_path / "new").exists()


def test_every_configuration_comes_back(tmp_path: Path) -> None:
    for golden in map(Golden, names()):
        config = open_checkpoint(str(golden.checkpoint)).config
        described = {"model": dataclasses.asdict(config), "eos_token_ids": []}
        (tmp_path / orbax.CONFIG).write_text(json.dumps(described))
        assert orbax.read_config(tmp_path)[0] == config


def test_spec_without_partition(saved: tuple[Path, dict[str, jax.Array]]) -> None:
    """A replicated sharding reads every parameter onto every device."""
    replicated = NamedSharding(make_mesh(4), PartitionSpec())
    wanted = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated) for n, s in abstract(1).items()}
    for name, restored in orbax.restore(saved[0], wanted).items():
        assert restored.is_fully_replicated
        np.testing.assert_array_equal(restored, saved[1][name])


@pytest.mark.parametrize(
    "name",
    ["mistral_window", "mixtral_top2", "internlm_bias", "internlm2_gqa", "qwen2_bias", "qwen3_qknorm",
     "qwen3_moe_mixed", "falcon_40b", "gemma2_softcap", "gemma3_local", "phi3_fused", "gpt2_learned", "llama_gqa_tied"],
)  # fmt: skip
def test_every_family_moves_to_another_mesh(name: str, tmp_path: Path) -> None:
    """Loaded over two devices, saved, restored on one."""
    golden, tokenizer = Golden(name), open_checkpoint("smollm2-135m").tokenizer()
    original = open_checkpoint(str(golden.checkpoint))
    config = original.config
    parameters = original.load(abstract(2, config=config), family_of(config.architecture).weights(config))
    assert any(len(value.sharding.device_set) == 2 for value in parameters.values())
    orbax.save(tmp_path / "saved", parameters, config, eos_token_ids=(2,), sampling_defaults={}, tokenizer=tokenizer)
    restored = open_checkpoint(str(tmp_path / "saved"))
    assert restored.config == config
    for path, value in restored.load(abstract(1, config=config), {}).items():
        np.testing.assert_array_equal(value, parameters[path])
