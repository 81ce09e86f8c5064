"""What the tests of extraction start from: three small slides with tiles, and the script's
arguments.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from patch_encoder import extract_features, tile_slides
from tests.artefacts import copy_of, make_once
from tests.helpers import make_cohort
from wsi_common.cli import run

# tissue as it is found on slides of 512 px
TISSUE = ["tissue.mpp=2", "tissue.median=4", "tissue.closing=4", "tissue.min_area=50"]


def tile(root: Path, size: int = 64) -> Path:
    """Tile the slides of a cohort into `tiles`, at `size` px; the cohort."""
    keys = [f"slides={root}/slides", f"output={root}/tiles", f"tile_size={size}", "workers=1"]
    assert run(tile_slides.main, tile_slides.Config, [*keys, *TISSUE]) == 0
    return root


@pytest.fixture(scope="session")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides and their tiles, made once per session; read only."""
    return make_once(tmp_path_factory, "tiled", lambda root: tile(make_cohort(root)))


@pytest.fixture
def cohort(tiled: Path, tmp_path: Path) -> Path:
    """A copy of `tiled` to spoil."""
    return copy_of(tiled, tmp_path)


def arguments(root: Path, *extra: str) -> list[str]:
    """What extraction from a cohort is started with; `extra` goes last and wins."""
    places = [f"slides={root}/slides", f"coords={root}/tiles", f"output={root}/features"]
    plain = ["device=cpu", "precision=fp32", "workers=0", "batch_size=7"]
    return [*places, "encoder=mean_colour", *plain, *extra]


def extract(root: Path, *extra: str) -> int:
    """Extraction in this process: its exit status."""
    return run(extract_features.main, extract_features.Config, arguments(root, *extra))
