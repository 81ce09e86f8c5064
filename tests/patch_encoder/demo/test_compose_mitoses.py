"""Fields composed of crops of mitotic figures: tiles where the annotation says, slides apart, and
crops beyond a slide's border left out.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import tifffile

from patch_encoder.demo.compose_mitoses import Config, main, plan_fields
from patch_encoder.demo.histology.figure_crops import TILE, read_slide_tiles
from tests.patch_encoder.demo.drawn_crops import DARK, FIGURE, write_crops
from wsi_common.errors import UserError


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 slides of 8 crops."""
    return write_crops(tmp_path_factory.mktemp("crops"))


def compose(crops: Path, output: Path, **keys: object) -> Path:
    settings = {"field_counts": [40, 12, 16], "positive_fields": [12, 4, 6]}
    settings |= {"look_alike_fields": [6, 2, 2], "wrong_share": 0.5} | keys
    assert main(Config(output=str(output), crops=str(crops), **settings)) == 0
    return output


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_annotations_name_the_tiles_that_hold_figures(crops: Path, tmp_path: Path) -> None:
    folder = compose(crops, tmp_path)
    rows = {row["file"]: row for row in read_rows(folder / "cases.csv")}
    assert len(rows) == 68 and {row["mpp"] for row in rows.values()} == {"0.5"}
    document = json.loads((folder / "MIDOG.json").read_text())
    points = defaultdict(lambda: defaultdict(list))
    for a in document["annotations"]:
        centre = a["bbox"][0] + 25, a["bbox"][1] + 25
        points[a["image_id"]][a["category_id"]].append(centre)
    figures: dict[tuple[int, int], str] = {}
    slides_of: dict[str, set[int]] = defaultdict(set)
    for image in document["images"]:
        row, own = rows[image["file_name"]], points[image["id"]]
        pixels = tifffile.imread(folder / "images" / image["file_name"])
        assert pixels.shape == (84, 84, 3)
        assert len(np.unique(pixels[..., 1])) == 1, "one slide each"
        tiles = pixels.reshape(4, TILE, 4, TILE, 3)[:, 10, :, 10]  # the middle of each tile
        found = {(x * TILE + 11, y * TILE + 11) for y, x in np.argwhere(tiles[..., 0] == FIGURE)}
        assert found == set(own[1]) and len(own[1]) <= 2
        assert not (own[1] and own[2]) and len(own[2]) <= 1
        for x, y in own[2]:
            assert pixels[y, x, 0] in (DARK, 200) and int(row["case"]) % 12 == 1
        slide = (int(row["case"]) - 1) // 12
        assert pixels[0, 0, 1] == 20 + slide * 10
        slides_of[row["split"]].add(slide)
        for x, y in own[1]:
            name = slide, int(pixels[y, x, 2])
            assert figures.setdefault(name, row["file"]) == row["file"], "a figure is used once"
            assert pixels[y, x, 2] != 90, "its crop has a black border"
    assert sum(map(len, slides_of.values())) == len(set.union(*slides_of.values()))
    wrong = [r for r in read_rows(folder / "noise.csv") if r["annotations"] == "MIDOG_noisy.json"]
    assert sum(row["truth"] == "0" for row in wrong) == 12
    positive = {row["file"] for row in wrong if row["truth"] == "1"}
    assert not positive & {row["file"] for row in wrong if row["truth"] == "0"}


def test_tiles_with_another_figure_or_a_border_are_left_out(crops: Path) -> None:
    slides, left_out = read_slide_tiles(crops)
    assert left_out == 12 and [s.slide for s in slides][:3] == ["001", "013", "025"]
    sizes = [(len(s.figures), len(s.plain)) for s in slides]
    # crop 0 stands twice in slide 001; of both, and of crop 1, the corner near the other is gone
    assert sizes[1] == (7, 28) and sizes[0][0] == 8 and sizes[0][1] < 32
    assert all(s.dark[0, 0, 0, 0] == DARK for s in slides[1:])
    assert all((s.plain[..., 0] > FIGURE).all() for s in slides)


def test_the_plan_is_a_function_of_the_seed(crops: Path, tmp_path: Path) -> None:
    slides, _ = read_slide_tiles(crops)
    keys = {"field_counts": [9, 3, 3], "positive_fields": [3, 1, 1]}
    keys["look_alike_fields"] = [1, 1, 1]

    def plan(seed: int) -> list[np.ndarray]:
        config = Config(output="-", crops=str(crops), seed=seed, **keys)
        return [field.tiles for field in plan_fields(config, slides)]

    np.testing.assert_array_equal(plan(0), plan(0))
    assert not np.array_equal(plan(0), plan(1))


def test_a_second_run_keeps_what_is_there(crops: Path, tmp_path: Path) -> None:
    folder = compose(crops, tmp_path)
    first, second = sorted((folder / "images").iterdir())[:2]
    before, content = first.stat().st_mtime_ns, second.read_bytes()
    second.write_bytes(content[:-100])
    compose(crops, tmp_path)
    assert first.stat().st_mtime_ns == before and second.read_bytes() == content
    with pytest.raises(UserError, match="wrong_share.*overwrite=true"):
        compose(crops, tmp_path, wrong_share=0.4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"positive_fields": [90, 4, 6], "field_counts": [99, 12, 16]},
            "expected at most .* train",
        ),
        ({"positive_fields": [39, 4, 6]}, "expected at least 45 for train, found 40"),
        ({"split_shares": [0.5, 0.5, 0.5]}, "expected a sum of 1"),
        ({"field_counts": [40, 12]}, "expected three numbers"),
    ],
)
def test_what_cannot_be_composed_is_refused(
    crops: Path, tmp_path: Path, keys: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compose(crops, tmp_path / "no", **keys)
    assert not (tmp_path / "no").exists()


def test_the_real_crops(real_data: Path) -> None:
    slides, left_out = read_slide_tiles(real_data / "amibr_midog21")
    assert (len(slides), left_out) == (135, 60)
    assert sum(len(s.figures) for s in slides) == 1661
