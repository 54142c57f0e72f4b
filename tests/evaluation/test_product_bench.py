"""The benchmark of matrix products, on tiny ones."""

from __future__ import annotations

import pytest

from jaxserve.errors import ConfigError
from jaxserve.evaluation import product_bench
from jaxserve.evaluation.device_bench import Effort
from jaxserve.kernels import native


def test_every_kind_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available():
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(product_bench, "SHAPES", {"tiny": (32, 64)})
    monkeypatch.setattr(product_bench, "LEAST_BYTES", 4000)
    table = list(product_bench.measure_products(["tiny"], product_bench.KINDS, [1, 2], Effort(1, 1e-4, 1e-3)))
    assert [row["weights"] for row in table] == list(product_bench.KINDS)
    assert all(float(row[f"{rows} rows, us"]) > 0 for row in table for rows in (1, 2))
    sizes = {row["weights"]: float(row["MB"]) for row in table}
    assert sizes["W4A16"] == sizes["W4A8"] < sizes["W8A16"] < sizes["float32"]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.raises(ConfigError, match=r"products are of CPUs, and need a C\+\+ compiler"):
        list(product_bench.measure_products(["qkv"], ["float32"], [1]))
