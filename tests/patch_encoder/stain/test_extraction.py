"""Stain normalisation as an option of extraction: what is encoded, who measures, what a bag says,
what is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection_kd import extract_student
from patch_encoder import extract_features, tile_slides
from patch_encoder.bags.bag import open_bag, read_bag
from patch_encoder.bags.paths import list_bags
from patch_encoder.descriptors.mean_colour import mean_colour
from patch_encoder.slides import RegionError, open_slide
from patch_encoder.stain.macenko import fit_macenko, make_common_profile, normalise_macenko
from patch_encoder.stain.normaliser import build_normaliser, convert_to_tensor
from patch_encoder.stain.reinhard import ColourStatistics, fit_reinhard
from patch_encoder.stain.slide_stains import SAMPLE, SlideStains, sample_tiles
from patch_encoder.tiles.coordinates import Coordinates, TileGeometry
from tests.helpers import write_pyramid
from tests.patch_encoder.stain.stain_fixture import RUIFROK_HE, draw_tile
from wsi_common.cli import run
from wsi_common.config import load_config
from wsi_common.errors import UserError

TILE = 32


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Two slides of 128 px in different stains, 16 tiles each, a quarter of each clear."""
    for index, (matrix, strength) in enumerate(
        ((((0.6, 0.2), (0.7, 0.85), (0.38, 0.5)), (1.1, 0.6)), (RUIFROK_HE, (1.8, 1.1)))
    ):
        tile = draw_tile(matrix, strength, glass=0.25, seed=index)
        write_pyramid(
            tmp_path / "slides" / f"S{index}.tiff", tile.permute(1, 2, 0).numpy(), levels=(1,)
        )
    keys = [f"tile_size={TILE}", "method=none", "workers=1"]
    arguments = [f"slides={tmp_path}/slides", f"output={tmp_path}/tiles", *keys]
    assert run(tile_slides.main, tile_slides.Config, arguments) == 0
    return tmp_path


def arguments(root: Path, *extra: str) -> list[str]:
    base = [
        f"slides={root}/slides",
        f"coords={root}/tiles",
        f"output={root}/features",
        "device=cpu",
        "precision=fp32",
    ]
    return [*base, "encoder=mean_colour", "workers=0", "batch_size=7", *extra]


def extract(root: Path, *extra: str) -> int:
    return run(extract_features.main, extract_features.Config, arguments(root, *extra))


def bag_path(root: Path, slide: str = "S0") -> Path:
    return root / "features" / "mean_colour" / "h5_files" / f"{slide}.h5"


def tiles_of(root: Path, slide: str) -> tuple[np.ndarray, np.ndarray]:
    bag = read_bag(bag_path(root, slide))
    assert bag.coords is not None
    with open_slide(root / "slides" / f"{slide}.tiff") as opened:
        tiles = [opened.read(x, y, TILE) for x, y in bag.coords.tolist()]
        return bag.read().numpy(), np.stack(tiles)


def test_slide_scope_is_one_fit_over_the_slide(cohort: Path) -> None:
    assert extract(cohort, "stain=macenko") == 0
    for slide in ("S0", "S1"):
        features, tiles = tiles_of(cohort, slide)
        # all 16 tiles are in the sample, whole: the slide's pixels in any order
        source = fit_macenko(convert_to_tensor(tiles.reshape(-1, TILE, 3)))
        new = normalise_macenko(
            torch.stack([convert_to_tensor(tile) for tile in tiles]), source, make_common_profile()
        )
        expected = np.stack([mean_colour(tile.permute(1, 2, 0).numpy()) for tile in new])
        assert np.allclose(features, expected, atol=1e-6)
        assert not np.allclose(features, np.stack([mean_colour(tile) for tile in tiles]), atol=1e-3)


def test_tile_scope_is_a_fit_a_tile(cohort: Path) -> None:
    assert extract(cohort, "stain=reinhard", "stain_scope=tile") == 0
    features, tiles = tiles_of(cohort, "S0")
    option = build_normaliser("reinhard", "", "tile")
    assert option is not None
    assert np.allclose(
        features, np.stack([mean_colour(option.apply(tile)) for tile in tiles]), atol=1e-6
    )


@pytest.mark.parametrize("kind", ["macenko", "reinhard"])
@pytest.mark.parametrize("scope", ["slide", "tile"])
def test_workers_batches_and_shards_give_the_same_bags(cohort: Path, kind: str, scope: str) -> None:
    runs = {"a": ["workers=0"], "b": ["workers=2", "batch_size=5"]}
    if scope == "slide":
        runs["c"] = ["shard=1/2"]
    digests = {}
    for name, keys in runs.items():
        assert (
            extract(
                cohort, f"stain={kind}", f"stain_scope={scope}", f"output={cohort}/{name}", *keys
            )
            == 0
        )
        digests[name] = {
            slide: open_bag(file).digest()
            for slide, file in list_bags(cohort / name / "mean_colour").items()
        }
    assert len(digests["a"]) == 2 and digests["b"] == digests["a"]
    assert digests.get("c", {}).items() <= digests["a"].items()


def test_two_stains_of_one_tissue_come_nearer(cohort: Path) -> None:
    """Mean colours of stained tiles of the two slides, before and after."""
    distances = {}
    for kind in ("none", "macenko", "reinhard"):
        assert extract(cohort, f"stain={kind}", "overwrite=true") == 0
        means = [read_bag(bag_path(cohort, slide)).features.mean(0) for slide in ("S0", "S1")]
        distances[kind] = float((means[0] - means[1]).abs().max())
    assert (
        distances["macenko"] < 0.5 * distances["none"]
        and distances["reinhard"] < 0.5 * distances["none"]
    )


def test_bag_says_its_stain_and_another_is_refused(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract(cohort) == 0
    assert "stain" not in open_bag(bag_path(cohort)).attributes
    before = bag_path(cohort).stat().st_mtime_ns
    assert extract(cohort, "stain=none") == 0
    assert extract(cohort, "stain=macenko") == 2
    assert "stain None -> 'macenko, scope slide, target built-in'" in capsys.readouterr().err
    assert bag_path(cohort).stat().st_mtime_ns == before
    assert extract(cohort, "stain=macenko", "overwrite=true") == 0
    assert open_bag(bag_path(cohort)).attributes["stain"] == "macenko, scope slide, target built-in"
    after = bag_path(cohort).stat().st_mtime_ns
    assert extract(cohort, "stain=macenko") == 0
    assert bag_path(cohort).stat().st_mtime_ns == after
    picture = cohort / "target.png"
    Image.fromarray(draw_tile(seed=9).permute(1, 2, 0).numpy()).save(picture)
    for keys in (
        [],
        ["stain=reinhard"],
        ["stain=macenko", "stain_scope=tile"],
        ["stain=macenko", f"stain_target={picture}"],
    ):
        assert extract(cohort, *keys) == 2
        assert "another provenance: stain 'macenko, scope slide" in capsys.readouterr().err
    assert extract(cohort, "stain=macenko", f"stain_target={picture}", "overwrite=true") == 0
    assert "target sha256 " in str(open_bag(bag_path(cohort)).attributes["stain"])


def save(path: Path, pixels: np.ndarray, mode: str = "RGB") -> Path:
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_a_bad_target_is_one_line_before_any_work(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = cohort / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    eosin = draw_tile(strength=(0.0, 1.0)).permute(1, 2, 0).numpy()
    cases = {
        "broken": ("macenko", broken, "expected a picture"),
        "blank": (
            "macenko",
            save(cohort / "blank.png", np.full((64, 64, 3), 244, np.uint8)),
            "haematoxylin and eosin",
        ),
        "pale": (
            "reinhard",
            save(cohort / "pale.png", np.full((64, 64, 3), 244, np.uint8)),
            "found none",
        ),
        "eosin": (
            "macenko",
            save(cohort / "eosin.png", eosin),
            "found none; take a field of dense tissue",
        ),
        "grey": ("macenko", save(cohort / "grey.png", eosin, "L"), "found mode L"),
        "folder": ("macenko", cohort / "slides", "expected a picture"),
        "none": ("macenko", cohort / "nowhere.png", "expected an existing path"),
        "unused": ("none", broken, "expected stain=macenko or stain=reinhard"),
    }
    for name, (kind, path, expected) in cases.items():
        assert extract(cohort, f"stain={kind}", f"stain_target={path}") == 2, name
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, (name, error)
    assert not (cohort / "features").exists()


def test_a_target_with_transparency_and_palette_is_read(tmp_path: Path) -> None:
    pixels = draw_tile().permute(1, 2, 0).numpy()
    plain = build_normaliser("reinhard", str(save(tmp_path / "a.png", pixels)), "slide")
    clear = build_normaliser("reinhard", str(save(tmp_path / "b.png", pixels, "RGBA")), "slide")
    assert plain is not None and clear is not None and plain.target_name != clear.target_name
    assert isinstance(plain.target, ColourStatistics) and isinstance(clear.target, ColourStatistics)
    assert torch.equal(plain.target.mean, clear.target.mean)
    assert torch.allclose(plain.target.mean, fit_reinhard(draw_tile()).mean, atol=1e-4)
    assert (
        build_normaliser("macenko", str(save(tmp_path / "c.png", pixels, "P")), "tile") is not None
    )


def test_slides_without_stain_are_left_as_they_are_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blank = np.full((64, 64, 3), 243, np.uint8)
    eosin = draw_tile(strength=(0.0, 1.0), side=64).permute(1, 2, 0).numpy()
    for name, pixels in (("blank", blank), ("eosin", eosin)):
        write_pyramid(tmp_path / "slides" / f"{name}.tiff", pixels, levels=(1,))
    tiling = [
        f"slides={tmp_path}/slides",
        f"output={tmp_path}/tiles",
        f"tile_size={TILE}",
        "method=none",
        "workers=1",
    ]
    assert run(tile_slides.main, tile_slides.Config, tiling) == 0
    with caplog.at_level(logging.WARNING):
        assert extract(tmp_path, "stain=macenko") == 0
    said = [record.getMessage() for record in caplog.records if "stain=" in record.getMessage()]
    assert said == [
        "extract_features: slide blank: stain=macenko: too little stained tissue in 4 sampled "
        "tiles, left as it is",
        "extract_features: slide eosin: stain=macenko: found eosin alone",
    ]
    features, tiles = tiles_of(tmp_path, "blank")
    assert np.allclose(features, np.stack([mean_colour(tile) for tile in tiles]), atol=1e-6)


def slide_of(count: int) -> Coordinates:
    corners = np.stack([np.arange(count), np.zeros(count, int)], 1) * TILE
    return Coordinates(
        corners, TileGeometry("S", TILE, TILE, 0, TILE, 0.5, 0.5, 0.0, count * TILE, TILE)
    )


def test_sample_follows_the_coordinates_and_passes_over_unreadable_tiles() -> None:
    coordinates = slide_of(300)
    order = sample_tiles(coordinates)
    assert sorted(order) == list(range(300)) and np.array_equal(sample_tiles(slide_of(300)), order)
    assert not np.array_equal(sample_tiles(slide_of(301))[:50], order[:50])
    asked: list[int] = []

    def reader(bad: set[int]) -> Callable[[int, int], np.ndarray]:
        def read(slide: int, number: int) -> np.ndarray:
            asked.append(number)
            if number in bad:
                raise RegionError(f"tile {number}")
            return draw_tile(side=TILE, seed=number).permute(1, 2, 0).numpy()

        return read

    option = build_normaliser("macenko", "", "slide")
    assert option is not None
    bad = {int(number) for number in order[:SAMPLE:2]}
    found = SlideStains(option, [coordinates], reader(bad)).measure(0)
    assert found.tiles == SAMPLE and asked == order[: SAMPLE + SAMPLE // 2 + 0].tolist()
    asked.clear()
    stains = SlideStains(option, [coordinates], reader(set(range(300))))
    tile = draw_tile(side=TILE).permute(1, 2, 0).numpy()
    assert np.array_equal(stains(tile, 0, 3), tile), "nothing could be sampled: unchanged"
    assert len(asked) == 2 * SAMPLE
    assert np.array_equal(stains(tile, 0, 4), tile) and len(asked) == 2 * SAMPLE, "measured once"


def test_students_take_the_same_keys(tmp_path: Path) -> None:
    (tmp_path / "student.pt").write_bytes(b"")
    base = [
        f"slides={tmp_path}",
        f"coords={tmp_path}",
        f"output={tmp_path}/f",
        f"student={tmp_path}/student.pt",
        "device=cpu",
    ]
    settings = load_config(
        extract_student.Config, [*base, "stain=reinhard", "stain_scope=tile"]
    ).settings()
    assert (
        settings.stain is not None
        and settings.stain.provenance == "reinhard, scope tile, target built-in"
    )
    assert load_config(extract_student.Config, base).settings().stain is None
    with pytest.raises(UserError, match="expected one of none, macenko, reinhard"):
        load_config(extract_student.Config, [*base, "stain=makenko"])
