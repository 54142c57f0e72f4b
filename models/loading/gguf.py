"""GGUF files: names, dimensions and tensors as Hugging Face has them.

llama.cpp's convert_hf_to_gguf.py and its models' code fix what a file leaves out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

from jaxserve.errors import ModelError
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import gguf_codes
from jaxserve.models.loading.gguf_file import GGUFFile, TensorInfo, read_gguf
from jaxserve.models.loading.quantised.tensor import Encoding, QuantisedTensor
from jaxserve.models.registry import read_config

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
FLOATS = {Kind.F32: np.dtype(np.float32), Kind.F16: np.dtype(np.float16), Kind.BF16: np.dtype(ml_dtypes.bfloat16)}
QUANTISED = (
    Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K,
)  # fmt: skip

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_ROPE_FACTORS = "rope_freqs.weight"
_CHUNK_VALUES = 1 << 17


class GGUFSource:
    """The tensors of a GGUF file under their Hugging Face names. Raises ModelError for what cannot be served."""

    def __init__(self, path: Path) -> None:
        self.file = read_gguf(path)
        readable = (*FLOATS, *QUANTISED)
        wrong = [f"{name} ({info.kind.name})" for name, info in self.file.tensors.items() if info.kind not in readable]
        if wrong:
            supported = ", ".join(kind.name for kind in readable)
            raise ModelError(f"{path}: tensor types not supported: {', '.join(wrong)}; supported: {supported}")
        self.config = config_from_gguf(self.file)
        self._architecture = self.file.metadata["general.architecture"]
        # The rope factors are part of the configuration (see _rope_scaling).
        self._names = {hf_name(name, self._architecture): name for name in self.file.tensors if name != _ROPE_FACTORS}

    def names(self) -> set[str]:
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self._names[name]].shape

    def read(self, name: str) -> np.ndarray:
        """Float tensors as stored, mapped from the file; quantised ones as a new float32 array."""
        values = decode(self._bytes(name), self.file.tensors[self._names[name]])
        # The converter stores Gemma's norms around 1.
        return values - 1 if self.config.norm == "rms_plus_one" and name.endswith("norm.weight") else values

    def encoding(self, name: str) -> Encoding | None:
        info = self.file.tensors[self._names[name]]
        return gguf_codes.encoding(info.shape, info.kind)

    def quantised(self, name: str) -> QuantisedTensor:
        info = self.file.tensors[self._names[name]]
        return gguf_codes.quantised(self._bytes(name).reshape(info.shape[0], -1), info.kind)

    def _bytes(self, name: str) -> np.ndarray:
        """``uint8[n]``, a tensor's rows one after the other, in Hugging Face's order."""
        theirs = self._names[name]
        info, data = self.file.tensors[theirs], self.file.bytes_of(theirs)
        if self._architecture == "llama" and ".attn_q." in theirs:
            return unpermute(data.reshape(info.shape[0], -1), self.config.num_heads).reshape(-1)
        if self._architecture == "llama" and ".attn_k." in theirs:
            return unpermute(data.reshape(info.shape[0], -1), self.config.num_kv_heads).reshape(-1)
        return data


def write_hf_folder(source: GGUFSource, folder: Path) -> None:
    """config.json and model.safetensors in float32, for programs that read no GGUF files. ``folder`` exists."""
    tensors = {name: np.ascontiguousarray(source.read(name), np.float32) for name in source.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = hf_config_from_gguf(source.file) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def hf_name(name: str, architecture: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; names without a counterpart stay."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, stem, suffix = match.groups()
        names = _LAYER_NAMES | _SANDWICH_NAMES if architecture in ("gemma2", "gemma3") else _LAYER_NAMES
        return f"model.layers.{layer}.{names[stem]}.{suffix}" if stem in names else name
    stem, _, suffix = name.partition(".")
    return f"{_TOP_NAMES[stem]}.{suffix}" if stem in _TOP_NAMES else name


def unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """q or k rows ``[heads * head_dim, n]`` in Hugging Face's order, rotary halves apart.

    llama.cpp stores the two values that are rotated together next to each other. Rows can be permuted while they are
    still quantised, as no block spans two of them.
    """
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def decode(data: np.ndarray, info: TensorInfo) -> np.ndarray:
    """The values of ``data`` ``uint8[info.num_bytes]``, shaped ``info.shape``."""
    if info.kind in FLOATS:
        return data.view(FLOATS[info.kind]).reshape(info.shape)
    block, block_bytes = GGML_QUANT_SIZES[info.kind]
    values = np.empty(len(data) // block_bytes * block, np.float32)
    # In chunks that stay in the CPU's cache: over the whole tensor, the intermediate arrays cost 4x the time.
    step = _CHUNK_VALUES // block
    for first in range(0, len(data) // block_bytes, step):
        chunk = data[first * block_bytes : (first + step) * block_bytes]
        values[first * block : (first + step) * block] = quants.dequantize(chunk[np.newaxis], info.kind)[0]
    return values.reshape(info.shape)


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Dimensions from the metadata. Raises ModelError."""
    return read_config(hf_config_from_gguf(file), str(file.path))


def hf_config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """The metadata (key names: docs/gguf.md of ggml) in config.json's terms. Raises ModelError."""
    fields = file.fields
    architecture = fields.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{file.path}: architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if fields.integer(f"{architecture}.expert_count", 0, low=0):
        raise ModelError(f"{file.path}: mixtures of experts are not supported in GGUF files")
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: missing tensor token_embd.weight")

    def integer(key: str, default: int | None = None) -> int:
        return fields.integer(f"{architecture}.{key}", default)

    def number(key: str, default: float | None = None) -> float:
        return fields.number(f"{architecture}.{key}", default)

    num_heads, hidden_size, num_layers = (
        integer("attention.head_count"), integer("embedding_length"), integer("block_count"),
    )  # fmt: skip
    head_dim = integer("attention.key_length", hidden_size // num_heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if integer(key, head_dim) != head_dim:
            raise ModelError(
                f"{file.path}: {architecture}.{key} is {integer(key)}, supported: the head size {head_dim}"
            )
    values = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": "gemma3_text" if architecture == "gemma3" else architecture,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": integer("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, architecture),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    if architecture in _LAYERS_OF_27B:
        # The files don't say what Gemma's scores are scaled by; only the largest models differ from the head size.
        wide = num_layers == _LAYERS_OF_27B[architecture]
        values |= {
            "query_pre_attn_scalar": hidden_size // num_heads if wide else head_dim,
            "sliding_window": integer("attention.sliding_window", 4096),
            "rope_local_base_freq": number("rope.freq_base_swa", 10000.0),
            "attn_logit_softcapping": fields.optional_number(f"{architecture}.attn_logit_softcapping"),
            "final_logit_softcapping": fields.optional_number(f"{architecture}.final_logit_softcapping"),
        }
    return values


def _rope_scaling(file: GGUFFile, architecture: str) -> dict[str, Any] | None:
    """As config.json's rope_scaling."""
    fields, trained = file.fields, f"{architecture}.context_length"
    if _ROPE_FACTORS in file.tensors:
        # llama3's scaling, worked out by the converter into a divisor for each frequency: longrope with one list.
        factors = decode(file.bytes_of(_ROPE_FACTORS), file.tensors[_ROPE_FACTORS]).ravel().tolist()
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": fields.integer(trained),
        }
    prefix = f"{architecture}.rope.scaling."
    kind = fields.text(f"{prefix}type", "none")
    known = [f"{prefix}{key}" for key in ("type", "finetuned", "factor", "original_context_length")]
    others = [key for key in file.metadata if key.startswith(prefix) and key not in known]
    if kind not in ("none", "linear", "yarn") or others:
        found = ", ".join([f"{prefix}type = {kind}", *others])
        raise ModelError(f"{file.path}: rope scaling not supported: {found}; supported types: none, linear, yarn")
    if kind == "none":
        return None
    return {
        "rope_type": kind,
        "factor": fields.number(f"{prefix}factor", 1.0),
        "original_max_position_embeddings": fields.integer(f"{prefix}original_context_length", fields.integer(trained)),
    }
