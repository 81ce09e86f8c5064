"""The ablation script from end to end on a handful of tiny slides: two variants, one that fails,
and a second start.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from patch_encoder import extract_features, tile_slides
from tests.detection_kd.d2vfm_runs import write_backbone
from tests.helpers import ROOT, make_cohort
from wsi_common.cli import run

pytestmark = pytest.mark.process

GRID = "factors={adapter: [p], K: [{rank.top_k: 0}]}"  # no tiles: refused by the ranking
SMALL = [
    "rank=[subset=,training.epochs=2,training.min_epochs=1]",
    "d2vfm=[epochs=1,cached_turns=1,device=cpu]",
]
SMALL += [
    "measure=[tiles_per_round=8,rounds=1,workers=0,device=cpu]",
    "extract=[workers=0,device=cpu]",
]
SMALL += [
    "mil=['models=[mean,max]',headline=max,subset=,folds=2,training.epochs=2,training.min_epochs=1,device=cpu,workers=1]"
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Twelve slides, their tiles and features, and a random trunk, where a quickstart leaves
    them.
    """
    root = make_cohort(tmp_path / "base" / "cohort", 12).parent
    places = [f"slides={root}/cohort/slides", f"labels={root}/cohort/labels.csv"]
    tiling = [*places, f"output={root}/tiles", "tile_size=128", "min_tissue=0.0", "workers=1"]
    assert run(tile_slides.main, tile_slides.Config, tiling) == 0
    for encoder in ("stain_texture", "mean_colour"):
        wanted = [
            *places,
            f"coords={root}/tiles",
            f"output={root}/features",
            f"encoder={encoder}",
            "workers=0",
            "device=cpu",
        ]
        assert run(extract_features.main, extract_features.Config, wanted) == 0
    (root / "detector").mkdir()
    write_backbone(root / "detector" / "backbone.pt")
    return root


def ablation(base: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "ENV": "active",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "BASE": str(base),
    }
    command = ["bash", str(ROOT / "tools" / "ablation.sh"), GRID, *SMALL]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=base, check=False
    )


@pytest.mark.slow
def test_two_variants_from_slides_to_the_table(base: Path) -> None:
    done = ablation(base)
    assert done.returncode == 1, done.stderr[-2000:]
    study = base / "ablation"
    assert "rank.top_k-0,rank_patches," in (study / "failures.csv").read_text()
    with (study / "ablation.csv").open(newline="") as stream:
        table = {row["variant"]: row for row in csv.DictReader(stream)}
    assert list(table) == ["default", "adapter-p", "rank.top_k-0", "stain_texture", "mean_colour"]
    assert "top_k=0" in table["rank.top_k-0"]["error"]
    for name in ("default", "adapter-p"):
        row = {
            key: float(table[name][key])
            for key in ("auc_max_mean", "tiles_per_second", "gflops", "cosine", "seconds")
        }
        assert (
            0 <= row["auc_max_mean"] <= 1
            and row["tiles_per_second"] > 0
            and row["gflops"] > 0
            and -1 <= row["cosine"] <= 1
        )
    assert table["default"]["tiles_per_second"] == table["adapter-p"]["tiles_per_second"]
    assert float(table["default"]["parameters"]) > float(table["adapter-p"]["parameters"])
    assert all(
        (study / f"ablation.{suffix}").stat().st_size > 500 for suffix in ("png", "html", "json")
    )
    files = [*study.rglob("students/**/*.pt"), *study.rglob("*.h5"), *study.rglob("runs/**/*.pt")]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert before and ablation(base).returncode == 1
    assert {path: path.stat().st_mtime_ns for path in files} == before, (
        "a second start trains and encodes nothing"
    )
