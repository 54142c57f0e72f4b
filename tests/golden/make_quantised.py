"""Write quantised.npz: matrices as three packages pack them, and as they unpack them again.

Needs torch, compressed-tensors 0.20.0, gptqmodel 7.7.0 and the source of autoawq 0.2.9 (only whose linear layer is
imported, as the rest asks for old transformers), in an environment of its own and without a GPU:

    python tests/golden/make_quantised.py --autoawq autoawq-0.2.9
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

OUT, IN = 32, 64
Golden = tuple[str, dict[str, Any], dict[str, torch.Tensor], torch.Tensor]
"""Name, quantization_config, tensors of the module, the weight ``[out, in]`` as the package unpacks it."""


def grid(bits: int, group: int, lowest_zero: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros ``[out, G]``."""
    shape = (OUT, IN // group)
    return (0.01 + 0.05 * torch.rand(shape)).half(), torch.randint(lowest_zero, 1 << bits, shape)


def linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(IN, OUT, bias=False)
    layer.weight.data = weight
    return layer


def drawn(bits: int, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """A weight that the grid has, ``float32[out, in]``."""
    codes = torch.randint(0, 1 << bits, (OUT, IN))
    return (codes - zeros[:, groups]) * scales[:, groups].float()


GPTQ = ((2, False, True), (3, False, True), (3, True, False), (4, True, True), (4, False, False), (8, False, True))
"""Bits, whether the inputs are in no order, whether zeros are stored from 1."""


def gptq() -> Iterator[Golden]:
    for bits, act_order, v1 in GPTQ:
        group = 32
        # Zeros from 1 on: of a first format's zero of 0, gptqmodel borrows from the next code, autogptq from all.
        scales, zeros = grid(bits, group, lowest_zero=1)
        groups = torch.arange(IN, dtype=torch.int32) // group
        if act_order:
            groups = groups[torch.randperm(IN)]
        weight = drawn(bits, scales, zeros, groups.long())
        module = TorchLinear(bits, group, False, act_order, IN, OUT)
        module.pack_original(linear(weight), scales.float(), zeros.float(), groups)
        module.qzero_format(format=2)
        expected = module.dequantize_weight().T
        if v1:
            convert_gptq_v2_to_v1_format_module(module, types.SimpleNamespace(bits=bits, pack_dtype=torch.int32))
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "desc_act": act_order}
        config["checkpoint_format"] = "gptq" if v1 else "gptq_v2"
        names = ("qweight", "qzeros", "scales", "g_idx")
        yield f"gptq {bits} {act_order} {v1}", config, {name: getattr(module, name) for name in names}, expected


def awq(source: Path) -> Iterator[Golden]:
    for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(source / name.replace(".", "/"))]
        sys.modules[name] = package
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    group = 32
    scales, zeros = grid(4, group)
    weight = drawn(4, scales, zeros, torch.arange(IN) // group)
    module = WQLinear_GEMM.from_linear(
        linear(weight), 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    tensors = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales")}
    expected = dequantize_gemm(**tensors, bits=4, group_size=group).T
    yield "awq", {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}, tensors, expected


COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "packed 4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "packed 4 zeros": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "packed 3": ("pack-quantized", {"num_bits": 3, "strategy": "channel"}),
    "packed 3 zeros": ("pack-quantized", {"num_bits": 3, "strategy": "channel", "symmetric": False}),
    "packed 8": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 zeros": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "float8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "float8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "float8 block": (
        "float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]}
    ),
}  # fmt: skip


def compressed() -> Iterator[Golden]:
    for name, (form, weights) in COMPRESSED.items():
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        bits, strategy = weights["num_bits"], weights["strategy"]
        shape = {
            "group": (OUT, IN // 32), "channel": (OUT, 1), "tensor": (1,), "block": (OUT // 32, IN // 32),
        }[strategy]  # fmt: skip
        scale = 0.01 + 0.05 * torch.rand(shape)
        state = {"weight": torch.randn(OUT, IN) * 0.2, "weight_scale": scale}
        if not weights.get("symmetric", True):
            half = 1 << (bits - 1)
            state["weight_zero_point"] = torch.randint(-half, half, shape, dtype=torch.int8)
        compressor = BaseCompressor.get_value_from_registry(form)
        tensors = compressor.compress(state, scheme)
        expected = compressor.decompress(tensors, scheme)["weight"]
        config = {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
        yield name, config, tensors, expected


def stored(tensor: torch.Tensor) -> np.ndarray:
    """npz has no float8."""
    return tensor.view(torch.uint8).numpy() if tensor.dtype == torch.float8_e4m3fn else tensor.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoawq", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    arrays, configs = {}, {}
    for name, config, tensors, expected in (*gptq(), *awq(args.autoawq), *compressed()):
        configs[name] = config
        arrays[f"{name}/expected"] = expected.contiguous().numpy()
        arrays |= {f"{name}/{suffix}": stored(tensor) for suffix, tensor in tensors.items()}
    arrays["configs"] = np.array(json.dumps(configs))
    np.savez_compressed(Path(__file__).with_name("quantised.npz"), **arrays)


if __name__ == "__main__":
    main()
