"""The paper's experiments: single runs of those behind docs/results/paper.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.simulator.cost import Tokens, decodes
from jaxserve.simulator.paper import FALCON, MISTRAL, YI, CapacityKey, Reproduction, Setup
from jaxserve.simulator.reproduce import ANALYSIS, Row, gain_row, kept_analysis, raw, table
from tests.simulator.models import FALCON_180B, MISTRAL_7B, YI_34B

CHAT = ("openchat_sharegpt4", "strict")


@pytest.fixture(scope="module")
def run() -> Reproduction:
    models = {"mistral-7b": MISTRAL_7B, "yi-34b": YI_34B, "falcon-180b": FALCON_180B}
    return Reproduction(models)


@pytest.mark.parametrize(("setup", "sustained", "too_much"), [(MISTRAL, 2.4, 1.2), (FALCON, 0.8, 0.4)])
def test_stall_free_batching_doubles_the_capacity(
    run: Reproduction, setup: Setup, sustained: float, too_much: float
) -> None:
    """Mistral-7B on one GPU, Falcon-180B pipelined over two nodes; chat workload, strict objective."""
    for policy, rate, passes in (("sarathi", sustained, True), ("prefill_first", too_much, False)):
        deployment = run.deployment(setup, CHAT[0], policy, 512)
        assert run.run(setup, deployment, CHAT[0], rate).meets(setup.objective("strict")) == passes


def test_the_ablation_ranks_as_in_the_paper(run: Reproduction) -> None:
    ttft, tbt = {}, {}
    for policy in ("hybrid_only", "chunked_only", "sarathi"):
        ttft[policy], tbt[policy] = run.ablation(policy, 1024, 1.0)
    assert ttft["hybrid_only"] < ttft["sarathi"] < ttft["chunked_only"]
    assert tbt["sarathi"] <= tbt["chunked_only"] < tbt["hybrid_only"]


@pytest.mark.parametrize(("num_tokens", "milliseconds"), [(2047, 378), (4095, 775), (8191, 1754), (16383, 4535)])
def test_yi_prefills_take_what_the_authors_measured(run: Reproduction, num_tokens: int, milliseconds: float) -> None:
    """github.com/microsoft/sarathi-serve, osdi-experiments/figure-9/chunking-overhead.csv."""
    assert run.prefill_seconds(YI, num_tokens, num_tokens) == pytest.approx(milliseconds / 1000, rel=0.35)


def test_yi_matmuls_take_what_the_authors_measured(run: Reproduction) -> None:
    """osdi-experiments/table-2/results.csv, column linear: 25.5 ms for four decodes, 161 ms for a chunk of 1024."""
    for spans, milliseconds in ((decodes(4, 1024), 25.5), ([Tokens(0, 1024, True)], 160.9)):
        parts = run.cost(YI).breakdown(spans)
        assert parts["projections"] + parts["mlp"] == pytest.approx(milliseconds / 1000, rel=0.15)


def test_small_chunks_cost_a_little(run: Reproduction) -> None:
    whole = run.prefill_seconds(YI, 8191, 8191)
    assert 1.0 < run.prefill_seconds(YI, 8191, 2048) / whole < run.prefill_seconds(YI, 8191, 512) / whole < 1.25


def test_a_capacity_is_searched_once() -> None:
    lines: list[str] = []
    run = Reproduction({"mistral-7b": MISTRAL_7B}, min_requests=16, time_share=0, tolerance=0.5, log=lines.append)
    first = run.capacity(MISTRAL, *CHAT, "orca")
    assert run.capacity(MISTRAL, *CHAT, "orca") == first
    assert len(lines) == 1
    assert CapacityKey("mistral-7b", "TP1-PP1", *CHAT, "orca", 0.0) in run.capacities


def test_a_baseline_that_fails_everywhere_gives_a_bound() -> None:
    class Failing(Reproduction):
        def capacity(self, *args: object, **shape: int) -> float:
            return 0.0 if "orca" in args else 2.0

    row = gain_row(Failing({}), MISTRAL, "orca", 4.0)
    assert row.cells() == ["mistral-7b: capacity over Orca, up to (here: openchat, strict)", "4x", "> 8x", "> 2.00"]
    assert raw(Failing({}), [row], [])["results"][0]["simulated"] == 8


def test_the_page_keeps_what_people_wrote(tmp_path: Path) -> None:
    page = tmp_path / "paper.md"
    assert kept_analysis(page) == "To be written.\n"
    page.write_text(f"# Title\n\n## {ANALYSIS}\n\nBecause.\n\n- And so on.\n\n## Next\n\nx\n")
    assert kept_analysis(page) == "Because.\n\n- And so on.\n"


def test_tables() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert Row("r", 2.0, 3.0, " s").cells() == ["r", "2 s", "3 s", "1.50"]
