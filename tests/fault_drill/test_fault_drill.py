"""A few cases of the drill, and that it notices what goes otherwise than expected."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.fault_drill.cases import CASES
from tests.helpers import ROOT

FEW = (
    "slides: cut off$|slides: a name that|bags: cut off, extracted|bags: an external link, trained"
    "|checkpoints: code$|settings: a variable|SIGTERM in extraction|SIGKILL in tiling"
    "|size limit: training|pretraining: a slide that is cut"
)


def test_there_are_many_cases_of_every_kind() -> None:
    names = [case.name for case in CASES]
    assert len(names) >= 60 and len(set(names)) == len(names)
    kinds = {"slides", "coordinates", "bags", "checkpoints", "tables", "settings", "signals"}
    kinds |= {
        "pretraining",
        "regions",
        "hangs",
        "full disk",
        "file size limit",
        "read-only",
        "memory",
    }
    assert {name.partition(":")[0] for name in names} == kinds


def run_drill(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(python), "ENV": "active", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "fault_drill.sh"), *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.process
def test_a_handful_of_cases_end_as_expected(tmp_path: Path, warm_python: Path) -> None:
    table = tmp_path / "table.md"
    done = run_drill(warm_python, f"match={FEW}", f"table={table}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 cases: 10 as expected" in done.stdout
    assert table.read_text().count("| ok |") == 10


def test_the_page_has_every_case() -> None:
    page = (ROOT / "docs" / "develop" / "fault_drill.md").read_text()
    for case in CASES:
        assert f"| {case.name} |" in page, f"run the drill again: {case.name} is not on the page"
