"""The notebook runs from its first cell to its last one, at sizes of a test; it is kept without
outputs, and the files that it names are there.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.docs.test_pages import NAMED
from tests.helpers import ROOT

NOTEBOOK = ROOT / "notebooks" / "intelligens.ipynb"
SMALL = """
SIDE, PRETRAIN_SLIDES, SLIDES = 512, 4, 12
EPOCHS, EPOCH_TILES, VIEW, BATCH = 1, 32, 64, 8
MIL_EPOCHS, FOLDS, WORKERS = 2, 2, 1
"""
FIGURES = {
    "slides-figure", "tiles-figure", "views", "curves", "attention-start", "attention-trained",
    "attention-slide", "features-planes", "heatmap",
}  # fmt: skip
TABLES = {"slides", "tiles", "features-table", "heatmap-table"}


def find_sizes(notebook: NotebookNode) -> int:
    """Place of the one cell that holds the sizes."""
    cells = enumerate(notebook.cells)
    (place,) = (n for n, cell in cells if "parameters" in cell.metadata.get("tags", []))
    return place


def test_it_is_kept_without_outputs_and_names_files_that_are_there() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or not (cell.outputs or cell.execution_count), (
            f"cell {cell.id}: clear all outputs before you save the notebook"
        )
        for name in NAMED.findall(cell.source):
            assert (ROOT / name).exists(), f"cell {cell.id} names {name}, which is not there"
    # a size that the test sets and no cell reads would leave the notebook at its own size
    sizes = notebook.cells[find_sizes(notebook)].source
    changed = {name.strip() for line in SMALL.split("\n") for name in line.split("=")[0].split(",")}
    assert changed - {""} <= {line.split(" = ")[0] for line in sizes.splitlines()}


@pytest.mark.process
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    small = nbformat.v4.new_code_cell(f"FOLDER = Path({str(tmp_path)!r})\n{SMALL}")
    notebook.cells.insert(find_sizes(notebook) + 1, small)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, kernel_name="python3", timeout=600, resources=place).execute()
    shown = {
        cell.id: {kind for output in cell.outputs for kind in output.get("data", {})}
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    for kind, cells in (("image/", FIGURES), ("text/html", TABLES)):
        for cell in cells:
            assert any(found.startswith(kind) for found in shown[cell]), f"{cell} shows no {kind}"
    assert len(list((tmp_path / "heatmaps" / "scores").glob("*.csv"))) == 6  # half of SLIDES
