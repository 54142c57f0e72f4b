"""Quantised matrices that stay codes in memory, beside the same dequantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType as Kind
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, ModelError
from jaxserve.kernels import native
from jaxserve.kernels.backend import Target
from jaxserve.models import llama
from jaxserve.models.decoder import Decoder
from jaxserve.models.loading import codes, gguf_codes
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.loading.quantised.tensor import Encoding, QuantisedTensor
from jaxserve.models.matrix import (
    MatrixLayout,
    PanelCodes,
    PanelMatrix,
    QuantisedMatrix,
    RowScaledMatrix,
    coded_kind,
    layouts_of,
)
from jaxserve.models.weights import Part, Weight, stacked, whole
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import abstract_model, abstract_parameters, divided
from tests.models.golden import Golden, load, paged_logits
from tests.models.quantised_cases import CASES
from tests.models.test_gguf import random_blocks
from tests.models.test_quantised_models import rewritten, written

FORMATS = ("gptq 4 bits", "gptq 3 bits", "awq", "packed 4 bits", "packed 8 bits", "int8", "int8, zeros", "fp8 blocks")


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_dequantised(name: str, tensor: int, tmp_path: Path) -> None:
    """On two devices too, among which the 48 inputs of ``down`` are divided in the middle of a group of 16."""
    folder, _ = written(tmp_path, CASES[name])
    checkpoint, mesh = open_checkpoint(str(folder)), make_mesh(tensor)
    config = divided(checkpoint.config, mesh)
    _, state = abstract_model(Decoder, config, max_len=64, dtype=jnp.dtype("float32"))
    abstract, weights, layouts = abstract_parameters(state, mesh), llama.weights(config), layouts_of(state)
    planned = checkpoint.planned_codes(abstract, weights, layouts)
    assert planned.keys() == layouts.keys() - {"embedding"}
    dense = checkpoint.load({name: abstract[name] for name in planned}, weights)
    for path, matrix in checkpoint.load_codes(planned, weights):
        assert [array.sharding for array in jax.tree.leaves(matrix)] == [
            spec.sharding for spec in jax.tree.leaves(planned[path])
        ]
        if not path.startswith("layers.0."):
            continue
        weight = np.asarray(dense[path]).reshape(np.prod(dense[path].shape[: layouts[path].num_outputs]), -1)
        x = np.random.default_rng(0).normal(size=(5, weight.shape[1])).astype(np.float32)
        product = jax.jit(QuantisedMatrix.multiply)(matrix, x, jnp.array([4, 0, 0]))
        np.testing.assert_allclose(product, x[[4, 0, 0]] @ weight.T, atol=1e-4, rtol=1e-5)


class Held:
    """A CodeSource of tensors in memory."""

    def __init__(self, tensors: Mapping[str, QuantisedTensor], bits: int = 4) -> None:
        self.tensors, self.bits = tensors, bits

    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].codes.shape

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name].dequantised()

    def encoding(self, name: str) -> Encoding:
        tensor = self.tensors[name]
        zeros = tensor.unsigned().zeros
        zero = int(zeros[0, 0]) if zeros is not None and zeros.size == 1 else None
        is_float = tensor.codes.dtype == ml_dtypes.float8_e4m3fn
        bits = 8 if tensor.codes.dtype != np.uint8 else self.bits
        return Encoding(
            tensor.codes.shape, bits, is_float, tensor.scales.dtype, tensor.group, 0 if is_float else zero,
            tensor.minima is not None, tensor.order,
        )  # fmt: skip

    def quantised(self, name: str) -> QuantisedTensor:
        return self.tensors[name]


def tensor(
    group: int, shape: tuple[int, int] = (6, 32), dtype: Any = np.uint8, scale: Any = np.float16
) -> QuantisedTensor:
    random = np.random.default_rng(group)
    grid = (shape[0], -(-shape[1] // group))
    values = random.integers(0, 16, shape).astype(dtype)
    return QuantisedTensor(values, random.uniform(0.5, 1, grid).astype(scale), np.full((1, 1), 8, np.uint8), group)


def made(source: Held, shape: tuple[int, ...], weight: Weight, layout: MatrixLayout) -> QuantisedMatrix | None:
    sharding = NamedSharding(make_mesh(), PartitionSpec())
    spec = {"m": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}
    planned = codes.plan(source, spec, {"m": weight}, {"m": layout})
    return dict(codes.load(source, planned, {"m": weight}))["m"] if planned else None


def numbers(matrix: QuantisedMatrix) -> np.ndarray:
    """``[out, in]``, by multiplying each input's unit vector."""
    inputs = matrix.scales.shape[-1] * matrix.group
    return np.asarray(matrix.multiply(jnp.eye(inputs))).T


def test_halves_that_are_quantised_otherwise() -> None:
    """Other groups, zeros, signs and types of scales, and minima in one of them."""
    one = tensor(8)
    zeros = np.random.default_rng(0).integers(0, 16, one.scales.shape).astype(np.uint8)
    others = [
        tensor(16, scale=np.float32),
        replace(one, zeros=zeros),
        replace(one, codes=one.codes.astype(np.int8), zeros=None),
        replace(one, minima=np.full(one.scales.shape, -3, np.float16)),
        replace(one, zeros=zeros, minima=np.full(one.scales.shape, -3, np.float16)),
    ]
    for other in others:
        source = Held({"a": one, "b": other})
        matrix = made(source, (2, 6, 32), stacked("a", "b"), MatrixLayout(num_outputs=2))
        assert matrix is not None
        expected = np.concatenate([one.dequantised(), other.dequantised()])
        np.testing.assert_array_equal(numbers(matrix), expected)


def test_what_stays_dense() -> None:
    one, order = tensor(8), np.random.default_rng(0).permutation(32).astype(np.int32)
    layout = MatrixLayout()
    for other in (tensor(8, dtype=ml_dtypes.float8_e4m3fn), replace(one, order=order)):
        assert made(Held({"a": one, "b": other}), (2, 6, 32), stacked("a", "b"), MatrixLayout(num_outputs=2)) is None
    assert made(Held({"a": one}), (32, 6), whole("a", lambda t: t.T), layout) is None
    assert made(Held({"a": one}), (1, 6, 32), (Part("a", lambda t: t[None]),), MatrixLayout(is_grouped=True)) is None


def test_columns_in_an_order_of_their_own() -> None:
    ordered = replace(tensor(8), order=np.random.default_rng(0).permutation(32).astype(np.int32))
    matrix = made(Held({"a": ordered}), (6, 32), whole("a"), MatrixLayout())
    assert matrix is not None
    np.testing.assert_array_equal(numbers(matrix), ordered.dequantised())
    np.testing.assert_array_equal(matrix.lookup(jnp.array([5, 0])), ordered.dequantised()[[5, 0]])


def test_a_group_of_odd_length_is_bytes() -> None:
    matrix = made(Held({"a": tensor(15, (4, 45))}), (4, 45), whole("a"), MatrixLayout())
    assert matrix is not None
    assert (matrix.bits, matrix.group) == (8, 15)
    np.testing.assert_array_equal(numbers(matrix), tensor(15, (4, 45)).dequantised())


def test_rows_that_are_no_multiple_of_a_tile() -> None:
    one = tensor(8, (12, 32))
    matrix = made(Held({"a": one}), (12, 32), whole("a"), MatrixLayout())
    assert matrix is not None
    np.testing.assert_array_equal(numbers(replace(matrix, tile_values=5 * 32)), one.dequantised())


GPU = Target("gpu", 90, 132)


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_a_gpu_multiplies_scales_of_rows_with_products(dtype: Any) -> None:
    one = replace(tensor(32, dtype=dtype), zeros=None)
    matrix = made(Held({"a": one}, bits=8), (6, 32), whole("a"), MatrixLayout())
    assert matrix is not None
    found = coded_kind(matrix, GPU).of(matrix, GPU)
    assert isinstance(found, RowScaledMatrix)
    np.testing.assert_allclose(found.multiply(jnp.eye(32)).T, one.dequantised(), rtol=1e-6)
    np.testing.assert_array_equal(found.lookup(jnp.array([5, 0])), one.dequantised()[[5, 0]])
    halves = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32)), jnp.bfloat16)
    product = found.multiply(halves, out_dtype=jnp.dtype("float32"))
    np.testing.assert_allclose(product, np.asarray(halves, np.float64) @ one.dequantised().T, rtol=1e-4, atol=1e-4)


def test_other_codes_on_a_gpu() -> None:
    """Groups, zeros, minima, or floats that an old one has no instructions for."""

    def kind(one: QuantisedTensor, target: Target = GPU) -> type:
        matrix = made(Held({"a": one}, bits=8), (6, 32), whole("a"), MatrixLayout())
        assert matrix is not None
        found = coded_kind(matrix, target).abstract(matrix, target)
        return type(found)

    rows = replace(tensor(32, dtype=ml_dtypes.float8_e4m3fn), zeros=None)
    assert kind(rows) == RowScaledMatrix
    assert kind(rows, Target("gpu", 80, 108)) == QuantisedMatrix
    assert kind(rows, Target("cpu")) == QuantisedMatrix
    assert kind(tensor(16, dtype=np.int8)) == QuantisedMatrix
    zeros = np.arange(6, dtype=np.uint8)[:, None]
    assert kind(replace(tensor(32), zeros=zeros)) == QuantisedMatrix
    assert kind(replace(tensor(32), minima=np.ones((6, 1), np.float16))) == QuantisedMatrix


def test_no_dequantised_copy_is_kept() -> None:
    """By XLA's own account of a compiled product: less than a quarter of what the matrix takes in float32."""
    shape = (8192, 2048)
    matrix = made(Held({"a": tensor(32, shape)}), shape, whole("a"), MatrixLayout())
    compiled = jax.jit(QuantisedMatrix.multiply).lower(matrix, jnp.zeros((4, shape[1]))).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes < 0.6 * np.prod(shape) + 2**20
    assert memory.temp_size_in_bytes < np.prod(shape)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_kinds_of_gguf(kind: Kind) -> None:
    """As the gguf package reads them, to the last bit, in chunks of rows too."""
    stored = random_blocks(kind, 700, 512)
    found = gguf_codes.quantised(stored, kind)
    np.testing.assert_array_equal(found.dequantised(), quants.dequantize(stored, kind))
    encoding = gguf_codes.encoding((700, 512), kind)
    assert encoding is not None
    assert (encoding.group, encoding.scale_type) == (found.group, found.scales.dtype)
    assert (encoding.zero, encoding.has_minima) == (int(found.unsigned().zeros[0, 0]), found.minima is not None)  # type: ignore[index]
    assert found.unsigned().codes_of().max() < 1 << encoding.bits
    np.testing.assert_array_equal(found.unsigned().dequantised(), found.dequantised())


@pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_products_of_k_kinds_are_those_of_their_numbers(kind: Kind) -> None:
    """To the last bit, though scales have more than 16: both round what code and scale make exactly."""
    tensor = gguf_codes.quantised(random_blocks(kind, 40, 512), kind)
    codes, scales, minima = (
        None if a is None else jnp.asarray(a) for a in (tensor.codes, tensor.scales, tensor.minima)
    )
    zero, bits = int(tensor.zeros[0, 0]), 4 if tensor.is_paired else 8  # type: ignore[index]
    matrix = QuantisedMatrix(
        codes, scales, None, minima, None, MatrixLayout(), bits, tensor.group, zero, jnp.dtype("float32"), None  # type: ignore[arg-type]
    )  # fmt: skip
    dense = PanelMatrix.of(jnp.asarray(tensor.dequantised()), MatrixLayout())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 512)), jnp.float32)
    coded = PanelCodes.of(matrix)
    for rows in (1, 3, 20):
        np.testing.assert_array_equal(coded.multiply(x[:rows]), dense.multiply(x[:rows]))


def test_other_kinds_of_gguf() -> None:
    assert gguf_codes.encoding((6, 256), Kind.Q3_K) is None
    assert gguf_codes.encoding((32,), Kind.Q8_0) is None


def test_logits_of_a_gguf_file() -> None:
    golden = Golden("qwen2_q8_0")
    model = load(golden.checkpoint, golden.length, codes=True)
    difference, same = golden.compare(model, [golden.length])
    assert difference < 1e-3
    assert same


def test_logits_of_a_folder(tmp_path: Path) -> None:
    """One tensor for q, k and v, and one for gate and up."""
    folder = rewritten(tmp_path / "q", "phi3_fused", CASES["packed 4 bits, zeros"], True)
    tokens = Golden("phi3_fused").prompt
    coded, dense = (
        paged_logits(load(folder, len(tokens), codes=kind), tokens, [len(tokens)]) for kind in (True, False)
    )
    np.testing.assert_allclose(coded, dense, atol=1e-4, rtol=0)


def test_an_engine_on_two_devices(tiny_tokenizer: Path) -> None:
    golden = Golden("gemma3_q8_0")
    with LLM(
        model=str(golden.checkpoint), tokenizer=str(tiny_tokenizer), show_progress=False, token_budget=16,
        max_num_seqs=2, block_size=8, num_blocks=24, max_model_len=golden.length, quantization="codes",
        tensor_parallel=2, warmup=False,
    ) as llm:  # fmt: skip
        greedy = SamplingParams(temperature=0, max_tokens=len(golden.greedy), ignore_eos=True)
        (output,) = llm.generate([golden.prompt], greedy, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == golden.greedy


@pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("activations", ["auto", "int8"])
def test_the_embedded_model_in_a_hundred_megabytes(activations: str) -> None:
    with LLM(
        token_budget=16, max_num_seqs=2, max_model_len=64, num_blocks=8, activations=activations, show_progress=False,
        warmup=False,
    ) as llm:  # fmt: skip
        assert sum(array.nbytes for array in jax.tree.leaves(llm.engine.runner._parameters)) <= 100e6
        assert llm.engine.runner.skips_padding
        (output,) = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=4))
        assert "Paris" in output.outputs[0].text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int4"}, "quantization must be one of auto, none, codes, got 'int4'"),
        (
            {"quantization": "codes", "pipeline_parallel": 2},
            "pipeline_parallel must be 1 with quantization codes, got 2",
        ),
        ({"activations": "int4"}, "activations must be one of auto, int8, got 'int4'"),
        (
            {"activations": "int8", "quantization": "none"},
            "quantization must be auto or codes with activations int8, got none",
        ),
        ({"activations": "int8", "tensor_parallel": 2}, "tensor_parallel must be 1 with activations int8, got 2"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


@pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "codes"}, "quantization codes needs quantised weights of a supported kind, found none"),
        ({"activations": "int8"}, "activations int8 needs weights that are codes of 4 or 8 bits, found none"),
        ({"activations": "int8", "dtype": "float16"}, "activations int8 needs native products: .*; got dtype float16"),
    ],
)
def test_models_and_devices_that_are_refused(settings: dict[str, Any], message: str, tiny_tokenizer: Path) -> None:
    plain = Golden("llama_gqa_tied")
    with pytest.raises((ConfigError, ModelError), match=message):
        LLM(
            model=str(plain.checkpoint), tokenizer=str(tiny_tokenizer), token_budget=16, max_num_seqs=2, block_size=8,
            max_model_len=plain.length, warmup=False, show_progress=False, **settings,
        )  # fmt: skip
