"""Which instruction set is chosen on which processor."""

from __future__ import annotations

import pytest

from jaxserve.errors import ConfigError
from jaxserve.kernels import instruction_sets
from jaxserve.kernels.instruction_sets import Processor, candidates

V3 = "fma", "avx2", "f16c", "sse2"
V4 = *V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"
VNNI = *V4, "avx512vnni"
BF16 = *VNNI, "avx512bf16"
TILES = *BF16, "amxtile", "amxbf16", "amxint8"


@pytest.fixture(autouse=True)
def permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_sets, "tiles_are_permitted", lambda: True)


def names(vendor: str, features: tuple[str, ...]) -> list[str]:
    return [one.name for one in candidates(Processor(vendor, frozenset(features)))]


@pytest.mark.parametrize(
    ("vendor", "features", "expected"),
    [
        ("GenuineIntel", TILES, ["amx", "avx512_vnni", "avx512", "avx2", "generic"]),
        ("GenuineIntel", BF16, ["avx512_vnni", "avx512", "avx2", "generic"]),  # half as fast as float32 there
        ("AuthenticAMD", BF16, ["avx512_bf16", "avx512_vnni", "avx512", "avx2", "generic"]),
        ("GenuineIntel", VNNI, ["avx512_vnni", "avx512", "avx2", "generic"]),
        ("GenuineIntel", V4, ["avx512", "avx2", "generic"]),
        ("AuthenticAMD", V3, ["avx2", "generic"]),
        ("GenuineIntel", ("sse2", "avx2"), ["generic"]),
        ("", ("asimd", "bf16"), ["generic"]),  # aarch64
    ],
)
def test_the_fastest_of_a_processor(vendor: str, features: tuple[str, ...], expected: list[str]) -> None:
    assert names(vendor, features) == expected


def test_without_permission_for_tiles_the_next_best_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_sets, "tiles_are_permitted", lambda: False)
    assert names("GenuineIntel", TILES)[0] == "avx512_vnni"


def test_any_that_runs_can_be_forced() -> None:
    intel = Processor("GenuineIntel", frozenset(TILES))
    for name in ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "generic"):
        assert [one.name for one in candidates(intel, name)] == [name]


def test_one_that_the_processor_lacks_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"JAXSERVE_CPU_ISA must be .*: avx2, generic.*, got 'amx'"):
        candidates(Processor("AuthenticAMD", frozenset(V3)), "amx")


def test_this_processor_is_read() -> None:
    assert isinstance(instruction_sets.Processor.here().features, frozenset)
    assert instruction_sets.candidates_here()
