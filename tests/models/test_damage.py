"""Files that are damaged, cut off, or not there at all: one ModelError that names the file and the reason."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxserve.errors import ModelError
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.loading.files import read_json
from jaxserve.models.loading.hf import SafetensorsSource
from tests.models.folders import CONFIG, word_folder
from tests.models.golden import Golden

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 4968\n" % (b"ab" * 32)
TENSORS = {"a": np.ones((2, 3), np.float32), "b": np.zeros(5, np.float16)}


def test_lfs_pointers_are_named_wherever_they_lie(tmp_path: Path) -> None:
    def load() -> None:
        checkpoint = open_checkpoint(str(tmp_path))
        checkpoint.tokenizer()
        checkpoint.check({}, {})

    word_folder(tmp_path, config=CONFIG | {"tie_word_embeddings": False}, tokenizer_config={}, generation_config={})
    save_file({}, tmp_path / "model.safetensors")
    load()
    for name in (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
        "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    ):  # fmt: skip
        path = tmp_path / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(POINTER)
        with pytest.raises(ModelError) as caught:
            load()
        assert str(caught.value).startswith(f"{path}: a Git LFS pointer, not the file itself; run git lfs install and ")
        path.unlink() if before is None else path.write_bytes(before)
    load()


def test_lfs_pointers_in_shards_and_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(POINTER)
    with pytest.raises(ModelError, match=r"m\.gguf: a Git LFS pointer, not the file itself; run .*git lfs pull in "):
        open_checkpoint(str(tmp_path / "m.gguf"))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": TENSORS["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(POINTER)
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: a Git LFS pointer"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: Expecting value"),
        (b'{"a": 1', "not JSON: Expecting"),
        (b"<!DOCTYPE html>", "not JSON: Expecting value"),
        (b"\xff\xfe{\x00}\x00", "cannot be read: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "not JSON: .*recursion"),
        (b"1" * 10_000, "not JSON: .*digits"),
        (b"[]", "must hold a JSON object, found list"),
        (b"null", "must hold a JSON object, found NoneType"),
    ],
)
def test_json_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"config\.json: {message}"):
        read_json(path)


def test_json_with_a_byte_order_mark_and_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "b.json").mkdir()
    with pytest.raises(ModelError, match=r"b\.json: cannot be read: .*Is a directory"):
        read_json(tmp_path / "b.json")
    assert read_json(tmp_path / "c.json") == {}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map must name the file of each tensor, found none"),
        ({"weight_map": {}}, "weight_map must name the file of each tensor, found none"),
        ({"weight_map": ["a"]}, "weight_map must be an object, found"),
        ({"weight_map": {"a": 1}}, r"weight_map\.a must be a string, found 1"),
        ({"weight_map": {"a": None}}, r"weight_map\.a must be the name of a file in this folder, found None"),
        ({"weight_map": {"a": ""}}, r"weight_map\.a must be the name of a file in this folder, found ''"),
        ({"weight_map": {"a": "../x.safetensors"}}, r"weight_map\.a must be the name of a file in this folder"),
        ({"weight_map": {"a": "/x.safetensors"}}, r"weight_map\.a must be the name of a file in this folder"),
        ({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}, "names files that are not there: y.safetensors"),
        ({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}, "missing tensors that .* places there: b"),
        ({"weight_map": {"a": "."}}, "names files that are not there: "),
    ],
)
def test_index(tmp_path: Path, index: Any, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": TENSORS["a"]}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=message):
        SafetensorsSource(tmp_path)


def test_one_file_goes_before_an_index(tmp_path: Path) -> None:
    """As in transformers: who merges shards may leave the index behind."""
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert SafetensorsSource(tmp_path).names() == {"a", "b"}


def test_other_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"holds no \.safetensors files; found: pytorch_model\.bin"):
        SafetensorsSource(tmp_path)


def safetensors_with(header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_with({"a": entry("F32", [2], [0, 8])}, b"1234567"),
        safetensors_with({"a": entry("F32", [2], [0, 8])}, b"123456789"),
        safetensors_with({"a": entry("F32", [3], [0, 8])}, bytes(8)),
        safetensors_with({"a": entry("F16", [2], [0, 8])}, bytes(8)),
        safetensors_with({"a": entry("Q99", [2], [0, 8])}, bytes(8)),
        safetensors_with({"a": entry("F32", [-2], [0, 8])}, bytes(8)),
        safetensors_with({"a": entry("F32", [2**62, 2**62], [0, 8])}, bytes(8)),
        safetensors_with({"a": entry("F32", [2], [8, 0])}, bytes(8)),
        safetensors_with({"a": entry("F32", [2], [0, 8]), "b": entry("F32", [2], [4, 12])}, bytes(12)),
        safetensors_with({"a": entry("F32", [2], [0, 8]), "b": entry("F32", [2], [12, 20])}, bytes(20)),
        safetensors_with({"a": {"dtype": "F32"}}, bytes(8)),
        safetensors_with(b"[]", b""),
        safetensors_with(b"{", b""),
        safetensors_with({}, b"", length=2**63),
        safetensors_with({}, b"", length=10**8),
        b"",
        b"PK\x03\x04" + bytes(100),
    ],
    ids=range(17),
)
def test_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read: "):
        SafetensorsSource(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 400), st.dictionaries(st.integers(0, 400), st.integers(0, 255), max_size=4))
def test_any_damage_to_safetensors(tmp_path: Path, kept: int, changes: dict[int, int]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    content = bytearray(path.read_bytes())
    for at, byte in changes.items():
        content[at % len(content)] = byte
    path.write_bytes(content[:kept] if kept < 300 else content)
    with contextlib.suppress(ModelError):
        source = SafetensorsSource(tmp_path)
        for name in source.names():
            assert source.read(name).shape == source.shape(name)


def test_a_whole_file_is_read_as_the_library_does(tmp_path: Path) -> None:
    path = Golden("llama_gqa_tied").checkpoint / "model.safetensors"
    source = SafetensorsSource(path.parent)
    for name, expected in load_file(path).items():
        np.testing.assert_array_equal(source.read(name), expected)
