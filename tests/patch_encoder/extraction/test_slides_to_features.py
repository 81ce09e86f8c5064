"""Slides to features in one command: tiles of the encoder's own size, mixed formats without labels,
resuming, shards, and the same results as the two stages.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patch_encoder import extract_features, read_bag, slides_to_features, tile_slides
from patch_encoder.models.encoders import Encoder, build_encoder
from patch_encoder.slides_to_features import Config, choose_tiles
from patch_encoder.tiles.coordinates import read_coordinates
from tests.helpers import draw_slide, write_pyramid
from tests.patch_encoder.extraction.conftest import TISSUE
from wsi_common.cli import run

SETTINGS = ["device=cpu", "precision=fp32", "workers=0", "encoder=mean_colour", "mpp=0.5", *TISSUE]
TILES = "tiles/64px_0.5um"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A pyramid, a picture and a folder of tiles in one tree, without any table."""
    slides = tmp_path / "slides"
    write_pyramid(slides / "deep" / "A.tiff", draw_slide(512))
    Image.fromarray(draw_slide(320, seed=1)).save(slides / "B.png")
    (slides / "C").mkdir()
    for row in range(2):
        for col in range(2):
            Image.fromarray(draw_slide(128, seed=row)).save(slides / "C" / f"{row}_{col}.png")
    return tmp_path


def start(root: Path, *extra: str, output: str = "features") -> int:
    keys = [f"slides={root}/slides", f"output={root}/{output}", "pictures=true", "tile_size=64"]
    return run(slides_to_features.main, Config, [*keys, *SETTINGS, *extra])


def bags(root: Path, output: str = "features") -> dict[str, np.ndarray]:
    folder = root / output / "mean_colour" / "h5_files"
    return {path.stem: read_bag(path).read().numpy() for path in sorted(folder.glob("*.h5"))}


def test_mixed_formats_become_bags_without_labels_and_again_does_nothing(
    mixed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert start(mixed) == 0
    found = bags(mixed)
    assert list(found) == ["A", "B", "C"] and all(len(rows) > 1 for rows in found.values())
    assert (mixed / "features" / TILES / "overlays" / "B.jpg").is_file()
    folder = mixed / "features" / "mean_colour" / "h5_files"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "B.h5").unlink()
    with caplog.at_level(logging.INFO):
        assert start(mixed) == 0
    assert "3 slides, 3 already tiled" in caplog.text and "3 slides, 2 already done" in caplog.text
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"B.h5"}
    assert all(np.array_equal(found[name], rows) for name, rows in bags(mixed).items())


def test_the_two_stages_find_their_work_done(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert start(mixed) == 0
    slides, out = f"slides={mixed}/slides", mixed / "features"
    tiling = [slides, f"output={out}/{TILES}", "pictures=true", "tile_size=64", "mpp=0.5"]
    extraction = [slides, f"coords={out}/{TILES}", f"output={out}", *SETTINGS[:4]]
    with caplog.at_level(logging.INFO):
        assert run(tile_slides.main, tile_slides.Config, [*tiling, *TISSUE]) == 0
        assert run(extract_features.main, extract_features.Config, extraction) == 0
    assert "3 slides, 3 already tiled" in caplog.text and "3 slides, 3 already done" in caplog.text


def test_shards_together_are_the_whole(mixed: Path) -> None:
    assert start(mixed) == 0
    for index in (1, 2, 3, 4):  # one more than there are slides
        assert start(mixed, f"shard={index}/4", output="parts") == 0
        assert len(bags(mixed, "parts")) == min(index, 3)
    whole, parts = bags(mixed), bags(mixed, "parts")
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    table = (mixed / "parts" / TILES / "tiling.csv").read_text()
    assert table == (mixed / "features" / TILES / "tiling.csv").read_text()


def test_a_bad_slide_is_listed_once_by_the_part_that_has_it(mixed: Path) -> None:
    (mixed / "slides" / "bad.svs").write_bytes(b"nothing")
    (mixed / "slides" / "more").mkdir()
    write_pyramid(mixed / "slides" / "more" / "A.tiff", draw_slide(256))  # a second A
    status = [start(mixed, f"shard={index}/2") for index in (1, 2)]
    assert max(status) == 1
    listed = [path.read_text() for path in (mixed / "features" / TILES).glob("failures.*.csv")]
    text = "".join(listed)
    assert text.count("bad,tile_slides") == 1 and text.count("A,tile_slides") == 1
    assert list(bags(mixed)) == ["B", "C"]
    # the second stage says why it has nothing to encode, not that a file cannot be opened
    kept = [path.read_text() for path in (mixed / "features" / "mean_colour").glob("fail*.csv")]
    assert "it was not tiled: slide" in "".join(kept) and "HDF5" not in "".join(kept)


def test_slides_without_tiles_say_so(mixed: Path) -> None:
    assert start(mixed) == 0
    tiles = mixed / "features" / TILES / "coords"
    (tiles / "A.h5").unlink()
    keys = [f"slides={mixed}/slides", f"coords={tiles}", f"output={mixed}/more", *SETTINGS[:4]]
    assert run(extract_features.main, extract_features.Config, keys) == 1
    listed = (mixed / "more" / "mean_colour" / "failures.csv").read_text()
    assert f"expected its tiles {tiles}/A.h5, found none; tile it first" in listed


@pytest.mark.parametrize(
    ("encoder", "tile_size", "mpp"),
    [
        ("virchow2", 224, 0.5),
        ("ctranspath", 256, 1.0),
        ("conch_v1_5", 512, 0.5),
        ("resnet50", 256, 0.5),  # ImageNet: the defaults
    ],
)
def test_tiles_are_those_that_the_encoder_was_trained_on(
    encoder: str, tile_size: int, mpp: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patch_encoder.models.encoder_names import find_row

    row = find_row(encoder)
    model = build_encoder("mean_colour")
    known = Encoder(encoder, row.width, model.transform, model.model, {}, row.mpp, row.tile)
    config = Config()
    choose_tiles(config, known)
    assert (config.tile_size, config.target_mpp) == (tile_size, mpp)
    assert (known.tile_size, known.target_mpp) == (tile_size, mpp), "as Python has it"
    config = Config(tile_size=384, target_mpp=2.0)
    choose_tiles(config, known)
    assert (config.tile_size, config.target_mpp) == (384, 2.0), "what the user gave wins"


def test_encoders_of_one_tile_size_share_tiles_and_others_do_not(mixed: Path) -> None:
    assert start(mixed) == 0 and start(mixed, "encoder=colour_statistics") == 0
    assert start(mixed, "encoder=colour_statistics", "target_mpp=1") == 2, "stale bags are named"
    assert sorted(path.name for path in (mixed / "features" / "tiles").iterdir()) == [
        "64px_0.5um",
        "64px_1um",
    ]
    found = read_coordinates(mixed / "features" / "tiles" / "64px_1um" / "coords" / "A.h5")
    assert found.geometry.patch_size_level0 == 128
