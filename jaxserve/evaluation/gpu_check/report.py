"""docs/results/gpu.md: what was measured on a GPU beside what had been predicted, from the records of a check.

Without records it is the empty table, and how to fill it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.evaluation.attention_variants import VARIANTS
from jaxserve.evaluation.device_bench import markdown_table
from jaxserve.evaluation.gpu_check import predictions
from jaxserve.evaluation.gpu_check.attention import PLAIN
from jaxserve.evaluation.gpu_check.predictions import CEILINGS
from jaxserve.evaluation.gpu_check.products import BITS, GROUP, KINDS, PAIRS
from jaxserve.evaluation.gpu_check.products import ROWS as PRODUCT_ROWS
from jaxserve.evaluation.gpu_check.records import Record
from jaxserve.evaluation.gpu_check.server import POLICIES
from jaxserve.evaluation.gpu_check.stages import STAGES
from jaxserve.evaluation.gpu_check.wheels import SITE, carry_commands
from jaxserve.evaluation.kernel_bench import CASES, MOST_ERROR, SHAPE, WINDOW
from jaxserve.evaluation.step_bench import step_cases
from jaxserve.kernels.registry import GPU_BACKENDS

BUDGET_SECONDS = 470
RUN = (
    f"PYTHONPATH={SITE}:. JAXSERVE_CACHE=cache TRITON_DISABLE_LINE_INFO=1 PYTHONUNBUFFERED=1 "
    f"python3 scripts/gpu_check.py --out OUT --budget {BUDGET_SECONDS}"
)
SERVER_NAMES = {
    "tbt_p50_seconds": "TBT p50", "tbt_p99_seconds": "TBT p99", "tbt_p100_seconds": "TBT max",
    "ttft_p50_seconds": "TTFT p50", "ttft_p99_seconds": "TTFT p99",
}  # fmt: skip


def render(records: Sequence[Record], wheels: Mapping[str, str], python_version: str) -> str:
    """The page. ``wheels``: what a machine lacks that the page's command is for."""
    parts = [
        "# On a GPU: predictions and measurements",
        "`scripts/gpu_check.py --report` writes this page: predictions from the code, measurements from the records in "
        "gpu.jsonl beside it. "
        + (f"Measured on {_device(records)}." if records else "**No GPU has been at hand yet: nothing is measured.**"),
        _command(wheels, python_version),
        *_section("The machine", _machine(records)),
        *_section("Stages", _stages(records)),
        *_section("Are the kernels right?", _correctness(records)),
        *_section("Attention alone", _attention(records)),
        *_section("What was tried", _varied(records)),
        *_section("Products of 4-bit codes", _products(records)),
        *_section("Whole steps of Mistral-7B", _steps(records)),
        *_section("The server under load", _server(records)),
        *_section("Hardware counters", _counters(records)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, parts: Iterable[str]) -> list[str]:
    found = [part for part in parts if part]
    return [f"## {title}", *found] if found else []


def _of(records: Sequence[Record], kind: str, stage: str | None = None) -> list[Record]:
    return [record for record in records if record["kind"] == kind and stage in (None, record["stage"])]


def _device(records: Sequence[Record]) -> str:
    return next((record["facts"].get("devices", "?") for record in _of(records, "machine")), "an unknown device")


def _number(value: float | None, unit: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def _command(wheels: Mapping[str, str], python_version: str) -> str:
    download, install = carry_commands(wheels, python_version)
    return (
        f"To carry what an image of jax and Triton lacks, where there is a network, then to run:\n\n"
        f"```\n{download}\n```\n\n```\n{install} &&\n{RUN}\n```\n\n"
        "Then `python scripts/gpu_check.py --report OUT` makes this page."
    )


def _machine(records: Sequence[Record]) -> list[str]:
    facts = [
        f"- {name}: {value}"
        for record in _of(records, "machine")
        for name, value in (record["facts"] | {k: record[k] for k in ("gpu", "ptxas", "ncu", "bytes_limit")}).items()
    ]
    measured = next(iter(_of(records, "ceilings")), {})
    rows = [
        {
            "ceiling": name,
            **{device: _number(ceilings._asdict()[field], unit, 0) for device, ceilings in CEILINGS.items()},
            "measured": _number(measured.get(field), unit, 0),
        }
        for name, field, unit in (
            ("copy, GB/s read and written", "copy_bytes_per_second", 1e9),
            ("matrix product, TFLOP/s", "matmul_flops_per_second", 1e12),
        )
    ]
    return ["\n".join(facts), "Predictions below go by these ceilings:", markdown_table(rows)]


def _stages(records: Sequence[Record]) -> list[str]:
    found = {record["stage"]: record for record in _of(records, "stage")}
    rows = [
        {
            "stage": stage.name,
            "limit s": f"{stage.limit_seconds:g}",
            "took s": _number(found.get(stage.name, {}).get("seconds")),
            "result": found.get(stage.name, {}).get("status", "-"),
        }
        for stage in STAGES
    ]
    notes = [f"- {record['stage']}: {record['message']}" for record in _of(records, "failure")]
    return [markdown_table(rows), "\n".join(notes)]


def _correctness(records: Sequence[Record]) -> list[str]:
    found = {(record["variant"], record["backend"]): record for record in _of(records, "correctness")}

    def cell(record: Record | None) -> str:
        if record is None:
            return "-"
        if "failure" in record:
            return f"failed: {record['failure'].splitlines()[0][:60]}"
        errors = [error for error in (*record["errors"], record["rotation_error"]) if error is not None]
        worst = f"{max(errors):.1e}" if len(errors) == len(record["errors"]) + 1 else "rows left out"
        return worst if record["right"] else f"**wrong**: {worst}"

    rows = [
        {"variant": name} | {backend: cell(found.get((name, backend))) for backend in GPU_BACKENDS} for name in VARIANTS
    ]
    checks = [
        f"- {record['check']}: {'equal' if record['equal'] else '**not equal**'}" for record in _of(records, "graphs")
    ]
    golden = [
        f"- {record['checkpoint']}: {'the tokens of transformers' if record['right'] else '**other tokens**'}"
        for record in _of(records, "golden")
    ]
    return [
        "Errors of attention, and of rotating and writing, relative to float64, the largest of three runs. Predicted: "
        f"all below {MOST_ERROR:g} (5e-2 for what is written to float8), the same in every run; CUDA graphs compute "
        "what single launches do; three tiny models give the tokens of transformers.",
        markdown_table(rows),
        "\n".join(checks + golden),
    ]


def _attention(records: Sequence[Record]) -> list[str]:
    found = {
        (record["case"], record["backend"], record["window"]): record
        for record in _of(records, "attention")
        if record["plain"]
    }
    rows = []
    for case in PLAIN:
        for backend, kernels in GPU_BACKENDS.items():
            if CASES[case].kind not in kernels.own_kernels:
                continue
            for window in (None,) if CASES[case].rotates else (None, WINDOW):
                rows.append(_attention_row(case, backend, window, found.get((case, backend, window), {})))
    return [
        f"One call of {SHAPE.num_heads}/{SHAPE.num_kv_heads} heads of {SHAPE.head_dim} in bfloat16, without and with "
        "Mistral's window. Microseconds: floor → prediction for both devices; of floor: the floor at the measured "
        "ceilings, by the time.",
        markdown_table(rows),
    ]


def _attention_row(case: str, backend: str, window: int | None, record: Record) -> dict[str, str]:
    work, seconds = CASES[case].work(SHAPE, window), (record.get("seconds") or {}).get("median")
    return {
        "case": case,
        "backend": backend,
        "window": str(window or "-"),
        **{
            device: f"{_number(work.floor_seconds(ceilings), 1e-6, 0)} → "
            f"{_number(predictions.attention_seconds(case, backend, window, ceilings), 1e-6, 0)}"
            for device, ceilings in CEILINGS.items()
        },
        "measured": record.get("failure") or _number(seconds, 1e-6),
        "of floor": "-" if seconds is None else f"{record['floor_seconds'] / seconds:.0%}",
        "GB/s": _number(seconds and work.num_bytes / seconds, 1e9, 0),
        "TFLOP/s": _number(seconds and work.flops / seconds, 1e12, 0),
        "error": "-" if record.get("error") is None else f"{record['error']:.1e}",
    }


def _varied(records: Sequence[Record]) -> list[str]:
    found = _of(records, "attention")
    plain = {(r["case"], r["backend"]): r["seconds"]["median"] for r in found if not r["variant"] and r["seconds"]}
    rows = [
        {
            "case": record["case"],
            "backend": record["backend"],
            "variant": record["variant"],
            "us": _number(record["seconds"] and record["seconds"]["median"], 1e-6),
            "plain us": _number(plain.get((record["case"], record["backend"])), 1e-6),
            "failure": record["failure"] or "-",
        }
        for record in found
        if not record["plain"]
    ]
    return [markdown_table(rows)] if rows else []


def _products(records: Sequence[Record]) -> list[str]:
    found = {(record["pair"], record["rows"], record["product"]): record for record in _of(records, "product")}
    rows = []
    for name, pair in PAIRS.items():
        for num_rows in sorted(PRODUCT_ROWS):
            predicted = {
                device: [predictions.product_seconds(name, num_rows, kind, ceilings) for kind in KINDS]
                for device, ceilings in CEILINGS.items()
            }
            dense, codes = (found.get((name, num_rows, kind), {}) for kind in KINDS)
            seconds: list[Any] = [(record.get("seconds") or {}).get("median") for record in (dense, codes)]
            floors = {
                device: pair.work(num_rows, "codes").floor_seconds(ceilings) for device, ceilings in CEILINGS.items()
            }
            rows.append({
                "products": name,
                "rows": str(num_rows),
                **{
                    device: f"{_number(floors[device], 1e-6)} → {_number(of_codes, 1e-6)} ({of_dense / of_codes:.1f}x)"
                    for device, (of_dense, of_codes) in predicted.items()
                },
                "bfloat16": dense.get("failure") or _number(seconds[0], 1e-6),
                "codes": codes.get("failure") or _number(seconds[1], 1e-6),
                "gain": "-" if None in seconds else f"{seconds[0] / seconds[1]:.1f}x",
                "of floor": f"{codes['floor_seconds'] / seconds[1]:.0%}" if seconds[1] else "-",
                "error": "-" if codes.get("error") is None else f"{codes['error']:.1e}",
            })  # fmt: skip
    return [
        f"Of one layer of Mistral-7B with weights of {BITS} bits in groups of {GROUP}: up to 256 rows by the kernel of "
        "triton_codes.py, above by cuBLASLt, on numbers made of the codes. MLP: gate_up and down; attention: qkv and "
        "out. Microseconds: floor → prediction of codes, and how many times as fast as bfloat16 that is. Error: "
        "relative to the same codes multiplied by XLA.",
        markdown_table(rows),
    ]


def _steps(records: Sequence[Record]) -> list[str]:
    stages = [stage.name for stage in STAGES if stage.module == "steps"]
    found = {(record["stage"], record["step"]): record for record in _of(records, "step")}
    rows = []
    for case in step_cases():
        work = predictions.model_step(case)
        row = {"step": case.name}
        for device, ceilings in CEILINGS.items():
            predicted = predictions.step_seconds(work, ceilings)
            row[device] = f"{_number(work.floor_seconds(ceilings), 1e-3)} → {_number(predicted, 1e-3)}"
        for stage in stages:
            record = found.get((stage, case.name), {})
            seconds = record.get("seconds", {}).get("median")
            row[stage] = _number(seconds, 1e-3, 2)
            row[f"{stage}: of floor"] = "-" if seconds is None else f"{record['floor_seconds'] / seconds:.0%}"
        rows.append(row)
    notes = []
    for record in _of(records, "under_load"):
        events = ", ".join(f"{count} of {name}" for name, count in record["graph_events"].items()) or "none logged"
        notes.append(
            f"- {record['stage']}, {record['num_steps']} steps under load: the device waited "
            f"{1e3 * record['gap_seconds_per_step']:.3f} ms between two and worked "
            f"{1e3 * record['device_seconds_per_step']:.3f} ms on one; events of graphs: {events}"
        )
    return [
        "Milliseconds: floor → prediction for both devices. steps: with products of cuBLASLt alone; tuned-steps: "
        "with XLA's own choice; no-split-k-steps: the same, none of them split. "
        "Predicted besides: no time between two steps, one update of the graph for each.",
        markdown_table(rows),
        "\n".join(notes),
    ]


def _server(records: Sequence[Record]) -> list[str]:
    found = {record["policy"]: record for record in _of(records, "server")}
    rows = [
        {
            "policy": policy,
            "what": title,
            **{
                device: _number(predictions.server_seconds(policy, ceilings).get(name), 1e-3)
                for device, ceilings in CEILINGS.items()
            },
            "measured": _number(found.get(policy, {}).get(name), 1e-3),
        }
        for policy in POLICIES
        for name, title in SERVER_NAMES.items()
    ]
    notes = [
        f"- {policy}: {record['num_stream_tokens']} tokens of streams and {record['num_prompts']} prompts in "
        f"{record['seconds']:g} s of load, {record['num_stalls']} stalls; started in {record['started_seconds']:.1f} s"
        for policy, record in found.items()
    ]
    return [
        "Mistral-7B behind gRPC: eight streams decode while four prompts of 1,800 tokens a second arrive. Milliseconds "
        "as clients see them, TBT of the streams and TTFT of the prompts.",
        markdown_table(rows),
        "\n".join(notes),
    ]


def _counters(records: Sequence[Record]) -> list[str]:
    rows = [
        {
            "kernel": record["kernel"],
            "us": _number(record.get("seconds"), 1e-6),
            "DRAM %": _number(record.get("dram_share")),
            "tensor pipe %": _number(record.get("tensor_share")),
            "registers": _number(record.get("registers"), 1, 0),
        }
        for record in _of(records, "counters")
        if "kernel" in record
    ]
    return [markdown_table(rows)] if rows else []


def write_report(folder: Path, page: str) -> Path:
    path = folder / "gpu.md"
    path.write_text(page, encoding="utf-8")
    return path
