"""Weights in float8 (e4m3) with float scales: quant_method fp8, fbgemm_fp8, and ModelOpt's kinds.

Activations stay as they are computed: input scales, which static schemes store, are not used.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.models.fields import LARGEST_SIZE, Fields
from jaxserve.models.loading.quantised.format import Tensors, expect
from jaxserve.models.loading.quantised.scaled import FLOAT8, PER_CHANNEL, PER_TENSOR, Blocks, blocks_of, by_row
from jaxserve.models.loading.quantised.tensor import Encoding, QuantisedTensor

_MODELOPT_BLOCKS: dict[str, Blocks] = {
    "fp8": PER_TENSOR,
    "fp8_per_channel_per_token": PER_CHANNEL,
    "fp8_pb_wo": (128, 128),
}
_INVERSE = "weight_scale_inv"


@dataclass(frozen=True)
class FP8:
    """``weight`` float8 ``[out, in]`` times ``weight_scale``, or times ``weight_scale_inv``, which is no inverse.

    Lists of modules that are not quantised are not read: the types of their weights say so.
    """

    name: str
    blocks: Blocks | None
    """None: as the scales are."""
    suffixes = frozenset(
        {"weight_scale", _INVERSE, "input_scale", "input_scale_ub", "activation_scale", "output_scale"}
    )

    def is_quantised(self, tensors: Tensors) -> bool:
        return "weight" in tensors and tensors["weight"].dtype.name == FLOAT8

    def encoding(self, module: str, tensors: Tensors) -> Encoding:
        outputs, inputs = expect(module, tensors, "weight", [FLOAT8], [None, None]).shape
        name = _scales(tensors)
        _, group = blocks_of(module, tensors, name, (outputs, inputs), self.blocks)
        return Encoding((outputs, inputs), 8, True, tensors[name].dtype, group, 0)

    def decode(self, module: str, tensors: Tensors) -> QuantisedTensor:
        shape, name = tensors["weight"].shape, _scales(tensors)
        blocks = blocks_of(module, tensors, name, shape, self.blocks)
        return QuantisedTensor(tensors["weight"], by_row(tensors[name], shape, blocks), None, blocks[1])

    def __str__(self) -> str:
        return self.name


def _scales(tensors: Tensors) -> str:
    return _INVERSE if _INVERSE in tensors else "weight_scale"


def read(fields: Fields) -> FP8:
    """From a configuration of quant_method fp8 or fbgemm_fp8. Raises ModelError."""
    fields.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    fields.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    blocks = None
    if fields.has("weight_block_size"):
        sizes = fields.integers("weight_block_size") or []
        if len(sizes) != 2 or not all(0 < size <= LARGEST_SIZE for size in sizes):
            raise fields.error("weight_block_size", f"two integers in [1, {LARGEST_SIZE}]")
        blocks = sizes[0], sizes[1]
    name = "fp8" if blocks is None else f"fp8 in blocks of {blocks[0]} by {blocks[1]}"
    return FP8(name, blocks)


def read_modelopt(fields: Fields) -> FP8:
    """From ModelOpt's configuration, in config.json or, nested, in hf_quant_config.json. Raises ModelError."""
    nested = fields.fields("quantization")
    fields = nested if nested.values else fields
    algorithm = fields.choice("quant_algo", tuple(_MODELOPT_BLOCKS))
    if fields.has("kv_cache_quant_algo"):
        fields.choice("kv_cache_quant_algo", ("fp8",))
    return FP8(f"modelopt {algorithm}", _MODELOPT_BLOCKS[algorithm])
