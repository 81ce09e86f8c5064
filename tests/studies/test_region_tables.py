"""The table of region encoders: measures by hand, paired intervals, and what may be claimed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from patch_encoder.demo.cytology.tissue_map import TissueMap, write_tissue_map
from studies.region_tables.cells import Condition, find_zones
from studies.region_tables.intervals import Estimate, SlideScores, average_slides, resample_row
from studies.region_tables.measures import MEASURES, measure_embeddings
from studies.region_tables.table import ConditionTable, judge
from wsi_common.errors import UserError

SLIDES, REGIONS, ZONES = 6, 12, 3


def cohort(zone: float, slide: float, noise: float = 0.05) -> tuple[torch.Tensor, np.ndarray]:
    """Embeddings that show the zone, the slide, or both; regions of a slide take turns in zone."""
    rng = np.random.default_rng(0)
    zones = np.tile(np.arange(ZONES), SLIDES * REGIONS // ZONES)
    slides = np.repeat(np.arange(SLIDES), REGIONS)
    rows = zone * np.eye(ZONES)[zones], slide * np.eye(SLIDES)[slides]
    noisy = np.concatenate(rows, 1) + noise * rng.standard_normal((len(zones), ZONES + SLIDES))
    return torch.from_numpy(noisy).float(), zones


def measure(embeddings: torch.Tensor, zones: np.ndarray, **keys: object) -> dict[str, np.ndarray]:
    counts = np.full(SLIDES, REGIONS)
    cases = keys.get("cases") or [f"C{number}" for number in range(SLIDES)]
    return measure_embeddings(embeddings, zones, counts, cases, ZONES)  # type: ignore[arg-type]


def test_embeddings_that_show_the_zone_alone_are_best() -> None:
    found = measure(*cohort(zone=1, slide=0))
    assert set(found) == set(MEASURES)
    assert (found["zone_knn"] == 1).all() and (found["purity"] == 1).all()
    assert (found["agreement"] == 1).all() and found["slide_identity"].mean() < 0.4


def test_embeddings_that_show_the_slide_alone_say_nothing_about_zones() -> None:
    found = measure(*cohort(zone=0, slide=1))
    assert (found["slide_identity"] == 1).all()
    assert found["zone_knn"].mean() < 0.5 and found["agreement"].mean() < 0.6


def test_own_regions_never_vote() -> None:
    """Zones that are named another way in each slide are known inside it, but not across slides."""
    embeddings, zones = cohort(zone=1, slide=0)
    slides = np.repeat(np.arange(SLIDES), REGIONS)
    found = measure(embeddings, (zones + slides) % ZONES)
    assert (found["purity"] == 1).all() and found["zone_knn"].mean() < 0.5


def test_slides_of_the_same_patient_neither_vote_nor_are_neighbours() -> None:
    embeddings, _ = cohort(zone=1, slide=0)
    one_zone = np.repeat(
        np.arange(SLIDES) // 2, REGIONS
    )  # pairs of slides have a zone of their own
    pairs = [f"C{number // 2}" for number in range(SLIDES)]
    assert (measure(embeddings, one_zone, cases=pairs)["zone_knn"] == 0).all()
    assert (measure(embeddings, one_zone, cases=pairs)["agreement"] == 0).all()


def test_slides_with_too_few_regions_are_not_clustered() -> None:
    embeddings, zones = cohort(zone=1, slide=0)
    counts = np.array([REGIONS] * (SLIDES - 1) + [REGIONS - 2, 2])
    cases = [f"C{number}" for number in range(SLIDES + 1)]
    found = measure_embeddings(embeddings, zones, counts, cases, ZONES)
    assert np.isnan(found["purity"][-1]) and np.isnan(found["agreement"][-1])
    assert np.isfinite(found["purity"][:-1]).all() and np.isfinite(found["zone_knn"]).all()


def scores(values: np.ndarray) -> list[SlideScores]:
    cases = np.array([f"C{number}" for number in range(len(values))])
    return [SlideScores(cases, {"zone_knn": values})]


def test_differences_are_paired_by_slide() -> None:
    """Rows that differ by the same amount in every slide differ surely, however slides vary."""
    rng = np.random.default_rng(1)
    base = rng.random(40) * 0.8
    rows = {
        name: resample_row({seed: scores(base + shift + 0.001 * seed) for seed in (1, 2)},
                           average_slides, 500, 7)["zone_knn"]
        for name, shift in (("low", 0.0), ("high", 0.05))
    }  # fmt: skip
    assert rows["low"].value == pytest.approx(base.mean() + 0.0015)
    ci = rows["low"].describe()
    assert ci["high"] - ci["low"] > 0.1
    found = rows["high"].subtract(rows["low"])
    assert found["value"] == pytest.approx(0.05) and found["above"] == "2/2"
    jitter = base + 0.05 + 0.02 * rng.standard_normal(40)
    noisy = resample_row({1: scores(jitter)}, average_slides, 500, 7)["zone_knn"]
    found = noisy.subtract(rows["low"])
    assert 0 < found["low"] < found["value"] < found["high"] < 0.08 and found["above"] == "1/1"


def test_slides_without_a_value_are_left_out() -> None:
    values = np.array([1.0, 0.0, np.nan, 1.0])
    weights = np.array([[1.0, 1.0, 5.0, 1.0], [1.0, 3.0, 1.0, 0.0]])
    assert average_slides(scores(values)[0])["zone_knn"] == pytest.approx([2 / 3])
    assert average_slides(scores(values)[0], weights)["zone_knn"] == pytest.approx([2 / 3, 1 / 4])


def table(standardise: str, **shifts: float) -> ConditionTable:
    """Rows whose zone kNN differs from 0.5 by a shift, with little noise."""
    rng = np.random.default_rng(3)
    base = 0.5 + 0.1 * rng.standard_normal(200)
    rows = {
        name: resample_row(
            {1: scores(base + shift + 0.01 * rng.standard_normal(200))}, average_slides, 300, 7
        )
        for name, shift in shifts.items()
    }
    condition = Condition("nu1", Path(), Path(), standardise, True, {})
    return ConditionTable(condition, rows)


def test_claims_follow_the_intervals() -> None:
    raw = judge([table("none", tile_mean=0.1, dino=0.0, both=0.0)])
    assert sum(line.startswith("shown:") for line in raw) == 2
    assert any(line.startswith("holds, not below") for line in raw)
    good = judge([table("slide", tile_mean=0.0, dino=0.05, both=0.1)])
    assert sum(line.startswith("holds:") for line in good) == 2
    assert any(line.startswith("gain:") for line in good)
    bad = judge([table("slide", tile_mean=0.0, dino=0.05, both=-0.1)])
    assert sum(line.startswith("FAILS") for line in bad) == 2
    raw = table("none", tile_mean=0.1, dino=0.0)
    for shift, verdict in ((0.2, "remedy: nu1, dino"), (0.0, "no remedy: nu1, dino")):
        lines = judge([raw, table("slide", tile_mean=0.1, random=0.0, dino=shift)])
        assert sum(line.startswith(verdict) for line in lines) == 1


def test_a_row_without_training_is_compared_with_every_seed() -> None:
    mean = Estimate({-1: 0.5}, np.full(10, 0.5))
    trained = Estimate({1: 0.6, 2: 0.4, 3: 0.7}, np.full(10, 0.57))
    assert trained.subtract(mean)["above"] == "2/3"
    assert mean.subtract(trained)["above"] == "1/3"
    other = Estimate({2: 0.3, 3: 0.8}, np.full(10, 0.55))
    assert trained.subtract(other)["above"] == "1/2"


def test_zones_come_from_the_table_or_from_tissue_maps(tmp_path: Path) -> None:
    corners = np.array([[0, 0], [128, 0]])
    store = SimpleNamespace(
        slides=["S1", "S2"],
        regions=SimpleNamespace(region_sizes=[128, 128], describe="region {}".format),
        corners=lambda number: corners,
    )
    for slide, (left, right) in {"S1": (1, 4), "S2": (4, 4)}.items():
        zones = np.repeat(np.repeat([[left, right]], 4, axis=1), 8, axis=0).astype(np.uint8)
        write_tissue_map(tmp_path / "zones" / f"{slide}.png", TissueMap(zones))
    assert find_zones(store, tmp_path).tolist() == [1, 4, 4, 4]  # type: ignore[arg-type]
    rows = ["S1,0,0,b", "S1,128,0,a", "S2,0,0,a", "S2,128,0,b"]
    (tmp_path / "zones.csv").write_text("\n".join(["slide_id,x,y,label", *rows]) + "\n")
    assert find_zones(store, tmp_path).tolist() == [1, 0, 0, 1]  # type: ignore[arg-type]
    for table, said in ((rows[:3], "found none for 1, first region 3"), (["S1,0,1.5,b"], "line 2")):
        (tmp_path / "zones.csv").write_text("\n".join(["slide_id,x,y,label", *table]) + "\n")
        with pytest.raises(UserError, match=said):
            find_zones(store, tmp_path)  # type: ignore[arg-type]
