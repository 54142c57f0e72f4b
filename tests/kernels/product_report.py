"""What the Triton product of 4-bit codes asks of a GPU: ``python -m tests.kernels.product_report``."""

from __future__ import annotations

import argparse
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.evaluation.aot import DEVICES
from jaxserve.kernels import triton_product
from jaxserve.kernels.code_words import Codes, num_words, slice_inputs
from tests.kernels.ptxas_report import Resources, compile_launch, launched, print_table

OUTPUTS, INPUTS = 4096, 14336
"""Of Mistral-7B's ``down``."""
TARGET = DEVICES["h100"].target


class Product(NamedTuple):
    rows: int
    group: int = 128
    has_zeros: bool = False
    has_minima: bool = False
    dtype: str = "bfloat16"


PRODUCTS = {
    "16 rows": Product(16),
    "32 rows": Product(32),
    "64 rows": Product(64),
    "256 rows": Product(256),
    "16 rows, groups of 32, minima": Product(16, 32, has_minima=True),
    "256 rows, groups of 32, minima": Product(256, 32, has_minima=True),
    "16 rows, zeros, float16": Product(16, 128, has_zeros=True, dtype="float16"),
    "64 rows, groups of 16, zeros": Product(64, 16, has_zeros=True),
    "16 rows, whole rows": Product(16, INPUTS),
}


def resources(product: Product) -> Resources:
    inputs = slice_inputs(product.group)
    assert inputs is not None
    dtype = jnp.dtype(product.dtype)
    small = jax.ShapeDtypeStruct((INPUTS // product.group, OUTPUTS), jnp.float16)

    def multiply(x: jax.Array, codes: Codes) -> jax.Array:
        return triton_product.multiply(
            x, codes, inputs=inputs, group=product.group, zero=136.0, out_dtype=dtype, target=TARGET
        )

    codes = Codes(
        words=jax.ShapeDtypeStruct((OUTPUTS, num_words(INPUTS, inputs)), jnp.int16),  # type: ignore[arg-type]
        scales=small,  # type: ignore[arg-type]
        zeros=jax.ShapeDtypeStruct(small.shape, dtype) if product.has_zeros else None,  # type: ignore[arg-type]
        minima=small if product.has_minima else None,  # type: ignore[arg-type]
    )
    x = jax.ShapeDtypeStruct((product.rows, INPUTS), dtype)
    (launch,) = launched(multiply, x, codes)
    return compile_launch(launch, TARGET.compute_capability)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--products", nargs="+", default=PRODUCTS)
    arguments = parser.parse_args()
    found = {name: resources(PRODUCTS[name]) for name in arguments.products}
    if arguments.json:
        print(json.dumps({name: kernel.to_json() for name, kernel in found.items()}))
    else:
        print_table({name: [kernel] for name, kernel in found.items()})


if __name__ == "__main__":
    main()
