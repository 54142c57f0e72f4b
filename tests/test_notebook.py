"""The notebooks run from top to bottom, and are stored without outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
CELL_TIMEOUT_SECONDS = 300
SHORT_PROMPTS = {
    "= 500, (24, 40)": "= 100, (24, 40)",
    "MAX_MODEL_LEN = 528": "MAX_MODEL_LEN = 128",
    '"prefill_first": 536, "orca": 536, "sarathi": 64': '"prefill_first": 136, "orca": 136, "sarathi": 16',
}
SMALL_MODEL = {'"hidden_size": 512, "intermediate_size": 1408': '"hidden_size": 64, "intermediate_size": 64'}


class Run:
    """A notebook that has run. ``smaller``: what is written in it, and what takes less time."""

    def __init__(self, name: str, folder: Path, smaller: Mapping[str, str] = MappingProxyType({})) -> None:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        for text, less in smaller.items():
            (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and text in cell.source)
            cell.source = cell.source.replace(text, less)
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=CELL_TIMEOUT_SECONDS, kernel_name="python3", resources=resources).execute()
        self._cells = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}

    def printed(self, cell: str) -> str:
        return "".join(output.text for output in self._cells[cell] if output.get("name") == "stdout")

    @property
    def figures(self) -> set[str]:
        """The cells that show one."""
        return {cell for cell, outputs in self._cells.items() if any("image/png" in o.get("data", {}) for o in outputs)}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_outputs_are_stored(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


def test_quickstart(tmp_path: Path) -> None:
    run = Run("quickstart", tmp_path)
    assert "'The capital of France is' -> ' Paris" in run.printed("generate")
    assert run.printed("chat").strip()
    header, *rows = run.printed("latency").splitlines()
    assert header.startswith("prompt tokens   TTFT ms ")
    assert len(rows) == 4
    assert all(float(row.split()[1]) > 0 and row.split()[-1] == "0" for row in rows)
    true, false = (float(row.split()[0]) for row in run.printed("score").splitlines())
    assert true > false


def test_stall_free(tmp_path: Path) -> None:
    run = Run("stall-free", tmp_path, SMALL_MODEL | SHORT_PROMPTS)
    stalls = {row.split()[0]: int(row.split()[2]) for row in run.printed("numbers").splitlines()[1:4]}
    assert stalls.pop("prefill_first") > 0
    assert stalls == {"orca": 0, "sarathi": 0}
    assert run.figures == {"timelines", "gaps"}


def test_capacity(tmp_path: Path) -> None:
    run = Run("capacity", tmp_path, SMALL_MODEL | {"528, 8, 640": "528, 8, 128", "num_requests=48": "num_requests=16"})
    *_, budget = run.printed("budget").split()
    rates = {row[:24].strip(): float(row[24:].split()[0]) for row in run.printed("curves").splitlines()}
    assert rates[f"sarathi, budget {budget}"] > 0
    assert "prefill_first" in rates
    assert run.figures == {"budget", "plot"}


def test_evaluation(tmp_path: Path) -> None:
    run = Run("evaluation", tmp_path, {"NUM_CHOICES, NUM_SHOTS = 4, 3": "NUM_CHOICES, NUM_SHOTS = 2, 3"})
    assert run.printed("score").startswith("240 choices of ")
    assert "spared 0%" not in run.printed("score")
    assert "95 % interval [" in run.printed("paired")
    for row in run.printed("results").splitlines()[2:]:
        *_, accuracy, low, high = map(float, row.split()[-4:])
        assert low <= accuracy <= high
    assert run.figures == {"figure"}


def test_simulate(tmp_path: Path) -> None:
    run = Run("simulate", tmp_path, {"duration_seconds=12": "duration_seconds=3", "tolerance=0.3": "tolerance=1.0"})
    assert "for 5 requests/s: " in run.printed("table")
    assert run.figures == {"figure"}
