"""The result table of arXiv 2403.02310 beside the simulated one, as a page of markdown with the raw numbers in JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxserve.simulator.cost import Tokens, decodes
from jaxserve.simulator.paper import (
    BASELINES,
    FALCON,
    LLAMA,
    MAX_TOKENS,
    MISTRAL,
    OBJECTIVES,
    SETUPS,
    STRICT_BUDGET,
    YI,
    Reproduction,
    Setup,
)

CHAT = "openchat_sharegpt4"
ABLATION_RATE = 1.0
"""Requests per second, as in the artifact's script (osdi-experiments/table-6)."""
MEASURED_PREFILL_MS = {2047: 378, 4095: 775, 8191: 1754, 16383: 4535}
"""Yi-34B on two A100s, prompts in one chunk: the artifact's osdi-experiments/figure-9/chunking-overhead.csv."""
MEASURED_DECODE_MS = {1: 46.8, 8: 69.7, 32: 87.9, 128: 189.3}
"""Yi-34B on two A100s, decodes at context 1024, by batch: osdi-experiments/figure-2/decode.csv."""
MEASURED_CHUNKED = {
    512: (1.152, 1.189, 1.117, 0.995), 1024: (1.175, 1.202, 1.109, 0.961), 2048: (0.999, 1.024, 0.937, 0.805),
}  # fmt: skip
"""From the same file, by chunk: times relative to one chunk, for the four prompts."""


@dataclass(frozen=True)
class Row:
    """One line of the result table."""

    result: str
    reported: float
    simulated: float
    unit: str
    bound: str = ""
    """Before the simulated number where it is a bound: the baseline failed at the lowest rate."""

    def cells(self) -> list[str]:
        ratio = self.simulated / self.reported
        return [self.result, _number(self.reported) + self.unit, f"{self.bound}{_number(self.simulated)}{self.unit}",
                f"{self.bound}{ratio:.2f}"]  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def gain(run: Reproduction, setup: Setup, case: tuple[str, str], baseline: str) -> float:
    """Sarathi's capacity over the baseline's, over the lowest rate where the baseline fails everywhere.

    case: workload and objective.
    """
    return run.capacity(setup, *case, "sarathi") / (run.capacity(setup, *case, baseline) or setup.low_rate)


def gain_row(run: Reproduction, setup: Setup, baseline: str, reported: float) -> Row:
    """The largest gain over workloads and objectives, which is what "up to" reports."""
    cases = [(workload, objective) for workload in MAX_TOKENS for objective in OBJECTIVES]
    best = max(cases, key=lambda case: gain(run, setup, case, baseline))
    bound = "" if run.capacity(setup, *best, baseline) else "> "
    where = f"{best[0].split('_')[0]}, {best[1]}"
    return Row(
        f"{setup.model}: capacity over {BASELINES[baseline]}, up to (here: {where})",
        reported, gain(run, setup, best, baseline), "x", bound,
    )  # fmt: skip


def result_rows(run: Reproduction) -> list[Row]:
    chat = (CHAT, "strict")
    falcon = gain(run, FALCON, chat, "prefill_first")
    tp8_rate = run.capacity(FALCON, *chat, "prefill_first", tensor=8, pipeline=1)
    falcon_tp8 = run.capacity(FALCON, *chat, "sarathi") / (tp8_rate or FALCON.low_rate)
    tp8 = sum(run.decode_seconds(FALCON, tensor=8, pipeline=1)) / sum(run.decode_seconds(FALCON))
    overheads = {
        chunk: max(run.prefill_seconds(YI, n, chunk) / run.prefill_seconds(YI, n, n) for n in MEASURED_PREFILL_MS)
        for chunk in MEASURED_CHUNKED
    }
    rows = [
        gain_row(run, MISTRAL, "prefill_first", 2.6),
        gain_row(run, YI, "prefill_first", 3.7),
        gain_row(run, YI, "orca", 4.0),
        gain_row(run, LLAMA, "prefill_first", 4.3),
        gain_row(run, LLAMA, "orca", 6.3),
        gain_row(run, FALCON, "prefill_first", 5.6),
        Row("falcon-180b, chat, strict: over vLLM TP4-PP2", 3.6, falcon, "x"),
        Row("falcon-180b, chat, strict: over vLLM TP8", 4.3, falcon_tp8, "x"),
        Row("falcon-180b: TBT of 32 decodes, TP8 across nodes over TP4-PP2", 2.0, tp8, "x"),
        Row("yi-34b: prefill time with chunks of 512 over whole, at most", 1.25, overheads[512], "x"),
        Row("yi-34b: the same, chunks of 2048", 1.0, overheads[2048], "x"),
    ]
    for name, policy, ttft, tbt in (
        ("hybrid batches only", "hybrid_only", 0.53, 0.68),
        ("chunked prefill only", "chunked_only", 1.04, 0.17),
        ("both", "sarathi", 0.76, 0.14),
    ):
        simulated_ttft, simulated_tbt = run.ablation(policy, 1024, ABLATION_RATE)
        rows.append(Row(f"yi-34b, ablation, {name}: P50 TTFT", ttft, simulated_ttft, " s"))
        rows.append(Row(f"yi-34b, ablation, {name}: P99 TBT", tbt, simulated_tbt, " s"))
    for name, policy, ttft, tbt in (
        ("chunked prefill only", "chunked_only", 1.04, 0.17),
        ("both", "sarathi", 0.76, 0.14),
    ):
        simulated_ttft, simulated_tbt = run.ablation(policy, 512, ABLATION_RATE)
        rows.append(Row(f"the same with tau 512, {name}: P50 TTFT", ttft, simulated_ttft, " s"))
        rows.append(Row(f"the same with tau 512, {name}: P99 TBT", tbt, simulated_tbt, " s"))
    return rows


def slower_rows(run: Reproduction) -> list[Row]:
    """The gains over vLLM, chat, strict, if decode iterations took as long as the paper or its artifact reports."""
    rows = []
    for setup, reported, decode_ms, context in (
        (YI, 3.7, MEASURED_DECODE_MS[32], 1024), (LLAMA, 4.3, 200.0, 4096), (FALCON, 3.6, 200.0, 4096),
    ):  # fmt: skip
        extra = (decode_ms / 1000 - sum(run.decode_seconds(setup, context=context))) / setup.pipeline
        rates = [
            run.capacity(setup, CHAT, "strict", policy, extra_seconds=extra) for policy in ("sarathi", "prefill_first")
        ]
        name = f"{setup.model}, {1000 * extra:.0f} ms more a stage: {rates[0]:.3g}/s over {rates[1]:.3g}/s"
        rows.append(Row(name, reported, rates[0] / (rates[1] or setup.low_rate), "x", "" if rates[1] else "> "))
    return rows


def validation_rows(run: Reproduction) -> list[Row]:
    """The cost model alone, against what the paper and its artifact measured."""
    rows = [
        Row(f"{setup.model}: a decode iteration, batch 32 at 4k (objective / 5)", 1000 * setup.strict_seconds / 5,
            1000 * sum(run.decode_seconds(setup)), " ms")
        for setup in SETUPS
    ]  # fmt: skip
    rows += [
        Row(f"yi-34b: a decode iteration, batch {batch} at 1k", milliseconds,
            1000 * sum(run.decode_seconds(YI, batch=batch, context=1024)), " ms")
        for batch, milliseconds in MEASURED_DECODE_MS.items()
    ]  # fmt: skip
    rows += [
        Row(f"yi-34b: prefill of {n} tokens", milliseconds, 1000 * run.prefill_seconds(YI, n, n), " ms")
        for n, milliseconds in MEASURED_PREFILL_MS.items()
    ]
    falcon = run.cost(FALCON)
    prefill, decode = falcon.stage_seconds([Tokens(0, 4096, True)])[0], run.decode_seconds(FALCON)[0]
    rows.append(Row("falcon-180b: one stage, prefill of 4k tokens", 1150, 1000 * prefill, " ms"))
    rows.append(Row("falcon-180b: one stage, 32 decodes", 200, 1000 * decode, " ms"))
    tile = sum(falcon.stage_seconds([Tokens(0, 257, True)])) / sum(falcon.stage_seconds([Tokens(0, 256, True)]))
    rows.append(Row("257 tokens instead of 256 (here: falcon-180b)", 1.32, tile, "x"))
    return rows


def capacity_table(run: Reproduction) -> str:
    rows = []
    for setup in SETUPS:
        for workload in MAX_TOKENS:
            for objective in OBJECTIVES:
                rates = {policy: run.capacity(setup, workload, objective, policy) for policy in ("sarathi", *BASELINES)}
                gains = [
                    _number(rates["sarathi"] / rates[b]) if rates[b] else f"> {rates['sarathi'] / setup.low_rate:.3g}"
                    for b in BASELINES
                ]
                rows.append([setup.model, workload, objective, str(setup.budget(objective)),
                             *(_number(rate) for rate in rates.values()), *gains])  # fmt: skip
    header = ["model", "workload", "objective", "tau", "sarathi /s", "vLLM /s", "Orca /s", "over vLLM", "over Orca"]
    return table(header, rows)


def breakdown_table(run: Reproduction) -> str:
    """Where a step's time goes, in milliseconds, in the first and in the last stage."""
    rows = []
    for setup in SETUPS:
        cost = run.cost(setup)
        batches = {
            "32 decodes at 4k": decodes(32, 4096),
            f"{STRICT_BUDGET} tokens: 32 decodes, a chunk at 2k": [
                *decodes(32, 4096), Tokens(2048, STRICT_BUDGET - 32, False),
            ],
            "prompt of 4k": [Tokens(0, 4096, True)],
        }  # fmt: skip
        for name, spans in batches.items():
            parts = cost.breakdown(spans, 0)
            rows.append([setup.model, name, *(f"{1000 * seconds:.1f}" for seconds in list(parts.values())[:7]),
                         f"{1000 * sum(parts.values()):.1f}"])  # fmt: skip
    names = list(run.cost(MISTRAL).breakdown(decodes(1, 1)))[:7]
    return table(["model", "batch", *names, "stage, ms"], rows)


def chunking_table(run: Reproduction) -> str:
    rows = []
    for chunk, measured in MEASURED_CHUNKED.items():
        for n, relative in zip(MEASURED_PREFILL_MS, measured, strict=True):
            simulated = run.prefill_seconds(YI, n, chunk) / run.prefill_seconds(YI, n, n)
            rows.append([str(chunk), str(n), f"{relative:.2f}", f"{simulated:.2f}"])
    return table(["chunk", "prompt", "measured, over one chunk", "simulated"], rows)


def bubble_table(run: Reproduction) -> str:
    """What pipelining loses, at a rate that both policies sustain."""
    rows = []
    for setup in (LLAMA, FALCON):
        rate = 0.8 * (run.capacity(setup, CHAT, "strict", "prefill_first") or setup.low_rate)
        for policy in ("sarathi", "prefill_first"):
            seen = run.run(setup, run.deployment(setup, CHAT, policy, STRICT_BUDGET), CHAT, rate)
            rows.append([setup.model, f"{rate:.2f}", policy, f"{seen.bubble_share:.1%}", f"{seen.utilisation:.1%}",
                         f"{seen.summary().tbt.at(99):.2f}"])  # fmt: skip
    return table(["model", "requests/s", "policy", "bubbles", "stages busy", "P99 TBT, s"], rows)


ANALYSIS = "Where they differ, and why"
"""The section that people write; running the experiments again keeps it."""
HEADER = ["result", "reported", "simulated", "simulated / reported"]


def kept_analysis(page: Path) -> str:
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    _, _, rest = text.partition(f"\n## {ANALYSIS}\n\n")
    return rest.partition("\n## ")[0] or "To be written.\n"


def reproduce(run: Reproduction, page: Path) -> str:
    """Run everything; writes ``page`` and the raw numbers beside it, and returns the page."""
    started = time.perf_counter()
    results, validation = result_rows(run), validation_rows(run)
    sections = {
        "Results": table(HEADER, [row.cells() for row in results]),
        ANALYSIS: kept_analysis(page),
        "The cost model against measurements": table(HEADER, [row.cells() for row in validation]),
        "Capacities, requests per second": capacity_table(run),
        "If decodes were as slow as reported: chat, strict, over vLLM": table(
            HEADER, [row.cells() for row in slower_rows(run)]
        ),
        "Pipeline bubbles, chat workload, tau 512": bubble_table(run),
        "Chunking overhead, yi-34b": chunking_table(run),
        "Where a step's time goes, ms, first stage": breakdown_table(run),
    }
    seconds = time.perf_counter() - started
    durations = ", ".join(f"{setup.model} {setup.trial_seconds * run.time_share:.0f} s" for setup in SETUPS)
    intro = (
        "# The Sarathi-Serve paper's results, simulated\n\n"
        "Made by `make reproduce` (scripts/reproduce.py); nothing here was measured on a GPU by us. The engine's own "
        "schedulers serve the\npaper's workloads on a virtual clock, over the cost model of jaxserve/simulator "
        '(evaluation.md, "Simulator"). No constant of it\nis fitted to these results.\n\n'
        f"A trial is of arrivals for {durations}, at least {run.min_requests} of them\n(the paper: 2048); "
        f"one trial per rate, capacities within {run.tolerance:.0%}. Took {seconds:.0f} s on one core.\n"
    )
    text = intro + "".join(f"\n## {title}\n\n{body}" for title, body in sections.items())
    page.write_text(text, encoding="utf-8")
    page.with_suffix(".json").write_text(json.dumps(raw(run, results, validation), indent=1) + "\n", encoding="utf-8")
    return text


def raw(run: Reproduction, results: list[Row], validation: list[Row]) -> dict[str, Any]:
    """Everything that the page was made of; of each trial its P99 TBT and median delay."""
    return {
        "results": [asdict(row) for row in results],
        "validation": [asdict(row) for row in validation],
        "capacities": [
            asdict(key) | {
                "requests_per_second": found.rate,
                "reason": found.reason,
                "trials": [
                    {"rate": t.rate, "passed": t.passed, "p99_tbt_seconds": t.summary.tbt.at(99),
                     "median_delay_seconds": t.summary.delay.at(50), "num_stalls": t.summary.num_stalls}
                    for t in found.trials
                ],
            }
            for key, found in run.capacities.items()
        ],
    }  # fmt: skip
