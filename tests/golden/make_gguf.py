"""Write gguf/<case>.gguf and .npz: random models as llama.cpp's convert_hf_to_gguf.py stores them; see README.md.

Run it in an environment of its own, with torch, transformers, gguf and accelerate:

    python tests/golden/make_gguf.py
"""

from __future__ import annotations

import argparse
import string
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from reference import Config, Continuation, build, make_model
from transformers import AutoModelForCausalLM

PROMPT_LENGTH = 32
FILE_TYPES = {Kind.F32: gguf.LlamaFileType.ALL_F32, Kind.F16: gguf.LlamaFileType.MOSTLY_F16}
FILE_TYPES[Kind.Q8_0] = gguf.LlamaFileType.MOSTLY_Q8_0
# Keys of config.json -> methods of GGUFWriter. query_pre_attn_scalar and sliding_window_pattern have none.
METADATA = {
    "max_position_embeddings": ("context_length",),
    "hidden_size": ("embedding_length",),
    "num_hidden_layers": ("block_count",),
    "intermediate_size": ("feed_forward_length",),
    "num_attention_heads": ("head_count",),
    "num_key_value_heads": ("head_count_kv",),
    "head_dim": ("key_length", "value_length"),
    "rms_norm_eps": ("layer_norm_rms_eps",),
    "rope_theta": ("rope_freq_base",),
    "rope_local_base_freq": ("rope_freq_base_swa",),
    "sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
MERGES = ["t h", "h e", "Ġ t", "Ġt he", "i n", "a n", "e r", "o n", "r e", "Ġ a"]
MERGES += ["Ġ s", "o u", "Ġ w", "e n", "an d", "Ġ and", "in g", "Ġ o", "Ġo f", "er e"]
END = "<|endoftext|>"
TOKENS = [*string.ascii_letters, *string.digits, *".,!?'\"-:;()", "Ġ", "Ċ", *(m.replace(" ", "") for m in MERGES), END]


@dataclass(frozen=True)
class GGUFCase:
    """One random model; `kind` is that of its matrices, vectors are F32 as llama.cpp wants them."""

    architecture: str
    kind: Kind
    config: Config
    matters: tuple[Config, ...] = ()
    metadata_suffices: bool = False  # for transformers, which reads few of the keys


BASE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "eos_token_id": 95}
BASE |= {"max_position_embeddings": 128, "rms_norm_eps": 1e-3, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN2 = {"model_type": "qwen2", **BASE, "hidden_size": 64, "rope_theta": 1000000.0}
QWEN3 = {"model_type": "qwen3", **BASE, "head_dim": 16, "rope_theta": 1000000.0}
# llama.cpp divides queries by the root of head_dim, but in the 27B models, which it knows by their number of layers.
GEMMA = BASE | {"head_dim": 16, "query_pre_attn_scalar": 16, "rms_norm_eps": 1e-2, "sliding_window": 12}
GEMMA2 = {"model_type": "gemma2", **GEMMA, "num_hidden_layers": 4}
GEMMA2 |= {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}
# Only every sixth layer is full, and without a key of its own the local layers' rope base is 10000.
GEMMA3 = {"model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 7, "rope_theta": 1000000.0}
GEMMA3_LINEAR = GEMMA3 | {"rope_local_base_freq": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}

LOCAL_BASE = {"rope_local_base_freq": 1000000.0}
CASES = {
    "qwen2": GGUFCase("qwen2", Kind.F16, QWEN2 | {"tie_word_embeddings": True}, metadata_suffices=True),
    "qwen2_q8_0": GGUFCase("qwen2", Kind.Q8_0, QWEN2, metadata_suffices=True),
    "qwen3": GGUFCase("qwen3", Kind.F32, QWEN3),
    "gemma2": GGUFCase(
        "gemma2",
        Kind.F16,
        GEMMA2,
        ({"attn_logit_softcapping": None}, {"final_logit_softcapping": None}, {"sliding_window": 4096}),
    ),
    "gemma3": GGUFCase(
        "gemma3", Kind.F16, GEMMA3_LINEAR, (LOCAL_BASE, {"rope_local_base_freq": 10000.0}, {"rope_scaling": None})
    ),
    "gemma3_q8_0": GGUFCase("gemma3", Kind.Q8_0, GEMMA3, (LOCAL_BASE, {"sliding_window": 4096})),
}


def round_matrices(model: Any, kind: Kind) -> None:
    """Give the model the weights that a file of this kind has."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            stored = gguf.quants.quantize(parameter.numpy(), kind)
            parameter.data.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind)))


def write(path: Path, model: Any, case: GGUFCase) -> None:
    """Write the file as llama.cpp's converter does: its names, and Gemma's norm weights with one added."""
    writer = gguf.GGUFWriter(path, case.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(path.stem)
    for key, methods in METADATA.items():
        for method in methods if key in case.config else ():
            getattr(writer, f"add_{method}")(case.config[key])
    if scaling := case.config.get("rope_scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_file_type(FILE_TYPES[case.kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL if token == END else gguf.TokenType.NORMAL for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(TOKENS.index(END))
    architectures = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[case.architecture], case.config["num_hidden_layers"])
    shift = 1 if case.architecture.startswith("gemma") else 0
    for name, parameter in model.named_parameters():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs, name
        values = (parameter + shift if name.endswith("norm.weight") else parameter).numpy()
        kind = case.kind if values.ndim > 1 else Kind.F32
        writer.add_tensor(theirs, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_reload(path: Path, case: GGUFCase, made: Continuation) -> None:
    """Load the file with transformers, with the configuration where it does not read all of it from the metadata."""
    config = None if case.metadata_suffices else build(case.config).config
    again = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    difference = (again(made.sequence).logits[0] - made.logits).abs().max().item()
    assert difference < 1e-4, f"{path.name}: as transformers reads it, logits differ by {difference}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "gguf")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    assert len(set(TOKENS)) == BASE["vocab_size"]
    with torch.inference_mode():
        for seed, (name, case) in enumerate(CASES.items()):
            path = args.out / f"{name}.gguf"
            store = partial(round_matrices, kind=case.kind)
            model, made = make_model(case.config, torch.float32, PROMPT_LENGTH, seed, case.matters, store)
            write(path, model, case)
            check_reload(path, case, made)
            made.save(path.with_suffix(".npz"))
            print(f"{name}: {path.stat().st_size / 1000:.0f} KB, {made}")


if __name__ == "__main__":
    main()
