"""Coordinates of other tools: round trips, and the files written read back the way those tools read
them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import pytest
from PIL import Image

from patch_encoder import convert_coordinates
from patch_encoder.slides import open_slide
from patch_encoder.tiles.coordinates import (
    Coordinates,
    TileGeometry,
    read_coordinates,
    write_coordinates,
)
from patch_encoder.tiles.formats import LAYOUTS, CoordinateSource, detect_layout
from patch_encoder.tiles.geojson import make_tiles_geojson
from patch_encoder.tiles.grid import make_grid, make_tile_geometry, read_tile
from tests.helpers import draw_slide, write_pyramid
from wsi_common.cli import run
from wsi_common.errors import UserError


def clam_tiles(path: Path, slide: Path) -> list[np.ndarray]:
    """As CLAM's bag datasets read: patch_size px of patch_level at each corner, RGB."""
    with h5py.File(path, "r") as file:
        dataset = file["coords"]
        level, size = dataset.attrs["patch_level"], dataset.attrs["patch_size"]
        assert len(dataset.attrs["downsample"]) == len(dataset.attrs["level_dim"]) == 2
        assert {"downsampled_level_dim", "name", "save_path"} <= set(dataset.attrs)
        with openslide.OpenSlide(str(slide)) as handle:
            assert tuple(dataset.attrs["level_dim"]) == handle.level_dimensions[level]
            assert np.allclose(
                np.prod(dataset.attrs["downsample"]),
                handle.level_downsamples[level] ** 2,
                rtol=0.01,
            )
            return [
                np.asarray(handle.read_region(tuple(xy), level, (size, size)).convert("RGB"))
                for xy in dataset[:]
            ]


def trident_tiles(path: Path, slide: Path) -> list[np.ndarray]:
    """As TRIDENT's patcher reads (for a target up to level 0): the two magnifications decide how
    much, the rest is resized.
    """
    with h5py.File(path, "r") as file:
        attributes, corners = dict(file["coords"].attrs), file["coords"][:]
    ratio = (10 / attributes["target_magnification"]) / (10 / attributes["level0_magnification"])
    source_size = round(attributes["patch_size"] * ratio)
    assert source_size == attributes["patch_size_level0"]
    assert {"overlap", "name", "savetodir", "level0_width", "level0_height"} <= set(attributes)
    with openslide.OpenSlide(str(slide)) as handle:
        assert handle.dimensions == (attributes["level0_width"], attributes["level0_height"])
        size = (int(attributes["patch_size"]),) * 2
        regions = [
            handle.read_region(tuple(xy), 0, (source_size,) * 2).convert("RGB") for xy in corners
        ]
    return [np.asarray(region.resize(size, Image.Resampling.BICUBIC)) for region in regions]


@pytest.fixture
def tiled(tmp_path: Path) -> Path:
    """A slide, and its tiles of 64 px at 0.75 um read from 96 px of level 0, in runs' layout."""
    path = write_pyramid(tmp_path / "slides" / "S1.tiff", draw_slide(512))
    write(tmp_path, path, 0.75)
    return tmp_path


def write(root: Path, slide_path: Path, target_mpp: float | None, **options: Any) -> Coordinates:
    with open_slide(slide_path) as slide:
        geometry = make_tile_geometry(slide, 64, target_mpp, **options)
    coordinates = Coordinates(make_grid(geometry)[::2], geometry)
    write_coordinates(root / "tiles" / "coords" / f"{geometry.name}.h5", coordinates)
    return coordinates


def convert(root: Path, source: str, to: str, output: str, *extra: str) -> int:
    keys = [f"input={root / source}", f"to={to}", f"output={root / output}", *extra]
    return run(convert_coordinates.main, convert_coordinates.Config, keys)


def ours_tiles(path: Path, slide_path: Path) -> list[np.ndarray]:
    found = read_coordinates(path)
    with open_slide(slide_path) as slide:
        return [read_tile(slide, found.geometry, x, y) for x, y in found.coords.tolist()]


@pytest.mark.parametrize("to", ["clam", "trident", "atlaspatch", "stamp", "geojson"])
@pytest.mark.parametrize("target_mpp", [0.5, 0.75, 1.0])
def test_there_and_back_keeps_the_tiles(tiled: Path, to: str, target_mpp: float) -> None:
    before = write(tiled, tiled / "slides" / "S1.tiff", target_mpp)
    assert convert(tiled, "tiles", to, "other", f"slides={tiled}/slides") == 0
    assert convert(tiled, "other", "ours", "back", f"slides={tiled}/slides") == 0
    after = read_coordinates(tiled / "back" / "coords" / "S1.h5")
    assert np.array_equal(after.coords, before.coords)
    assert after.geometry == replace(
        before.geometry, target_mpp=after.geometry.target_mpp, mpp=after.geometry.mpp
    )
    assert after.geometry.target_mpp == pytest.approx(target_mpp, rel=1e-6)
    if to in ("clam", "trident", "atlaspatch"):
        assert after.digest() == before.digest(), "everything comes back, bit by bit"


def test_npy_takes_tiles_of_level_0_only(tiled: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert convert(tiled, "tiles", "npy", "npy") == 1
    assert (
        "read as 256 px of level 0, found tiles of 96 px; tile with target_mpp=null" in caplog.text
    )
    before = write(tiled, tiled / "slides" / "S1.tiff", None)
    assert convert(tiled, "tiles", "npy", "npy", "tile_size=64") == 0
    corners = np.load(tiled / "npy" / "S1.npy", allow_pickle=False)
    assert corners.dtype == np.int64, "OpenSlide's location takes no float"
    assert np.array_equal(corners, before.coords)
    assert convert(tiled, "npy", "ours", "back", "tile_size=64", f"slides={tiled}/slides") == 0
    assert read_coordinates(tiled / "back" / "coords" / "S1.h5").digest() == before.digest()


def test_clam_reads_what_we_write(tiled: Path) -> None:
    for target_mpp in (0.5, 1.0):
        write(tiled, tiled / "slides" / "S1.tiff", target_mpp)
        assert convert(tiled, "tiles", "clam", f"clam{target_mpp}", f"slides={tiled}/slides") == 0
        theirs = clam_tiles(
            tiled / f"clam{target_mpp}" / "patches" / "S1.h5", tiled / "slides" / "S1.tiff"
        )
        ours = ours_tiles(tiled / "tiles" / "coords" / "S1.h5", tiled / "slides" / "S1.tiff")
        assert len(theirs) > 5
        assert all(np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_trident_reads_what_we_write(tiled: Path) -> None:
    assert convert(tiled, "tiles", "trident", "trident") == 0
    theirs = trident_tiles(
        tiled / "trident" / "patches" / "S1_patches.h5", tiled / "slides" / "S1.tiff"
    )
    ours = ours_tiles(tiled / "tiles" / "coords" / "S1.h5", tiled / "slides" / "S1.tiff")
    assert len(theirs) > 5
    assert all(np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_trident_magnifications_are_whole_where_they_can_be(tmp_path: Path) -> None:
    for mpp, target, expected in (
        (0.25, 0.5, (40, 20)),
        (0.5, 0.5, (20, 20)),
        (0.23, 0.5, None),
        (0.499, 0.5, None),
    ):
        write_pyramid(tmp_path / "slides" / "S1.tiff", draw_slide(1024), mpp=mpp, levels=(1,))
        with open_slide(tmp_path / "slides" / "S1.tiff", mpp) as slide:
            geometry = make_tile_geometry(slide, 256, target, overlap=0.25)
        write_coordinates(tmp_path / "S1.h5", Coordinates(make_grid(geometry), geometry))
        assert convert(tmp_path, "S1.h5", "trident", f"out{mpp}{target}") == 0
        file = tmp_path / f"out{mpp}{target}" / "patches" / "S1_patches.h5"
        trident_tiles(file, tmp_path / "slides" / "S1.tiff")
        with h5py.File(file) as content:
            attributes = dict(content["coords"].attrs)
        found = (attributes["level0_magnification"], attributes["target_magnification"])
        assert attributes["overlap"] == 64, "px after resampling"
        assert (
            found == expected
            if expected
            else round(256 * found[0] / found[1]) == geometry.patch_size_level0
        )


def test_tridents_own_files_keep_their_field_of_view(tmp_path: Path) -> None:
    """TRIDENT's patch_size is the size after resampling: reading as many px of level 0 would be a
    quarter of the tile.
    """
    path = write_pyramid(tmp_path / "slides" / "S1.tiff", draw_slide(512), mpp=0.25)
    (tmp_path / "job" / "patches").mkdir(parents=True)
    with h5py.File(tmp_path / "job" / "patches" / "S1_patches.h5", "w") as file:
        dataset = file.create_dataset("coords", data=np.array([[0, 0], [128, 64]]))
        dataset.attrs.update(
            {"patch_size": 64, "patch_size_level0": 128, "level0_magnification": 40, "overlap": 16}
        )
        dataset.attrs.update({"target_magnification": 20, "name": "S1", "savetodir": "/x"})
        dataset.attrs.update({"level0_width": 512, "level0_height": 512})
    found = read_coordinates(tmp_path / "job" / "patches" / "S1_patches.h5").geometry
    assert (found.patch_size, found.patch_level, found.patch_size_level0, found.target_size) == (
        128,
        0,
        128,
        64,
    )
    assert found.overlap == 0.25, "16 of 64 px"
    assert convert(tmp_path, "job", "ours", "ours", f"slides={tmp_path}/slides") == 0
    full = read_coordinates(tmp_path / "ours" / "coords" / "S1.h5").geometry
    assert (full.patch_level, full.patch_size, full.target_mpp, full.mpp) == (1, 64, 0.5, 0.25), (
        "the level that suits"
    )
    with open_slide(path) as slide:
        direct = np.asarray(
            Image.fromarray(slide.read(128, 64, 128)).resize((64, 64), Image.Resampling.BOX)
        )
        assert np.abs(read_tile(slide, full, 128, 64).astype(int) - direct).max() <= 1
        assert np.abs(read_tile(slide, found, 128, 64).astype(int) - direct).mean() < 8


def test_clams_own_files(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "slides" / "S1.tiff", draw_slide(512), levels=(1, 4))
    with h5py.File(tmp_path / "S1.h5", "w") as file:
        dataset = file.create_dataset("coords", data=np.array([[5, 6]]))
        dataset.attrs.update(
            {"patch_size": 32, "patch_level": 1, "downsample": (4.0, 4.0), "level_dim": (128, 128)}
        )
        dataset.attrs.update({"downsampled_level_dim": (128, 128), "name": "S1", "save_path": "x"})
    assert detect_layout(tmp_path / "S1.h5") == "clam"
    assert convert(tmp_path, "S1.h5", "ours", "ours", f"slides={tmp_path}/slides") == 0
    found = read_coordinates(tmp_path / "ours" / "coords" / "S1.h5")
    assert found.coords.tolist() == [[5, 6]]
    geometry = found.geometry
    assert (
        geometry.patch_level,
        geometry.patch_size,
        geometry.patch_size_level0,
        geometry.target_size,
    ) == (1, 32, 128, 32)
    assert (geometry.mpp, geometry.target_mpp, geometry.level0_width) == (0.5, 2.0, 512)
    assert (
        TileGeometry.from_attributes({"patch_size": 512, "custom_downsample": 2}, "x").target_size
        == 256
    )


def atlaspatch_tiles(path: Path, slide: Path) -> list[np.ndarray]:
    """As AtlasPatch reads: each row says what to read, the file's attributes how large the tile
    is.
    """
    with h5py.File(path, "r") as file:
        attributes, rows = dict(file.attrs), file["coords"][:]
        assert rows.dtype == np.int32 and attributes["num_patches"] == len(rows)
    assert all(
        int(attributes[name]) > 0
        for name in ("patch_size_level0", "patch_size", "target_magnification")
    )
    size = (int(attributes["patch_size"]),) * 2
    with openslide.OpenSlide(str(slide)) as handle:
        regions = [
            handle.read_region((x, y), level, (w, h)).convert("RGB")
            for x, y, w, h, level in rows.tolist()
        ]
    return [np.asarray(region.resize(size, Image.Resampling.BICUBIC)) for region in regions]


def test_atlaspatch_reads_what_we_write(tiled: Path) -> None:
    assert convert(tiled, "tiles", "atlaspatch", "atlas") == 0
    theirs = atlaspatch_tiles(tiled / "atlas" / "patches" / "S1.h5", tiled / "slides" / "S1.tiff")
    ours = ours_tiles(tiled / "tiles" / "coords" / "S1.h5", tiled / "slides" / "S1.tiff")
    assert len(theirs) > 5
    assert all(np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_atlaspatchs_own_files(tmp_path: Path) -> None:
    rows = np.array([[0, 64, 64, 64, 1], [128, 64, 64, 64, 1]], dtype=np.int32)
    attributes = {
        "patch_size": 32,
        "patch_size_level0": 128,
        "level0_magnification": 20,
        "target_magnification": 5,
    }

    def write_rows(content: np.ndarray) -> Path:
        with h5py.File(tmp_path / "S1.h5", "w") as file:
            file.create_dataset("coords", data=content)
            file.create_dataset("passports", data=np.array([b"S1__x0"] * len(content)))
            file.attrs.update(
                attributes
                | {"overlap": 8, "level0_width": 512, "level0_height": 500, "wsi_path": "/x/S1.svs"}
            )
        return tmp_path / "S1.h5"

    path = write_rows(rows)
    assert detect_layout(path) == "atlaspatch"
    with open_slide(write_pyramid(tmp_path / "S1.tiff", draw_slide(512))) as slide:
        found = LAYOUTS["atlaspatch"].read(path, CoordinateSource("S1", slide))
    geometry = found.geometry
    assert found.coords.tolist() == [[0, 64], [128, 64]]
    assert (
        geometry.patch_size,
        geometry.patch_level,
        geometry.patch_size_level0,
        geometry.target_size,
    ) == (64, 1, 128, 32)
    assert (geometry.mpp, geometry.target_mpp, geometry.overlap, geometry.level0_height) == (
        0.5,
        2.0,
        0.25,
        500,
    )
    for bad in (np.array([[0, 0, 64, 64, 1], [64, 0, 64, 64, 2]]), np.array([[0, 0, 65, 64, 0]])):
        with pytest.raises(UserError, match="square tiles of one size and level"):
            LAYOUTS["atlaspatch"].read(write_rows(bad), CoordinateSource("S1"))
    del attributes["patch_size_level0"]
    with pytest.raises(
        UserError, match=r"patch_size_level0, found \(2, 5\), no {'patch_size_level0'}"
    ):
        LAYOUTS["atlaspatch"].read(write_rows(rows), CoordinateSource("S1"))


def test_stamp_is_in_micrometres(tiled: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert convert(tiled, "tiles", "stamp", "stamp") == 0
    before = read_coordinates(tiled / "tiles" / "coords" / "S1.h5")
    with h5py.File(tiled / "stamp" / "S1.h5") as file:
        assert (file.attrs["unit"], file.attrs["tile_size_um"], file.attrs["tile_size_px"]) == (
            "um",
            48.0,
            64,
        )
        assert np.allclose(file["coords"][:], before.coords * 0.5)
    assert convert(tiled, "stamp", "ours", "back") == 1
    assert "um per pixel" in caplog.text and "slides=" in caplog.text
    assert convert(tiled, "stamp", "ours", "back", "mpp=0.5") == 0
    assert np.array_equal(
        read_coordinates(tiled / "back" / "coords" / "S1.h5").coords, before.coords
    )


def test_geojson_is_what_qupath_opens(tiled: Path) -> None:
    assert convert(tiled, "tiles", "geojson", "geojson") == 0
    document = json.loads((tiled / "geojson" / "S1.geojson").read_text())
    before = read_coordinates(tiled / "tiles" / "coords" / "S1.h5")
    assert document["type"] == "FeatureCollection" and len(document["features"]) == len(
        before.coords
    )
    for row, feature in enumerate(document["features"]):
        (ring,), (x, y) = feature["geometry"]["coordinates"], before.coords[row].tolist()
        assert (feature["type"], feature["geometry"]["type"]) == ("Feature", "Polygon")
        assert ring == [[x, y], [x + 96, y], [x + 96, y + 96], [x, y + 96], [x, y]], (
            "closed, level-0 px"
        )
        assert feature["properties"] == {
            "objectType": "tile",
            "isLocked": True,
            "measurements": {"tile": row},
        }
    scored = json.loads(make_tiles_geojson(before, {"risk": np.arange(len(before.coords)) / 10}))
    assert scored["features"][2]["properties"]["measurements"] == {"tile": 2, "risk": 0.2}
    with pytest.raises(ValueError, match="JSON"):
        make_tiles_geojson(before, {"risk": np.full(len(before.coords), np.nan)})


def test_again_keeps_and_other_content_is_refused(
    tiled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pyramid(tiled / "slides" / "S2.tiff", draw_slide(256))
    assert convert(tiled, "tiles", "trident", "out") == 0
    path = tiled / "out" / "patches" / "S1_patches.h5"
    before = path.stat().st_mtime_ns
    write(tiled, tiled / "slides" / "S2.tiff", 0.5)
    assert convert(tiled, "tiles", "trident", "out") == 0, "resumes with the slide that came"
    assert path.stat().st_mtime_ns == before
    write(tiled, tiled / "slides" / "S1.tiff", 0.5)
    assert convert(tiled, "tiles", "trident", "out") == 1
    assert path.stat().st_mtime_ns == before
    failures = (tiled / "out" / "failures.csv").read_text()
    assert "S1_patches.h5: holds other coordinates: " in failures and "overwrite=true" in failures
    assert convert(tiled, "tiles", "trident", "out", "overwrite=true") == 0
    assert read_coordinates(path).geometry.patch_size_level0 == 64
    path.write_bytes(b"half a file")
    assert convert(tiled, "tiles", "trident", "out") == 1, (
        "whatever it is, it is not ours to replace"
    )


def test_one_bad_slide_never_stops_the_others(
    tiled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pyramid(tiled / "slides" / "S2.tiff", draw_slide(256))
    small = write(tiled, tiled / "slides" / "S2.tiff", 0.5)
    write_coordinates(tiled / "tiles" / "coords" / "S0.h5", small)
    (tiled / "tiles" / "coords" / "S3.h5").write_bytes(b"nothing")
    write_coordinates(tiled / "tiles" / "coords" / "S1.h5", small)
    outside = Coordinates(
        small.coords + 10_000, replace(small.geometry, level0_width=0, level0_height=0)
    )
    write_coordinates(tiled / "tiles" / "coords" / "S4.h5", outside)
    write_pyramid(tiled / "slides" / "S4.tiff", draw_slide(256))
    assert convert(tiled, "tiles", "geojson", "out", f"slides={tiled}/slides") == 1
    failures = (tiled / "out" / "failures.csv").read_text()
    assert [line.split(",")[0] for line in failures.splitlines()[1:]] == ["S0", "S1", "S3", "S4"]
    for expected in (
        "no such slide",
        "coordinates are of a slide of (256, 256) px, found one of (512, 512)",
        "tiles lie outside",
    ):
        assert expected in failures
    assert (tiled / "out" / "S2.geojson").is_file()


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.array([[0.5, 1.0]]))
    np.save(tmp_path / "shape.npy", np.zeros((3, 5), int))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "shape.geojson").write_text(
        '{"features": [{"geometry": {"type": "Point", "coordinates": [1, 2]}}]}'
    )
    (tmp_path / "triangle.geojson").write_text(
        '{"features": [{"geometry": {"coordinates": [[[0,0],[1,0],[1,1],[0,0]]]}}]}'
    )
    with h5py.File(tmp_path / "none.h5", "w") as file:
        file["coords"] = np.zeros((2, 2))
    for name, expected in (
        ("float.npy", "whole numbers"),
        ("shape.npy", r"found int64 \(3, 5\)"),
        ("pickle.npy", "cannot be read"),
        ("shape.geojson", "four corners"),
        ("triangle.geojson", "four corners"),
        ("none.h5", "expected coordinates of ours, CLAM"),
    ):
        with pytest.raises(UserError, match=expected):
            LAYOUTS[detect_layout(tmp_path / name)].read(tmp_path / name, CoordinateSource("S"))


def test_input_without_coordinates_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert convert(tmp_path, "empty", "clam", "out") == 2
    assert "expected coordinates files" in capsys.readouterr().err


def test_no_tiles_convert_too(tiled: Path) -> None:
    whole = read_coordinates(tiled / "tiles" / "coords" / "S1.h5")
    write_coordinates(
        tiled / "tiles" / "coords" / "S1.h5", Coordinates(whole.coords[:0], whole.geometry)
    )
    for to in ("clam", "trident", "stamp", "geojson"):
        assert convert(tiled, "tiles", to, to, f"slides={tiled}/slides") == 0
        assert convert(tiled, to, "ours", f"{to}/back", f"slides={tiled}/slides") == 0
        assert read_coordinates(tiled / to / "back" / "coords" / "S1.h5").coords.shape == (0, 2)
