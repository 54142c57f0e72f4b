"""The notebooks run from top to bottom, and are stored without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
CELL_TIMEOUT_SECONDS = 300


class Run:
    """A notebook that has run."""

    def __init__(self, name: str, folder: Path) -> None:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
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
    run = Run("stall-free", tmp_path)
    stalls = {row.split()[0]: int(row.split()[2]) for row in run.printed("numbers").splitlines()[1:4]}
    assert stalls.pop("prefill_first") > 0
    assert stalls == {"orca": 0, "sarathi": 0}
    assert run.figures == {"timelines", "gaps"}


def test_capacity(tmp_path: Path) -> None:
    run = Run("capacity", tmp_path)
    *_, budget = run.printed("budget").split()
    rates = {row[:24].strip(): float(row[24:].split()[0]) for row in run.printed("curves").splitlines()}
    assert rates[f"sarathi, budget {budget}"] > 0
    assert "prefill_first" in rates
    assert run.figures == {"budget", "plot"}


def test_evaluation(tmp_path: Path) -> None:
    run = Run("evaluation", tmp_path)
    assert run.printed("score").startswith("480 choices of ")
    assert "spared 0%" not in run.printed("score")
    assert "95 % interval [" in run.printed("paired")
    for row in run.printed("results").splitlines()[2:]:
        *_, accuracy, low, high = map(float, row.split()[-4:])
        assert low <= accuracy <= high
    assert run.figures == {"figure"}


def test_simulate(tmp_path: Path) -> None:
    run = Run("simulate", tmp_path)
    assert "for 5 requests/s: " in run.printed("table")
    assert run.figures == {"figure"}
