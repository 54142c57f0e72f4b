"""The cost model against figures that others measured and against arithmetic by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.models.config import ModelConfig
from jaxserve.scheduler.step_time import StepTimeModel
from jaxserve.simulator.cost import FittedCost, HostTime, RooflineCost, Tokens, decodes
from jaxserve.simulator.devices import A40_48G, A100_80G, A100_80G_PAIRS, H100, Device
from tests.simulator.models import FALCON_180B, LLAMA2_70B, MISTRAL_7B, MIXTRAL_8X7B


def total(cost: RooflineCost, spans: list[Tokens]) -> float:
    return sum(cost.stage_seconds(spans))


@pytest.mark.parametrize(
    ("device", "rows", "inner", "outer", "milliseconds"),
    [
        # CodeLlama-34B on an A100
        (A100_80G, 32, 8192, 10240, 0.116), (A100_80G, 32, 8192, 8192, 0.094), (A100_80G, 32, 8192, 44032, 0.474),
        (A100_80G, 128, 8192, 44032, 0.508), (A100_80G, 136, 8192, 44032, 0.800), (A100_80G, 384, 8192, 44032, 1.176),
        (A100_80G, 512, 8192, 44032, 1.650), (A100_80G, 512, 22016, 8192, 0.817), (A100_80G, 4096, 8192, 44032, 12.13),
        (A100_80G, 4096, 22016, 8192, 6.20), (A100_80G, 4096, 8192, 10240, 2.842), (A100_80G, 4096, 8192, 8192, 2.367),
        # Llama-2-70B on A40s
        (A40_48G, 32, 8192, 10240, 0.330), (A40_48G, 32, 8192, 57344, 1.741), (A40_48G, 32, 28672, 8192, 0.894),
        (A40_48G, 4096, 8192, 28672, 17.34), (A40_48G, 4096, 14336, 8192, 8.23), (A40_48G, 4096, 8192, 5120, 3.07),
    ],
)  # fmt: skip
def test_matmuls_take_what_vidur_measured(
    device: Device, rows: int, inner: int, outer: int, milliseconds: float
) -> None:
    """Medians from microsoft/vidur, data/profiling/compute/{a100/codellama,a40/meta-llama}/.../mlp.csv."""
    assert RooflineCost(LLAMA2_70B, device)._matmul_seconds(rows, inner, outer) == pytest.approx(
        milliseconds / 1000, rel=0.15
    )


@pytest.mark.parametrize(
    ("model", "tensor", "num_tokens", "milliseconds"),
    [(LLAMA2_70B, 4, 128, 47), (LLAMA2_70B, 4, 2048, 377), (FALCON_180B, 8, 128, 61), (FALCON_180B, 8, 2048, 509)],
)
def test_prefills_take_what_tensorrt_llm_takes(
    model: ModelConfig, tensor: int, num_tokens: int, milliseconds: float
) -> None:
    """First-token latencies on A100s in float16, from NVIDIA/TensorRT-LLM, docs/source/performance.md (v0.5)."""
    cost = RooflineCost(model, A100_80G, tensor=tensor)
    assert total(cost, [Tokens(0, num_tokens, True)]) == pytest.approx(milliseconds / 1000, rel=0.3)


def test_falcon_prefill_takes_what_the_paper_reports() -> None:
    """arXiv 2403.02310: a prefill of 4k tokens takes about 1150 ms, in each of the two stages."""
    cost = RooflineCost(FALCON_180B, A100_80G_PAIRS, tensor=4, pipeline=2)
    for seconds in cost.stage_seconds([Tokens(0, 4096, True)]):
        assert seconds == pytest.approx(1.15, rel=0.1)


def test_all_reduce_takes_what_vidur_measured() -> None:
    """microsoft/vidur, data/profiling/network/a100_pairwise_nvlink/all_reduce.csv: four GPUs of one node."""
    assert A100_80G_PAIRS.all_reduce_seconds(1 << 20, 4) == pytest.approx(124e-6, rel=0.15)
    assert A100_80G_PAIRS.all_reduce_seconds(1 << 22, 4) == pytest.approx(317e-6, rel=0.15)
    assert A100_80G_PAIRS.all_reduce_seconds(1 << 26, 4) == pytest.approx(4.268e-3, rel=0.05)
    assert A100_80G.all_reduce_seconds(1 << 20, 1) == 0


def test_decode_by_hand() -> None:
    """Mistral-7B, 32 decodes at context 4096: every weight but the embedding and every key and value is read once."""
    cost = RooflineCost(MISTRAL_7B, A100_80G)
    parts = cost.breakdown(decodes(32, 4096))
    rate = 2.039e12 * 0.755
    layer_bytes = 2 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    rows_bytes = 2 * 32 * (4096 + 6144 + 4096 + 4096 + 4096 + 28672 + 14336 + 4096)
    read = parts["projections"] + parts["mlp"] - 32 * 4 * 6e-6
    assert read == pytest.approx(32 * (layer_bytes + rows_bytes) / rate)
    assert parts["decode attention"] == pytest.approx(32 * (6e-6 + 32 * 4096 * 8 * 128 * 2 * 2 / rate))
    assert parts["lm_head"] == pytest.approx(6e-6 + 2 * (4096 * 32000 + 32 * 36096) / rate)
    assert parts["prefill attention"] == parts["all-reduce"] == 0
    assert cost.weight_bytes == 32 * layer_bytes + 2 * 2 * 32000 * 4096
    assert cost.kv_bytes_per_token == 131072


def test_prefill_by_hand() -> None:
    """Mistral-7B, a chunk of 2048 after 1024: matmuls and attention compute at their shares of the peak."""
    parts = RooflineCost(MISTRAL_7B, A100_80G).breakdown([Tokens(1024, 2048, False)])
    flops = 2 * 2048 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    computed = parts["projections"] + parts["mlp"] - 32 * 4 * 6e-6
    assert computed == pytest.approx(32 * flops / (312e12 * 0.78))
    pairs = 2048 * 1024 + 2048 * 2049 // 2
    assert parts["prefill attention"] == pytest.approx(32 * (6e-6 + 4 * pairs * 4096 / (312e12 * 0.6)))
    assert parts["lm_head"] == 0


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([MISTRAL_7B, LLAMA2_70B, FALCON_180B, MIXTRAL_8X7B]),
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    st.integers(1, 300), st.integers(0, 8000), st.integers(1, 500),
)  # fmt: skip
def test_more_work_takes_no_less(
    model: ModelConfig, shape: tuple[int, int], num_tokens: int, start: int, more: int
) -> None:
    cost = RooflineCost(model, H100, tensor=shape[0], pipeline=shape[1])
    less = total(cost, [Tokens(start, num_tokens + 1, True)])
    assert total(cost, [Tokens(start, num_tokens + 1 + more, True)]) >= less
    assert total(cost, [Tokens(start + more, num_tokens + 1, True)]) >= less
    assert total(cost, decodes(num_tokens + 1, start + 1)) >= total(cost, decodes(num_tokens, start + 1))
    assert total(cost, decodes(num_tokens, start + 1 + more)) >= total(cost, decodes(num_tokens, start + 1))


def test_a_token_beyond_a_tile_costs_a_tile() -> None:
    """arXiv 2403.02310: 257 tokens instead of 256 cost 32 % more."""
    cost = RooflineCost(LLAMA2_70B, A100_80G, tensor=4)
    ratio = total(cost, [Tokens(0, 257, True)]) / total(cost, [Tokens(0, 256, True)])
    assert 1.15 < ratio < 1.5


def test_tensor_parallelism_divides_the_work_and_adds_reductions() -> None:
    one = RooflineCost(LLAMA2_70B, A100_80G).breakdown([Tokens(0, 2048, True)])
    four = RooflineCost(LLAMA2_70B, A100_80G, tensor=4).breakdown([Tokens(0, 2048, True)])
    assert four["mlp"] == pytest.approx(one["mlp"] / 4, rel=0.01)
    assert four["prefill attention"] == pytest.approx(one["prefill attention"] / 4, rel=0.1)
    assert four["all-reduce"] == 160 * A100_80G.all_reduce_seconds(2048 * 8192 * 2, 4)


def test_falcon_reduces_once_a_layer() -> None:
    parts = RooflineCost(FALCON_180B, A100_80G, tensor=4).breakdown(decodes(4, 100))
    assert parts["all-reduce"] == 80 * A100_80G.all_reduce_seconds(4 * 14848 * 2, 4)


def test_stages_share_the_layers() -> None:
    cost = RooflineCost(dataclasses.replace(LLAMA2_70B, num_layers=81), A100_80G, tensor=2, pipeline=4)
    assert [stage.total() for stage in cost.stages] == [21, 20, 20, 20]
    seconds = cost.stage_seconds(decodes(8, 1000))
    assert seconds[1] == seconds[2] < seconds[0]
    assert "lm_head" in cost.breakdown(decodes(8, 1000), 3)
    assert "lm_head" not in cost.breakdown(decodes(8, 1000), 0)


def test_a_mixture_reads_the_experts_that_are_chosen() -> None:
    cost = RooflineCost(MIXTRAL_8X7B, A100_80G)
    one, many = (cost.breakdown(decodes(n, 100))["mlp"] for n in (1, 64))
    assert 3.5 < many / one < 4.5  # 2 of 8 experts, then all
    assert cost.weight_bytes == pytest.approx(93.4e9, rel=0.01)  # Mixtral-8x7B: 46.7 billion parameters


def test_host_time_is_paid_in_every_stage() -> None:
    host = HostTime(batch_seconds=1.0, request_seconds=0.5)
    with_host = RooflineCost(LLAMA2_70B, A100_80G, pipeline=2, host=host).stage_seconds(decodes(4, 100))
    without = RooflineCost(LLAMA2_70B, A100_80G, pipeline=2).stage_seconds(decodes(4, 100))
    assert [a - b for a, b in zip(with_host, without, strict=True)] == pytest.approx([3.0, 3.0])


def test_padding_is_computed_but_attends_to_nothing() -> None:
    cost = RooflineCost(LLAMA2_70B, A100_80G, tensor=2, pipeline=2)
    own, padded, prompt = decodes(8, 1000), decodes(128, 1000), [Tokens(0, 512, True)]
    assert cost.stage_seconds(own, 8) == cost.stage_seconds(own)
    for few, same_rows, many in zip(cost.stage_seconds(own), cost.stage_seconds(own, 128), cost.stage_seconds(padded),
                                    strict=True):  # fmt: skip
        assert few < same_rows < many
    parts, empty = cost.breakdown(prompt), cost.breakdown([], num_rows=512)
    assert empty["mlp"] == parts["mlp"]
    assert empty["prefill attention"] == empty["decode attention"] == 0
    assert cost.breakdown([], 1, 512)["lm_head"] == 0


def test_measured_steps() -> None:
    step_time = StepTimeModel({128: 0.010, 256: 0.015}, seconds_per_kv_token=1e-6, seconds_per_pair=1e-8)
    cost = FittedCost(step_time, window=1000)
    batch = [*decodes(10, 500), *decodes(2, 3000), Tokens(0, 100, False)]
    assert cost.stage_seconds(batch) == [pytest.approx(0.010 + 1e-6 * (10 * 500 + 2 * 1000) + 1e-8 * 5050)]
    assert cost.stage_seconds(batch, 129)[0] == pytest.approx(cost.stage_seconds(batch)[0] + 0.005)
    assert cost.stage_seconds([Tokens(0, 129, False)])[0] > 0.015
    assert cost.stage_seconds([Tokens(0, 512, False)])[0] > 0.030  # more than was measured: in proportion
