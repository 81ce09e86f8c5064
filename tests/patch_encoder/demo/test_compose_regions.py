"""Slides composed from pictures of known kinds: every picture once, look-alikes in one slide, its
kind where it lies, a stain per slide.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from patch_encoder.demo.compose_regions import Config, main
from patch_encoder.tiles.coordinates import read_coordinates
from wsi_common.errors import UserError

SIDE = 32
KINDS = {"Normal_100x": (40, 55), "OSCC_100x": (120, 60), "OSCC_400x": (200, 60)}  # grey, number


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for kind, (grey, count) in KINDS.items():
        (folder / kind[:4]).mkdir(exist_ok=True)
        for number in range(count):
            picture = np.full((SIDE, SIDE, 3), grey, np.uint8)
            picture[0, 0] = number
            Image.fromarray(picture).save(folder / kind[:4] / f"{kind}_{number}.png")
    return folder


def compose(pictures: Path, output: Path, **keys: object) -> Path:
    settings = {"cohort_slides": 8, "rows_of_regions": 2, "columns_of_regions": 3}
    settings |= {"picture_side": SIDE, "tile": 16} | keys
    assert main(Config(output=str(output), fields=str(pictures), **settings)) == 0
    return output


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_zones_are_where_the_pictures_are(pictures: Path, tmp_path: Path) -> None:
    folder = compose(pictures, tmp_path)
    seen: Counter[tuple[str, int]] = Counter()
    slides_of_run: dict[tuple[str, int], set[str]] = {}
    positives: dict[str, list[int]] = {"negative": [], "positive": []}
    zones = read_table(folder / "zones.csv")
    for row in read_table(folder / "labels.csv"):
        slide = tifffile.imread(folder / "slides" / f"{row['slide_id']}.tiff")
        own = [zone for zone in zones if zone["slide_id"] == row["slide_id"]]
        assert slide.shape == (2 * SIDE, 3 * SIDE, 3) and len(own) == 6
        for zone in own:
            x, y = int(zone["x"]), int(zone["y"])
            assert slide[y + 5, x + 5, 0] == KINDS[zone["label"]][0]
            number = int(slide[y, x, 0])
            seen[zone["label"], number] += 1
            run = zone["label"], number // 10
            slides_of_run.setdefault(run, set()).add(row["slide_id"])
        positives[row["label"]].append(sum(zone["label"].startswith("OSCC") for zone in own))
        coords = read_coordinates(folder / "coords" / f"{row['slide_id']}.h5").coords
        assert sorted(map(tuple, coords)) == [
            (x, y) for x in range(0, 96, 16) for y in range(0, 64, 16)
        ]
    assert max(seen.values()) == 1, "no picture is used twice"
    assert {len(slides) for slides in slides_of_run.values()} == {1}, "look-alikes stay together"
    assert np.mean(positives["positive"]) > np.mean(positives["negative"])


def test_a_nuisance_changes_the_stain_of_each_slide_alone(pictures: Path, tmp_path: Path) -> None:
    plain, stained = (
        compose(pictures, tmp_path / "0"),
        compose(pictures, tmp_path / "1", nuisance=1),
    )
    assert (plain / "zones.csv").read_bytes() == (stained / "zones.csv").read_bytes()
    factors = []
    for name in ("P0001", "P0002"):
        first, second = (tifffile.imread(f / "slides" / f"{name}.tiff") for f in (plain, stained))
        # equal pixels stay equal: one table per slide and channel
        pairs = {
            (int(a), int(b)) for a, b in zip(first[..., 0].flat, second[..., 0].flat, strict=True)
        }
        assert len(pairs) == len(np.unique(first[..., 0]))
        factors.append(float(second.mean() / first.mean()))
    assert abs(factors[0] - factors[1]) > 0.01


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cohort_slides": 60}, "expected 120 runs of 3 pictures for 60 slides"),
        ({"positive_kinds": "LSIL"}, "found 0 of the kinds 'LSIL"),
        ({"tile": 24}, "divisor of picture_side=32"),
    ],
)
def test_what_cannot_be_composed_is_refused(
    pictures: Path, tmp_path: Path, keys: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compose(pictures, tmp_path / "no", **keys)
    assert not (tmp_path / "no").exists()
