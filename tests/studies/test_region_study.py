"""The study of region encoders from end to end on a few tiny simulated slides, one row that fails,
a second start, and a cohort of bags instead of a simulated one.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from patch_encoder.demo.region_simulation import RegionSimulation, write_simulated_cohort
from studies.region_study import Config, main
from tests.helpers import ROOT
from wsi_common.cli import run

pytestmark = pytest.mark.process

NETWORK = "network.width=8,network.depth=1,network.heads=2,network.out_dim=16,network.hidden_dim=16"
TRAINING = "network.bottleneck_dim=4,views.local_number=1,training.warmup=0,epochs=2,batch_size=32"
PROTOTYPES = "prototypes.start_epoch=1,prototypes.min_regions=4,prototypes.clusters=2"
SMALL = [
    "seeds=[1,2]",
    "region_tiles=4",
    "clusters=2",
    f"pretrain=[{NETWORK},{TRAINING},{PROTOTYPES},precision=fp32,device=cpu]",
    "mil=['models=[mean]','seeds=[1]',folds=2,val_fraction=0.2,training.epochs=2,training.min_epochs=1,"
    "device=cpu,workers=1]",
    "resamples=60",
]
SIZES = {"slides": 14, "rows": 2, "columns": 3, "width": 6}
ROWS = "trained={dino: {losses.intra: 0, losses.inter: 0}, both: {}}"


def study(output: Path, *arguments: str) -> int:
    mil = f"mil_config={ROOT / 'configs' / 'quickstart' / 'mil.yaml'}"
    return run(main, Config, [mil, f"output={output}", *SMALL, *arguments])


def read_table(output: Path) -> dict[tuple[str, ...], dict[str, str]]:
    with (output / "region_study.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {tuple(row[n] for n in ("cohort", "standardise", "row", "measure")): row for row in rows}


def test_a_table_of_all_rows_and_a_second_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "simulation={" + ", ".join(f"{name}: {value}" for name, value in SIZES.items()) + "}"
    wanted = [sizes, "nuisances=[0, 0.5]", "standardised=[0.5]"]
    broken = "trained={dino: {losses.intra: 0, losses.inter: 0}, both: {prototypes.clusters: 5}}"
    assert study(tmp_path, *wanted, broken) == 1
    assert "both_s1" in (tmp_path / "failures.csv").read_text()
    assert ("nu0", "none", "dino", "zone_knn") in read_table(tmp_path)
    run_of_dino = tmp_path / "runs" / "nu0_raw" / "dino_s1" / "checkpoint_last.pt"
    before = run_of_dino.stat().st_mtime_ns
    assert study(tmp_path, *wanted, ROWS) == 0
    assert run_of_dino.stat().st_mtime_ns == before and not (tmp_path / "failures.csv").exists()
    table = read_table(tmp_path)
    measures = {"zone_knn", "slide_identity", "purity", "agreement", "auc_mean"}
    rows = {"tile_mean", "random", "dino", "both"}
    trained = (("nu0", "none"), ("nu0.5", "none"), ("nu0.5", "slide"))
    expected = {(*c, row, m) for c in trained for row in rows for m in measures}
    assert set(table) == expected | {("nu0", "slide", "tile_mean", m) for m in measures}
    both = table["nu0.5", "slide", "both", "zone_knn"]
    assert both["seeds"] == "2" and both["minus_dino_value"] and both["minus_tile_mean_value"]
    assert table["nu0", "none", "tile_mean", "zone_knn"]["seeds"] == "1"
    # standardised, the nuisance is gone up to rounding
    values = [float(table[c, "slide", "tile_mean", "zone_knn"]["value"]) for c in ("nu0", "nu0.5")]
    assert values[0] == pytest.approx(values[1], abs=0.03)
    text = (tmp_path / "region_study.md").read_text()
    assert "## Bars" in text and "| both |" in text
    assert study(tmp_path, *wanted, ROWS, "clusters=3") == 2
    assert "holds a cell of other settings: clusters 2 -> 3" in capsys.readouterr().err


def test_a_cohort_of_bags_with_a_baseline(tmp_path: Path) -> None:
    cohort = tmp_path / "cohort"
    write_simulated_cohort(cohort, RegionSimulation(region_tiles=4, **SIZES))
    bags = cohort / "features" / "h5_files"
    for name in ("main", "colour"):
        (cohort / "features" / name).mkdir()
        (cohort / "features" / name / "h5_files").symlink_to(bags)
    given = [f"cohort={cohort}", "tile_encoder=main", "baselines=[colour]", ROWS, "seeds=[1]"]
    assert study(tmp_path / "out", *given) == 0
    table = read_table(tmp_path / "out")
    for scale in ("none", "slide"):
        first, second = (
            table["cohort", scale, row, "zone_knn"]["value"] for row in ("tile_mean", "colour")
        )
        assert first == second, "the same bags"


def test_a_table_needs_its_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study(tmp_path, "trained={both: {}}") == 2
    assert "expected a row 'dino'" in capsys.readouterr().err
