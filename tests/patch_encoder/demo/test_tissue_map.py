"""The tissue map: zones differ as they say, say nothing about the class, are kept beside the slides,
and change nothing where they are off.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from patch_encoder.demo.cytology.cells import ABNORMAL, NORMAL
from patch_encoder.demo.cytology.clutter import inflammation, mucus
from patch_encoder.demo.cytology.sample_plan import plan_slides
from patch_encoder.demo.cytology.tissue_map import (
    CELL,
    ZONES,
    TissueMap,
    draw_tissue_map,
    label_squares,
    read_tissue_map,
    write_tissue_map,
)
from patch_encoder.demo.render_cohort import Config, main
from wsi_common.errors import UserError

SMALL = {"side": 512, "pretrain_slides": 2, "cv_slides": 0, "train_fields": 0, "val_fields": 0}


def test_a_slide_has_3_to_5_zones_that_are_wide() -> None:
    counts, smallest = set(), []
    for seed in range(40):
        zones = draw_tissue_map(np.random.default_rng(seed), 2048).zones
        assert zones.shape == (64, 64)
        shares = np.bincount(zones.ravel(), minlength=len(ZONES)) / zones.size
        counts.add(int((shares > 0).sum()))
        smallest.append(shares[shares > 0].min())
        # low frequency: nearly all neighbouring cells are of one zone
        assert (zones[:, 1:] == zones[:, :-1]).mean() > 0.9
    assert counts == {3, 4, 5} and np.median(smallest) > 0.1


def test_cells_and_clutter_lie_where_the_zones_want_them() -> None:
    names, area = list(ZONES), np.zeros(len(ZONES))
    cells, clumps, strands, abnormal = (np.zeros(len(ZONES)) for _ in range(4))
    for slide in plan_slides(0, 1536, {"cv": 40}, 0.0, zoned=True):
        tissue = slide.tissue()
        assert tissue is not None
        area += np.bincount(tissue.zones.ravel(), minlength=len(ZONES))
        for thing in slide.smear().things:
            if not all(0 <= value < 1536 for value in thing.centre):
                continue
            zone = names.index(next(n for n, z in ZONES.items() if z is tissue.at(thing.centre)))
            cells[zone] += thing.drawing in NORMAL or thing.drawing in ABNORMAL
            clumps[zone] += thing.drawing is inflammation
            strands[zone] += thing.drawing is mucus
            abnormal[zone] += thing.abnormal
    density = dict(zip(names, cells / area, strict=True))
    assert density["dense"] > 2.5 * density["sparse"]
    assert np.argmax(clumps / area) == names.index("inflamed")
    assert np.argmax(strands / area) == names.index("mucus_blood")
    assert np.argmax(abnormal / cells) == names.index("clusters")


def test_zones_say_nothing_about_the_class() -> None:
    shares: dict[str, list[np.ndarray]] = {"positive": [], "negative": []}
    for slide in plan_slides(2, 1024, {"cv": 200}, 0.0, zoned=True):
        tissue = slide.tissue()
        assert tissue is not None
        counts = np.bincount(tissue.zones.ravel(), minlength=len(ZONES))
        shares[slide.label].append(counts / tissue.zones.size)
    first, second = (np.array(rows) for rows in shares.values())
    error = np.sqrt(first.var(0) / len(first) + second.var(0) / len(second))
    assert (np.abs(first.mean(0) - second.mean(0)) < 3.5 * error).all()


def test_squares_take_the_zone_that_covers_most_of_them() -> None:
    zones = np.zeros((8, 8), np.uint8)
    zones[:, 4:] = 3
    zones[6:, :3] = 1
    corners = np.array([[0, 0], [4 * CELL, 0], [3 * CELL, 0], [0, 6 * CELL], [7 * CELL, 7 * CELL]])
    assert label_squares(TissueMap(zones), corners, 2 * CELL).tolist() == [0, 3, 0, 1, 3]
    assert label_squares(TissueMap(zones), np.array([[130, 10]]), 8).tolist() == [3]
    assert label_squares(TissueMap(zones), np.array([[96, 0]]), 4 * CELL).tolist() == [3]


def test_maps_are_kept_beside_the_slides(tmp_path: Path) -> None:
    assert main(Config(output=str(tmp_path), **SMALL, workers=1, tissue_map=True)) == 0
    slides = plan_slides(0, 512, {"pretrain": 2, "cv": 0}, 0.25, zoned=True)
    for slide in slides:
        tissue = slide.tissue()
        assert tissue is not None
        stored = read_tissue_map(tmp_path / "zones" / f"{slide.slide_id}.png")
        assert np.array_equal(stored.zones, tissue.zones)
    with pytest.raises(UserError, match="tissue_map"):
        main(Config(output=str(tmp_path), **SMALL, workers=1))


def test_without_a_map_the_cohort_is_the_one_it_always_was(tmp_path: Path) -> None:
    """The pixels are pinned in test_render_cohort; the stamp decides the slides' comments."""
    assert main(Config(output=str(tmp_path), **SMALL, workers=1)) == 0
    assert not (tmp_path / "zones").exists()
    assert "tissue_map" not in json.loads((tmp_path / "cohort.json").read_text())["settings"]
    plain, zoned = (plan_slides(0, 512, {"cv": 1}, 0.0, zoned)[0].smear() for zoned in (0, 1))
    assert plain.things != zoned.things


@pytest.mark.parametrize("content", [b"no picture", None])
def test_other_pictures_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "S0001.png"
    if content is None:
        write_tissue_map(path, TissueMap(np.full((4, 4), 9, np.uint8)))
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="expected a tissue map"):
        read_tissue_map(path)
