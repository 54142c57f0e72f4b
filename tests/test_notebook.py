"""The notebook runs from top to bottom, and is stored without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
CELL_TIMEOUT_SECONDS = 300


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_outputs_are_stored(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


def test_quickstart(tmp_path: Path) -> None:
    notebook = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=CELL_TIMEOUT_SECONDS, kernel_name="python3", resources=resources).execute()
    cells = {cell.id: printed(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert "'The capital of France is' -> ' Paris" in cells["generate"]
    assert cells["chat"].strip()
    header, *rows = cells["latency"].splitlines()
    assert header.startswith("prompt tokens   TTFT ms ")
    assert len(rows) == 4
    assert all(float(row.split()[1]) > 0 and row.split()[-1] == "0" for row in rows)
    true, false = (float(row.split()[0]) for row in cells["score"].splitlines())
    assert true > false
