"""config.json with values of any type: read, or refused with the key's name, and never anything else."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ModelError
from jaxserve.models.registry import FAMILIES, read_config
from jaxserve.models.rope import longest_sequence, rope_frequencies
from tests.models.golden import SAME_AS, Golden, names

# Read by some family, whether or not its reference checkpoint has it.
KEYS = [
    "attention_bias", "bias", "head_dim", "hidden_act", "layer_types", "mlp_bias", "mlp_only_layers",
    "num_local_experts", "original_max_position_embeddings", "partial_rotary_factor", "rope_parameters",
    "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings", "use_bidirectional_attention",
    "use_sliding_window",
]  # fmt: skip
ROPE_KEYS = [
    "type", "rope_type", "factor", "rope_theta", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "partial_rotary_factor", "full_attention", "sliding_attention",
]  # fmt: skip
ROPE_KINDS = ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "su"]
NUMBERS = st.one_of(
    st.integers(-3, 70), st.integers(), st.floats(), st.sampled_from([10**400, 2**31, 1e308, 1e-308, 0.5, -0.0])
)
WRONG = st.one_of(st.text(max_size=4), st.lists(NUMBERS | st.text(max_size=3), max_size=3), st.just({"a": 1}))
VALUES = st.one_of(st.none(), st.booleans(), NUMBERS, WRONG, st.sampled_from(["2.0", "silu", "full_attention"]))


def raw_configs() -> dict[str, dict[str, Any]]:
    """A config.json of each architecture."""
    found = {}
    for golden in map(Golden, names()):
        if golden.checkpoint.is_dir():
            raw = json.loads((golden.checkpoint / "config.json").read_text())
            found[raw["architectures"][0]] = raw
    for architecture, same in SAME_AS.items():
        nested = FAMILIES[architecture].nested
        values = found[same] if nested is None else {nested: found[same]}
        found[architecture] = {**values, "architectures": [architecture]}
    return found


RAW = raw_configs()


def read_or_refused(raw: dict[str, Any]) -> Any:
    """The ModelConfig, with which positions can be worked out, or the ModelError."""
    try:
        config = read_config(raw)
    except ModelError as error:
        return error
    for rope in (config.rope, config.local_rope):
        if rope is not None:
            frequencies, scale = rope_frequencies(rope, trained=config.max_position_embeddings, max_len=64)
            assert np.isfinite(frequencies).all()
            assert math.isfinite(scale)
    assert longest_sequence(config) >= 0
    return config


def test_every_family_is_fuzzed() -> None:
    assert RAW.keys() == FAMILIES.keys()


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_a_value_of_another_type_is_refused_by_name_wherever_it_is_read(architecture: str) -> None:
    raw = RAW[architecture]
    plain = read_config(raw)
    for key in sorted({*raw, *FAMILIES[architecture].defaults, *KEYS} - {"architectures"}):
        objects = {"rope_parameters", "rope_scaling", "text_config"}
        wrong_object: list[Any] = [] if key in objects else [{"a": "b"}]
        for wrong in ("2.0", ["a"], True, -1, 0, 10**400, math.nan, math.inf, *wrong_object):
            found = read_or_refused({**raw, key: wrong})
            if isinstance(found, ModelError):
                assert key in str(found), (key, wrong)
            elif not isinstance(wrong, bool | int):
                assert found == plain, f"{key} = {wrong!r} was taken for something"


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_a_rope_option_of_another_type_is_refused_by_name(kind: str) -> None:
    raw = RAW["LlamaForCausalLM"]
    half = read_config(raw).head_dim // 2
    whole = {
        "rope_type": kind, "factor": 2.0, "short_factor": [1.0] * half, "long_factor": [2.0] * half,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    plain = read_config({**raw, "rope_scaling": whole})
    for key in ROPE_KEYS:
        for wrong in ("2.0", ["a"], {"a": "b"}, math.nan, 10**400, -1):
            found = read_or_refused({**raw, "rope_scaling": whole | {key: wrong}})
            if isinstance(found, ModelError):
                assert f"rope_scaling.{key}" in str(found) or "rope kind" in str(found), (key, wrong)
            else:
                assert found == plain, f"{key} = {wrong!r} was taken for something"


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.dictionaries(st.sampled_from([*KEYS, *sorted({k for raw in RAW.values() for k in raw})]), VALUES, max_size=4),
    st.dictionaries(st.sampled_from(ROPE_KEYS), VALUES | st.sampled_from(ROPE_KINDS), max_size=6),
    st.sampled_from([None, "rope_scaling", "rope_parameters"]),
    st.booleans(),
)
def test_any_values(architecture: str, change: dict, rope: dict, rope_key: str | None, nested: bool) -> None:
    raw = {**RAW[architecture], **change}
    if rope_key:
        raw[rope_key] = {"full_attention": rope, "sliding_attention": rope} if nested else rope
    if key := FAMILIES[architecture].nested:
        raw = {**RAW[architecture], key: {**RAW[SAME_AS[architecture]], **raw}}
    read_or_refused(raw)


@pytest.mark.parametrize("wrong", [1, "text", ["a"], True])
def test_objects_of_another_type(wrong: Any) -> None:
    for key, raw in (
        ("text_config", RAW["Gemma3ForConditionalGeneration"]),
        ("rope_scaling", RAW["LlamaForCausalLM"]),
        ("rope_parameters", RAW["Gemma3ForCausalLM"]),
    ):
        with pytest.raises(ModelError) as caught:
            read_config({**raw, key: wrong})
        assert str(caught.value) == f"config.json: {key} must be an object, found {wrong!r}"
