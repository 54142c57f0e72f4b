"""Output heads and prefixes as files have them, whatever config.json says: what transformers 5 loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import ModelError
from jaxserve.models.loading.checkpoint import HuggingFaceCheckpoint, open_checkpoint
from jaxserve.models.registry import family_of
from tests.models.golden import Golden, names

Tensors = dict[str, np.ndarray]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def changed(
    folder: Path, name: str, tensors: Callable[[Tensors], Tensors], config: dict[str, Any] | None = None
) -> Path:
    """A copy of the reference checkpoint ``name``."""
    shutil.copytree(Golden(name).checkpoint, folder, dirs_exist_ok=True)
    raw = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


def opened(folder: Path) -> HuggingFaceCheckpoint:
    checkpoint = open_checkpoint(str(folder))
    assert isinstance(checkpoint, HuggingFaceCheckpoint)
    return checkpoint


def stored(checkpoint: HuggingFaceCheckpoint) -> Tensors:
    """The tensors that a checkpoint's parameters are built from, under the family's names."""
    source = checkpoint._source
    weights = family_of(checkpoint.config.architecture).weights(checkpoint.config)
    wanted = {part.name for weight in weights.values() for part in weight}
    assert wanted <= source.names()
    assert all("inv_freq" in name for name in source.names() - wanted)
    return {name: source.read(name) for name in wanted}


def assert_same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


OWN = np.random.default_rng(1).normal(size=(96, 32)).astype(np.float32)


def with_head(head: np.ndarray) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {HEAD: head}


def test_a_head_that_differs_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = opened(changed(tmp_path, "llama_gqa_tied", with_head(OWN)))
    assert not checkpoint.config.tie_word_embeddings
    np.testing.assert_array_equal(stored(checkpoint)[HEAD], OWN)
    assert caplog.messages == [
        f"tie_word_embeddings is true, but the files have {HEAD}, which differs from {EMBEDDING}: it is used"
    ]
    untied = opened(changed(tmp_path / "untied", "llama_gqa_tied", with_head(OWN), {"tie_word_embeddings": False}))
    assert untied.config == checkpoint.config
    assert_same(stored(checkpoint), stored(untied))


@pytest.mark.parametrize("dtype", [np.float32, None], ids=["in another type", "in the same type"])
def test_a_head_that_is_the_same_stays_tied(tmp_path: Path, dtype: Any, caplog: pytest.LogCaptureFixture) -> None:
    def again(tensors: Tensors) -> Tensors:
        return tensors | {HEAD: tensors[EMBEDDING].astype(dtype or tensors[EMBEDDING].dtype)}

    checkpoint = opened(changed(tmp_path, "llama_gqa_tied", again))
    assert checkpoint.config.tie_word_embeddings
    assert HEAD not in stored(checkpoint)
    assert not caplog.messages


def test_the_last_row_may_be_what_differs(tmp_path: Path) -> None:
    def nearly(tensors: Tensors) -> Tensors:
        head = tensors[EMBEDDING].copy()
        head[-1, -1] += 1
        return tensors | {HEAD: head}

    assert not opened(changed(tmp_path, "llama_gqa_tied", nearly)).config.tie_word_embeddings


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    checkpoint = opened(changed(tmp_path, "llama_gqa_tied", with_head(OWN[:90])))
    weights = family_of(checkpoint.config.architecture).weights(checkpoint.config)
    head = {"lm_head": jax.ShapeDtypeStruct((96, 32), jnp.float32)}
    with pytest.raises(ModelError, match=r"mis-shaped lm_head\.weight \(90, 32\) for lm_head \(96, 32\)"):
        checkpoint.check(head, weights)


@pytest.mark.parametrize("name", ["llama_gqa_tied", "gemma_mqa", "gpt2_learned", "falcon_7b", "qwen2_bias"])
def test_a_head_alone_is_the_embedding_too(tmp_path: Path, name: str) -> None:
    original = opened(Golden(name).checkpoint)
    (embedding,) = family_of(original.config.architecture).weights(original.config)["embedding"]

    def only_head(tensors: Tensors) -> Tensors:
        return tensors | {HEAD: tensors.pop(embedding.name)}

    checkpoint = opened(changed(tmp_path, name, only_head))
    assert checkpoint.config == original.config
    assert_same(stored(checkpoint), stored(original))


@pytest.mark.parametrize("name", [name for name in names() if Golden(name).checkpoint.is_dir()])
def test_the_prefix_may_be_missing_or_twice(tmp_path: Path, name: str) -> None:
    original = opened(Golden(name).checkpoint)
    prefix = family_of(original.config.architecture).base + "."
    for number, rename in enumerate((lambda key: key.removeprefix(prefix), lambda key: prefix + key)):
        folder = changed(tmp_path / str(number), name, lambda tensors, r=rename: {r(k): v for k, v in tensors.items()})
        assert_same(stored(opened(folder)), stored(original))


def test_other_names_are_not_taken_for_anything(tmp_path: Path) -> None:
    folder = changed(tmp_path, "llama_gqa_tied", lambda tensors: {f"other.{k}": v for k, v in tensors.items()})
    checkpoint = opened(folder)
    norm = {"norm.weight": jax.ShapeDtypeStruct((32,), jnp.float32)}
    with pytest.raises(ModelError, match=r"missing model\.norm\.weight; unexpected other\.model\.embed_tokens\.weight"):
        checkpoint.check(norm, family_of(checkpoint.config.architecture).weights(checkpoint.config))


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path, "llama_gqa_tied", lambda tensors: tensors | {"norm.weight": np.ones(32, np.float32)})
    with pytest.raises(ModelError, match=r"norm\.weight and (model\.)?norm\.weight are both model\.norm\.weight"):
        opened(folder)


PREFIXES = (
    "language_model.model.", "model.language_model.", "language_model.", "model.language_model.model.",
    "language_model.model.model.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_models_that_can_see(tmp_path: Path, prefix: str) -> None:
    """transformers' renamings for them ("llava" in its conversion_mapping), and its own mistake from 5.10 to 5.23."""
    raw = json.loads((Golden("gemma3_local").checkpoint / "config.json").read_text())
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": raw}

    def seeing(tensors: Tensors) -> Tensors:
        renamed = {prefix + key.removeprefix("model."): value for key, value in tensors.items()}
        return renamed | {"vision_tower.x": np.ones(1, np.float32)}

    folder = changed(tmp_path, "gemma3_local", seeing)
    (folder / "config.json").write_text(json.dumps(whole))
    assert_same(stored(opened(folder)), stored(opened(Golden("gemma3_local").checkpoint)))
