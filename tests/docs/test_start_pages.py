"""The commands of docs/start/ run as they are printed, one page after the other, in an empty
folder.

Blocks marked ```bash run here; what needs the user's own data, a cluster or ten minutes is marked
```console.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers import ROOT

START = ROOT / "docs" / "start"
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# what the pages' commands expect beside them, as in a clone of the repository
BESIDE = ("tools", "configs", "wsi_common", "patch_encoder", "detection_kd", "mil", "studies")


def commands(page: Path) -> str:
    """The page's bash blocks, in order, as one script that stops at the first failure."""
    return "set -euo pipefail\n" + "".join(BLOCK.findall(page.read_text(encoding="utf-8")))


def clone(folder: Path, python: Path) -> Path:
    """A folder that looks like a fresh clone with its environment made, whose interpreter is
    `python`.
    """
    for name in BESIDE:
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(python)
    return folder


@pytest.mark.process
@pytest.mark.parametrize(
    "page",
    [page for page in sorted(START.glob("*.md")) if BLOCK.search(page.read_text(encoding="utf-8"))],
    ids=lambda page: page.stem,
)
def test_commands_run(page: Path, tmp_path: Path, warm_python: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name.isupper()}
    # what a reader's shell does not have; tools/test.sh exports PYTHONPATH and PYTHONSAFEPATH
    ours = ("SLIDES", "LABELS", "FEATURES", "OUTPUT", "ENV", "PYTHON", "PYTHONPATH")
    for name in (*ours, "PYTHONSAFEPATH"):
        environment.pop(name, None)
    done = subprocess.run(
        ["bash", "-c", commands(page)],
        cwd=clone(tmp_path, warm_python),
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    for path in promised(page):
        assert (tmp_path / path).exists(), f"{page.name} promises {path}, which no command made"


def promised(page: Path) -> list[str]:
    """Paths below runs/ that a page with commands says are there, without placeholders."""
    found = re.findall(r"`(runs/[\w./-]+)`", page.read_text(encoding="utf-8"))
    return [path for path in found if not path.startswith("runs/quickstart")]


def test_the_pages_have_commands_to_run() -> None:
    assert "mil_benchmark.sh" in commands(START / "your_slides.md")
    assert promised(START / "your_slides.md")
