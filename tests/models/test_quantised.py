"""Quantised checkpoints: what each format's tensors decode to, and how they are told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxserve.errors import ModelError
from jaxserve.models.loading import hf
from jaxserve.models.loading.quantised import awq
from jaxserve.models.loading.quantised.detect import FORMATS, quantisation
from jaxserve.models.loading.quantised.packing import num_words, unpack
from jaxserve.models.loading.quantised.source import QuantisedSource, named_by_module
from jaxserve.models.registry import family_of, read_config
from tests.models import test_hf
from tests.models.golden import FOLDER
from tests.models.quantised_cases import (
    CASES,
    FLOAT8,
    Tensors,
    compressed,
    draw,
    gptq,
    pack,
    unpack_one_by_one,
)

MODULE = "model.layers.0.mlp.up_proj"
SHAPES = ((48, 64), (40, 40))


def source_of(folder: Path, tensors: Tensors, config: dict[str, Any], module: str = MODULE) -> QuantisedSource:
    """Of a folder with one module."""
    held = {f"{module}.{suffix}": np.ascontiguousarray(tensor) for suffix, tensor in tensors.items()}
    save_file(held, folder / "model.safetensors")
    found = quantisation(folder, {"quantization_config": config})
    assert found is not None
    names = named_by_module(lambda name: name, found.suffixes)
    return QuantisedSource(hf.SafetensorsSource(folder, names, hf.DTYPES), found)


def read(folder: Path, tensors: Tensors, config: dict[str, Any]) -> np.ndarray:
    return source_of(folder, tensors, config).read(f"{MODULE}.weight")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_decoded_to_the_last_bit(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    case = CASES[name]
    drawn, tensors = case.encode(shape, 1)
    source = source_of(tmp_path, {**tensors, **case.extras}, case.config)
    assert source.names() == {f"{MODULE}.weight"}
    assert source.shape(f"{MODULE}.weight") == shape
    np.testing.assert_array_equal(source.read(f"{MODULE}.weight"), drawn.truth)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("num_codes", [1, 31, 32, 70])
def test_codes_of_any_width(bits: int, num_codes: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, num_codes))
    words = pack(codes, bits)
    assert words.shape == (3, num_words(num_codes, bits))
    np.testing.assert_array_equal(unpack_one_by_one(words, bits, num_codes), codes)
    np.testing.assert_array_equal(unpack(words, bits, num_codes), codes)


def swapped(groups: np.ndarray) -> np.ndarray:
    """Two inputs of different groups in each other's place."""
    other = int(np.flatnonzero(groups != groups[0])[0])
    groups = groups.copy()
    groups[[0, other]] = groups[[other, 0]]
    return groups


@pytest.mark.parametrize(
    ("name", "change", "config"),
    [
        ("gptq 4 bits", lambda t: t, {"checkpoint_format": "gptq_v2"}),
        ("gptq 4 bits v2", lambda t: t, {"checkpoint_format": "gptq"}),
        ("gptq 4 bits", lambda t: t, {"sym": True}),
        ("gptq 4 bits, act-order", lambda t: t | {"g_idx": swapped(t["g_idx"])}, {}),
        ("packed 4 bits, act-order", lambda t: t | {"weight_g_idx": swapped(t["weight_g_idx"])}, {}),
        ("packed 4 bits, act-order", lambda t: {k: v for k, v in t.items() if k != "weight_g_idx"}, {}),
        ("packed 4 bits, zeros", lambda t: t | {"weight_zero_point": t["weight_zero_point"] ^ 1}, {}),
        ("int8, zeros", lambda t: t | {"weight_zero_point": t["weight_zero_point"] ^ 1}, {}),
        ("fp8 blocks", lambda t: t | {"weight_scale_inv": 1 / t["weight_scale_inv"]}, {}),
    ],
)
def test_what_matters_shows(
    name: str, change: Callable[[Tensors], Tensors], config: dict[str, Any], tmp_path: Path
) -> None:
    drawn, tensors = CASES[name].encode((48, 64), 1)
    assert np.abs(read(tmp_path, change(tensors), CASES[name].config | config) - drawn.truth).max() > 2e-3


def test_the_order_of_awqs_nibbles_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, tensors = CASES["awq"].encode((48, 64), 1)
    monkeypatch.setattr(awq, "_PLACES", np.arange(8))
    assert np.abs(read(tmp_path, tensors, CASES["awq"].config) - drawn.truth).max() > 2e-3


def test_zeros_of_symmetric_gptq_are_not_read(tmp_path: Path) -> None:
    """Some files say v1 and hold v2's."""
    drawn, tensors = CASES["gptq 4 bits, symmetric act-order"].encode((48, 64), 1)
    for qzeros in (np.zeros_like(tensors["qzeros"]), tensors["qzeros"] + 0x11111111):
        config = CASES["gptq 4 bits, symmetric act-order"].config
        np.testing.assert_array_equal(read(tmp_path, tensors | {"qzeros": qzeros}, config), drawn.truth)


def test_zeros_for_groups_are_no_order(tmp_path: Path) -> None:
    drawn, tensors = CASES["gptq 4 bits"].encode((48, 64), 1)
    groups = np.zeros_like(tensors["g_idx"])
    np.testing.assert_array_equal(read(tmp_path, tensors | {"g_idx": groups}, CASES["gptq 4 bits"].config), drawn.truth)


@pytest.mark.parametrize("prefix", ["", "+:"])
def test_gptqs_dynamic_rules(prefix: str, tmp_path: Path) -> None:
    drawn = draw((48, 64), 8, 16, symmetric=True)
    config = CASES["gptq 4 bits"].config | {
        "dynamic": {
            "-:.*other": {},
            prefix + r".*\.0\..*": {"bits": 8, "group_size": 16, "sym": True},
            ".*": {"bits": 2},
        }
    }
    np.testing.assert_array_equal(read(tmp_path, gptq(drawn, 8), config), drawn.truth)
    left = config | {"dynamic": {"-:.*up_proj": {}}}
    with pytest.raises(ModelError, match=rf"{MODULE} is quantised, but .*dynamic\.-:\.\*up_proj leaves it as it is"):
        read(tmp_path, gptq(drawn, 8), left)


def test_auto_rounds_layers_of_their_own(tmp_path: Path) -> None:
    drawn = draw((48, 64), 8, 16, symmetric=True)
    own = {MODULE: {"bits": 8, "group_size": 16, "sym": True}, f"{MODULE}x": {"bits": 16}}
    config = CASES["auto-round"].config | {"extra_config": own}
    np.testing.assert_array_equal(read(tmp_path, gptq(drawn, 8), config), drawn.truth)
    with pytest.raises(ModelError, match=r"is quantised, but .*bits leaves it as it is"):
        read(tmp_path, gptq(drawn, 8), config | {"extra_config": {MODULE: {"bits": 16}}})


@pytest.mark.parametrize("target", [MODULE, r"re:.*up_proj$", "Linear"])
def test_targets_of_compressed_tensors(target: str, tmp_path: Path) -> None:
    case = CASES["packed 4 bits"]
    drawn, tensors = case.encode((48, 64), 1)
    other = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "strategy": "channel"}}
    named = case.config["config_groups"]["group_0"] | {"targets": [target]}
    config = case.config | {"config_groups": {"group_0": other, "group_1": named}}
    np.testing.assert_array_equal(read(tmp_path, tensors, config), drawn.truth)
    with pytest.raises(ModelError, match=rf"{MODULE} is quantised, but .*ignore leaves it as it is"):
        read(tmp_path, tensors, config | {"ignore": [target.replace("Linear", MODULE)]})
    with pytest.raises(ModelError, match=r"no targets of .*config_groups are its name or Linear"):
        read(tmp_path, tensors, config | {"config_groups": {"group_0": other}})


@pytest.mark.parametrize(
    ("file", "content", "case"),
    [
        ("quantize_config.json", CASES["gptq 4 bits"].config | {"quant_method": None}, "gptq 4 bits"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}, "awq"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}, "modelopt"),
        ("config.json", {"compression_config": CASES["int8"].config | {"quant_method": None}}, "int8"),
        ("config.json", {"text_config": {"quantization_config": CASES["awq"].config}}, "awq"),
        ("config.json", {"quantization_config": {"method": "gptq", "format": "gptq", "bits": 4, "group_size": 16,
                                                 "sym": False}}, "gptq 4 bits"),
    ],
)  # fmt: skip
def test_where_models_say_that_they_are_quantised(
    file: str, content: dict[str, Any], case: str, tmp_path: Path
) -> None:
    drawn, tensors = CASES[case].encode((48, 64), 1)
    save_file({f"x.{k}": np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / file).write_text(json.dumps(content))
    found = quantisation(tmp_path, content if file == "config.json" else {})
    assert found is not None
    source = QuantisedSource(hf.SafetensorsSource(tmp_path, supported=hf.DTYPES), found)
    np.testing.assert_array_equal(source.read("x.weight"), drawn.truth)


def test_not_quantised(tmp_path: Path) -> None:
    assert quantisation(tmp_path, {"quantization_config": None}) is None


GPTQ, AWQ, FP8 = (CASES[name].config for name in ("gptq 4 bits", "awq", "fp8"))
PACKED = {"num_bits": 4, "strategy": "channel"}
METHODS = ", ".join(FORMATS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, f"quant_method 'bitsandbytes' is not supported; supported: {METHODS}"),
        ({"load_in_8bit": True}, "quant_method None is not supported"),
        ({"quant_method": 7}, "quant_method must be a string, found 7"),
        (GPTQ | {"bits": 5}, "bits must be one of 2, 3, 4, 8, found 5"),
        (GPTQ | {"bits": None}, "bits must be an integer"),
        (GPTQ | {"group_size": 0}, "group_size must be -1 or at least 1, found 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format must be one of gptq, gptq_v2, found 'marlin'"),
        (GPTQ | {"format": "bitblas"}, "format must be one of gptq, gptq_v2, found 'bitblas'"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format must be false, found True"),
        (GPTQ | {"pack_dtype": "int8"}, "pack_dtype must be one of int32, found 'int8'"),
        (GPTQ | {"dynamic": {"+:(": {}}}, r"dynamic\.\+:\( is no regular expression: "),
        (GPTQ | {"dynamic": {".*": {"bits": 6}}}, r"dynamic\.\.\*\.bits must be one of 2, 3, 4, 8, found 6"),
        (CASES["auto-round"].config | {"packing_format": "auto_round:auto_awq"}, "packing_format must be one of auto_"),
        (CASES["auto-round"].config | {"data_type": "mx_fp"}, "data_type must be one of int, found 'mx_fp'"),
        (AWQ | {"version": "gemv"}, "version must be one of gemm, found 'gemv'"),
        (AWQ | {"version": "GEMV_FAST"}, "version must be one of gemm, found 'GEMV_FAST'"),
        (AWQ | {"version": "llm-awq"}, "version must be one of gemm, found 'llm-awq'"),
        (AWQ | {"bits": 8}, r"bits must be an integer in \[4, 4\], found 8"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size must be two integers in"),
        (FP8 | {"activation_scheme": "odd"}, "activation_scheme must be one of dynamic, static, found 'odd'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo must be one of fp8, .* found 'NVFP4'"),
        ({"quant_method": "modelopt"}, "quant_algo must be one of .*, but it is missing"),
        (
            {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}},
            r"quantization\.kv_cache_quant_algo must be one of fp8, found 'NVFP4'",
        ),
        (compressed("marlin-24", PACKED), "format must be one of pack-quantized, int-quantized, .* found 'marlin-24'"),
        (compressed("nvfp4-pack-quantized", PACKED), "found 'nvfp4-pack-quantized'"),
        (compressed("pack-quantized", PACKED | {"num_bits": 16}), r"weights\.num_bits must be an integer in \[2, 8\]"),
        (compressed("pack-quantized", PACKED | {"type": "float", "num_bits": 8}), r"type must be int for format pack"),
        (compressed("float-quantized", {"type": "float", "symmetric": False}), "symmetric must be true for floats"),
        (compressed("int-quantized", PACKED | {"strategy": "tensor_group"}), "strategy must be one of tensor, channel"),
        (compressed("int-quantized", PACKED | {"strategy": "block"}), "block_structure must be two integers"),
        (
            compressed("int-quantized", PACKED, sparsity_config={"format": "sparse-24-bitmask"}),
            r"sparsity_config\.format must be one of dense, found 'sparse-24-bitmask'",
        ),
        (
            compressed("int-quantized", PACKED, transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
            "transform_config must be without config_groups",
        ),
        (compressed("int-quantized", PACKED, ignore=["re:("]), r"ignore: 're:\(': "),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: .*{message}"):
        quantisation(tmp_path, {"quantization_config": config})


@pytest.mark.parametrize("wrong", [1, "text", ["a"], True])
def test_configurations_of_another_type(wrong: Any, tmp_path: Path) -> None:
    for key in ("quantization_config", "compression_config", "text_config"):
        with pytest.raises(ModelError, match=rf"config\.json: {key} must be an object, found"):
            quantisation(tmp_path, {key: wrong})


KEYS = (
    "bits", "w_bit", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic", "extra_config", "version",
    "modules_to_not_convert", "format", "config_groups", "ignore", "sparsity_config", "transform_config", "weights",
    "targets", "num_bits", "type", "strategy", "symmetric", "block_structure", "weight_block_size", "quantization",
    "activation_scheme", "quant_algo", "kv_cache_quant_algo", "exclude_modules", "packing_format",
)  # fmt: skip
ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.sampled_from(("gptq", "int", "re:(", "*"))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
    max_leaves=12,
)


@given(st.sampled_from(tuple(FORMATS)), st.dictionaries(st.sampled_from(KEYS), ANY, max_size=6))
@settings(max_examples=300, deadline=None)
def test_any_configuration_is_read_or_refused(method: str, config: dict[str, Any]) -> None:
    base = next((case.config for case in CASES.values() if case.config["quant_method"] == method), {})
    with suppress(ModelError):
        quantisation(FOLDER, {"quantization_config": {**base, **config, "quant_method": method}})


def without(*suffixes: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {suffix: tensor for suffix, tensor in tensors.items() if suffix not in suffixes}


def replaced(suffix: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {suffix: change(tensors[suffix])}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq 4 bits", without("scales"), "scales is missing"),
        ("gptq 4 bits", without("qzeros"), "qzeros is missing"),
        ("gptq 4 bits, act-order", without("g_idx"), "g_idx is missing"),
        ("gptq 4 bits", replaced("scales", lambda s: s[:1]), r"scales must be .* \[4, 48\] .*, found float16\[1, 48\]"),
        ("gptq 4 bits", replaced("qweight", lambda q: q.astype(np.int64)), r"qweight must be int32 .* found int64"),
        ("gptq 4 bits", replaced("g_idx", np.ones_like), "g_idx must put 16 of 64 inputs into each group"),
        ("gptq 4 bits", replaced("g_idx", lambda g: g - 1), "g_idx must put 16 of 64 inputs into each group"),
        ("gptq 3 bits", replaced("qweight", lambda q: q[:-1]), r"qweight must be int32 \[6, 48\] \(3 bits.*found"),
        ("awq", without("qzeros"), "qzeros is missing"),
        ("awq", replaced("qzeros", lambda z: z[:1]), r"qzeros must be int32 \[4, 6\] \(64 inputs in groups of 16\)"),
        ("packed 4 bits", without("weight_shape"), "weight_shape is missing"),
        ("packed 4 bits", replaced("weight_shape", lambda s: s - 100), r"weight_shape must be two sizes in \[1,"),
        ("packed 4 bits", replaced("weight_shape", lambda s: s + np.array([0, 8])), r"packed must be int32 \[48, 9"),
        ("packed 4 bits, zeros", without("weight_zero_point"), "weight_zero_point is missing"),
        ("packed 4 bits", replaced("weight_scale", lambda s: s[:, :2]), r"weight_scale must be .* \[48, 4\]"),
        ("int8", without("weight_scale"), "weight_scale is missing"),
        ("int8", replaced("weight", lambda w: w.astype(np.float32).astype("float8_e4m3fn")), "weight must be int8 "),
        ("fp8", without("weight_scale"), "weight_scale is missing"),
        ("fp8 blocks", without("weight_scale_inv"), "weight_scale is missing"),
        ("fp8 blocks", replaced("weight_scale_inv", lambda s: s[:1]), r"weight_scale_inv must be .* \[3, 3\] \(one f"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(name: str, change: Callable[[Tensors], Tensors], message: str, tmp_path: Path) -> None:
    _, tensors = CASES[name].encode((48, 64), 1)
    with pytest.raises(ModelError, match=rf"{tmp_path}: {MODULE}\..*{message}"):
        read(tmp_path, change(tensors), CASES[name].config)


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    _, tensors = CASES["awq"].encode((48, 64), 1)
    del tensors["qzeros"]
    save_file(
        {f"{m}.{k}": np.ascontiguousarray(t) for m in "ab" for k, t in tensors.items()}, tmp_path / "model.safetensors"
    )
    found = quantisation(tmp_path, {"quantization_config": AWQ})
    assert found is not None
    with pytest.raises(ModelError, match=r": a\.qzeros is missing .*; b\.qzeros is missing"):
        QuantisedSource(hf.SafetensorsSource(tmp_path, supported=hf.DTYPES), found)


PEERS = np.load(FOLDER / "quantised.npz")
PEER_CONFIGS = json.loads(str(PEERS["configs"]))


@pytest.mark.parametrize("name", PEER_CONFIGS)
def test_as_the_formats_own_packages_decode(name: str, tmp_path: Path) -> None:
    """gptqmodel, autoawq and compressed-tensors, which wrote these tensors too (tests/golden/make_quantised.py)."""
    prefix = f"{name}/"
    tensors = {key.removeprefix(prefix): PEERS[key] for key in PEERS.files if key.startswith(prefix)}
    expected = tensors.pop("expected")
    if "weight" in tensors and tensors["weight"].dtype == np.uint8:
        tensors["weight"] = tensors["weight"].view(FLOAT8)
    # They round to the type of the scales.
    np.testing.assert_array_equal(read(tmp_path, tensors, PEER_CONFIGS[name]).astype(expected.dtype), expected)


def test_integers_that_are_nobodys(tmp_path: Path) -> None:
    _, tensors = CASES["awq"].encode((48, 64), 1)
    with pytest.raises(ModelError, match=rf"tensor types not supported: {MODULE}\.steps \(I64\); supported: F32"):
        read(tmp_path, tensors | {"steps": np.ones(1, np.int64)}, AWQ)


@pytest.mark.parametrize("prefix", ["", "model.model."])
def test_tensors_go_where_the_modules_weight_does(prefix: str) -> None:
    name_of = family_of("LlamaForCausalLM").names_for(read_config(test_hf.RAW))
    named = named_by_module(name_of, {"qweight", "scales"})
    assert named(f"{prefix}layers.0.mlp.up_proj.qweight") == f"{MODULE}.qweight"
    assert named(f"{prefix}norm.weight") == "model.norm.weight"
    blind = named_by_module(family_of("Gemma3ForConditionalGeneration").names_for(read_config(test_hf.RAW)), {"scales"})
    assert blind("vision_tower.encoder.0.scales") is None
