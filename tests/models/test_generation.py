"""Sampling defaults from generation_config.json and GGUF metadata: taken, refused by name, or warned about."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from jaxserve.errors import ModelError
from jaxserve.models.loading import generation
from jaxserve.models.loading.checkpoint import open_checkpoint


def write(folder: Path, content: Any) -> Path:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(content))
    return path


def test_hugging_faces_names_become_ours(tmp_path: Path) -> None:
    raw = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "max_new_tokens": 2048, "eos_token_id": 2}
    expected = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "max_tokens": 2048}
    assert generation.from_hf(write(tmp_path, raw)) == expected


@pytest.mark.parametrize("raw", [{}, {"temperature": None, "top_k": None}, {"bos_token_id": 1, "do_sample": True}])
def test_what_is_left_open_stays_open(tmp_path: Path, raw: dict[str, Any]) -> None:
    assert generation.from_hf(write(tmp_path, raw)) == {}
    assert generation.from_hf(tmp_path / "missing.json") == {}


def test_do_sample_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert generation.from_hf(write(tmp_path, {"do_sample": False, "temperature": 1.0})) == {"temperature": 1.0}
    assert generation.from_hf(write(tmp_path, {"do_sample": False})) == {}
    assert not caplog.records


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"temperature": 200}, "temperature must be in [0, 100], got 200"),
        ({"temperature": "0.7"}, "temperature must be in [0, 100], got '0.7'"),
        ({"temperature": True}, "temperature must be in [0, 100], got True"),
        ({"top_p": 0}, "top_p must be in (0, 1], got 0"),
        ({"top_k": 50.0}, "top_k must be an integer in [-1, 2147483647], got 50.0"),
        ({"min_p": [0.1]}, "min_p must be in [0, 1], got [0.1]"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer in [1, 2147483647], got 0"),
    ],
)
def test_bad_values_name_file_key_and_value(tmp_path: Path, raw: dict[str, Any], message: str) -> None:
    path = write(tmp_path, {"top_k": 5, **raw})
    with pytest.raises(ModelError) as caught:
        generation.from_hf(path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_bad_file_is_refused_only_where_it_is_asked_for(tmp_path: Path) -> None:
    """So that generation_config none is the way around it."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
        "num_hidden_layers": 1, "vocab_size": 8, "eos_token_id": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    write(tmp_path, {"top_p": 2})
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(ModelError, match=r"generation_config\.json: top_p must be in \(0, 1\], got 2"):
        _ = checkpoint.sampling_defaults
    write(tmp_path, {"top_p": 0.5})
    assert checkpoint.sampling_defaults == {"top_p": 0.5}


def test_unsupported_keys_are_named_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, {"top_k": 5, "no_repeat_ngram_size": 3, "repetition_penalty": 1.05, "stop_strings": ["a"]})
    assert generation.from_hf(path) == {"top_k": 5}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"{path}: not supported and ignored, though outputs depend on it: "
        "repetition_penalty = 1.05, no_repeat_ngram_size = 3, stop_strings = ['a']"
    )


def test_values_that_do_nothing_are_no_reason_to_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "typical_p": 1, "guidance_scale": None}
    raw |= {"bad_words_ids": [], "token_healing": False, "use_cache": True, "pad_token_id": 0}
    assert generation.from_hf(write(tmp_path, raw)) == {}
    assert not caplog.records


def gguf_file(path: Path, *, top_k: int = 40, penalty: float = 1.0) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length"):
        writer.add_uint32(f"llama.{key}", 4 if key == "embedding_length" else 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_sampling_temp(0.5)
    writer.add_sampling_top_p(0.75)
    writer.add_sampling_min_p(0.25)
    writer.add_sampling_top_k(top_k)
    writer.add_sampling_penalty_repeat(penalty)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = {"temperature": 0.5, "top_p": 0.75, "top_k": 40, "min_p": 0.25}
    assert open_checkpoint(str(gguf_file(tmp_path / "a.gguf"))).sampling_defaults == expected
    assert not caplog.records
    assert open_checkpoint(str(gguf_file(tmp_path / "b.gguf", penalty=1.5))).sampling_defaults == expected
    assert caplog.messages[0].endswith("though outputs depend on it: general.sampling.penalty_repeat = 1.5")
    path = gguf_file(tmp_path / "c.gguf", top_k=-7)
    with pytest.raises(ModelError) as caught:
        _ = open_checkpoint(str(path)).sampling_defaults
    assert str(caught.value) == f"{path}: general.sampling.top_k must be an integer in [-1, 2147483647], got -7"


def test_the_embedded_model_has_none() -> None:
    assert open_checkpoint("smollm2-135m").sampling_defaults == {}
