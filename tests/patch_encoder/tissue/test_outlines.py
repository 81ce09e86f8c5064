"""Masks as polygons, as GeoJSON and as pictures: out and in again without losing a pixel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from patch_encoder.slides import Slide, open_slide
from patch_encoder.tissue.find import find_tissue
from patch_encoder.tissue.geojson import read_geojson, write_geojson
from patch_encoder.tissue.outlines import (
    Outline,
    compute_signed_area,
    fill_outlines,
    trace_outlines,
)
from patch_encoder.tissue.settings import FileSettings, TissueSettings
from tests.helpers import draw_slide, write_pyramid
from wsi_common.errors import UserError


@pytest.mark.parametrize("seed", list(range(40)))
def test_outlines_of_any_mask_fill_to_the_same_mask(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 14, 2)
    mask = rng.random((height, width)) < rng.random()
    outlines = trace_outlines(mask)
    assert len(outlines) == ndimage.label(mask)[1]
    np.testing.assert_array_equal(fill_outlines(outlines, mask.shape), mask)
    # rings run clockwise and holes against it, so that areas add up
    assert (
        sum(compute_signed_area(o.outer) + sum(map(compute_signed_area, o.holes)) for o in outlines)
        == mask.sum()
    )
    assert all(compute_signed_area(hole) < 0 for outline in outlines for hole in outline.holes)
    for outline in outlines:
        steps = np.abs(np.roll(outline.outer, -1, axis=0) - outline.outer)
        assert ((steps > 0).sum(1) == 1).all(), "corners only, straight between them"


def test_polygons_are_filled_by_pixel_centres() -> None:
    triangle = Outline(np.array([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]]))
    y, x = np.mgrid[:8, :8] + 0.5
    np.testing.assert_array_equal(fill_outlines([triangle], (8, 8)), x + y < 8)
    outside = Outline(np.array([[-5.0, -5.0], [20.0, -5.0], [20.0, 3.2], [-5.0, 3.2]]))
    np.testing.assert_array_equal(fill_outlines([outside], (8, 8)), y < 3.2)
    # two shapes that overlap are one area, not a hole
    assert fill_outlines([triangle, outside], (8, 8))[0].all()
    assert not fill_outlines([Outline(triangle.outer + 50)], (8, 8)).any()


@pytest.fixture
def slide(tmp_path: Path):
    pixels = draw_slide(512)
    pixels[140:170, 140:170] = 240  # a hole in the first disc
    with open_slide(write_pyramid(tmp_path / "slides" / "S1.tiff", pixels)) as opened:
        yield opened


SETTINGS = TissueSettings(mpp=2.3, median=4.0, closing=0.0, min_area=50.0)


def from_file(slide: Slide, folder: Path, **keys: object) -> np.ndarray:
    settings = TissueSettings(mpp=SETTINGS.mpp, file=FileSettings(folder=str(folder), **keys))  # type: ignore[arg-type]
    return find_tissue(slide, "file", settings).mask


def test_geojson_is_read_back_to_the_same_mask(slide: Slide, tmp_path: Path) -> None:
    mask = find_tissue(slide, "hsv_otsu", SETTINGS).mask
    assert ndimage.label(mask)[1] == 2 and mask.shape[0] not in (512, 256, 128)
    scale = slide.width / mask.shape[1], slide.height / mask.shape[0]
    outlines = [outline.scaled(*scale) for outline in trace_outlines(mask)]
    write_geojson(tmp_path / "drawn" / "S1.geojson", outlines, slide.mpp, slide.bounds)
    np.testing.assert_array_equal(from_file(slide, tmp_path / "drawn"), mask)
    content = json.loads((tmp_path / "drawn" / "S1.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    first = content["features"][0]
    assert first["geometry"]["type"] == "Polygon" and len(first["geometry"]["coordinates"]) == 2, (
        "the hole is kept"
    )
    assert all(ring[0] == ring[-1] for ring in first["geometry"]["coordinates"])
    assert first["properties"]["objectType"] == "annotation"
    assert first["properties"]["classification"]["name"] == "Tissue"
    area = sum(
        feature["properties"]["measurements"]["Area mm^2"] for feature in content["features"]
    )
    assert area == pytest.approx(mask.mean() * 512 * 512 * 0.25 / 1e6, rel=1e-3)


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def feature(rings: list, name: object, kind: str = "Polygon") -> dict[str, object]:
    properties = {"objectType": "annotation", "classification": name} if name else {}
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": rings},
        "properties": properties,
    }


def test_classes_holes_and_every_form_of_the_file(slide: Slide, tmp_path: Path) -> None:
    tumour = feature([square(0, 0, 256), square(64, 64, 64)], {"name": "Tumor", "color": [1, 2, 3]})
    pen = feature([[square(128, 128, 64)], [square(400, 400, 64)]], "Pen", "MultiPolygon")
    point = {
        "type": "Feature",
        "geometry": {"type": "Point", "coordinates": [3, 4]},
        "properties": {},
    }
    whole, hole = 256**2, 64**2
    size = (slide.width * slide.height) / (512 * 512)

    def area(content: object, **keys: object) -> float:
        (tmp_path / "S1.geojson").write_text(json.dumps(content))
        found = from_file(slide, tmp_path, **keys)
        return round(found.mean() * 512 * 512 * size / hole)

    collection = {"type": "FeatureCollection", "features": [tumour, pen, point]}
    assert area(collection) == (whole - hole + hole) / hole
    assert area(collection, include=["Tumor"]) == (whole - hole) / hole
    assert area(collection, include=["Pen"]) == 2
    assert area(collection, exclude=["Pen"]) == (whole - 2 * hole) / hole
    assert area(collection, include=["tumour"]) == 0
    assert area(tumour) == area([tumour]) == area(tumour["geometry"]) == 15
    assert area({"type": "FeatureCollection", "features": []}) == 0
    (tmp_path / "S1.geojson").rename(tmp_path / "S1.tiff.geojson")
    assert from_file(slide, tmp_path).mean() == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "as JSON"),
        ('{"type": "Topology"}', "expected GeoJSON"),
        (
            '{"type": "Feature", "geometry": {"type": "LineString", "coordinates": [[0, 0], [1, '
            "1]]}}",
            "only points or lines",
        ),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, "a"], [2, 2]]]}', "rings of"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, NaN], [2, 2]]]}', "finite"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}', "three"),
    ],
)
def test_broken_outlines_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.geojson").write_text(text)
    with pytest.raises(UserError, match=message):
        read_geojson(tmp_path / "a.geojson", (0, 0))


@pytest.mark.parametrize("values", [(0, 255), (0, 1), (7, 3), (0.25, 0.5)])
@pytest.mark.parametrize("side", [64, 111, 512, 800])
def test_mask_pictures_of_any_scale_and_values(
    slide: Slide, tmp_path: Path, values: tuple[float, ...], side: int
) -> None:
    low, high = min(values), max(values)
    drawn = np.full((side, side), low, dtype=np.float32 if isinstance(high, float) else np.uint8)
    drawn[: side // 2] = high
    Image.fromarray(drawn).save(tmp_path / "S1.tif")
    found = from_file(slide, tmp_path)
    assert found.shape == find_tissue(slide, "hsv_otsu", SETTINGS).mask.shape
    assert (
        found.mean() == pytest.approx(0.5, abs=0.02) and found[:10].all() and not found[-10:].any()
    )


def test_colour_palette_jpeg_and_blank_pictures(slide: Slide, tmp_path: Path) -> None:
    half = np.zeros((90, 90, 3), dtype=np.uint8)
    half[:45] = (255, 0, 0)
    Image.fromarray(half).quantize(2).save(tmp_path / "S1.png")
    assert from_file(slide, tmp_path).mean() == pytest.approx(0.5, abs=0.02)
    Image.fromarray(half).save(tmp_path / "S1.png")
    assert from_file(slide, tmp_path).mean() == pytest.approx(0.5, abs=0.02)
    (tmp_path / "S1.png").unlink()
    Image.fromarray(half).save(tmp_path / "S1.jpg", quality=60)
    assert from_file(slide, tmp_path).mean() == pytest.approx(0.5, abs=0.02)
    (tmp_path / "S1.jpg").unlink()
    for value, expected in ((0, 0.0), (255, 1.0)):
        Image.new("L", (30, 30), value).save(tmp_path / "S1.png")
        assert from_file(slide, tmp_path).mean() == expected


def test_annotations_that_do_not_fit_are_refused(slide: Slide, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"S1: expected one annotation .*S1\.geojson\|png\|tif, found none"
    ):
        from_file(slide, tmp_path)
    with pytest.raises(UserError, match=r"tissue\.file\.folder"):
        find_tissue(slide, "file", TissueSettings())
    Image.new("L", (40, 80)).save(tmp_path / "S1.png")
    with pytest.raises(UserError, match="whole slide"):
        from_file(slide, tmp_path)
    Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10)).save(tmp_path / "S1.png")
    with pytest.raises(UserError, match="expected two values"):
        from_file(slide, tmp_path)
    (tmp_path / "S1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read"):
        from_file(slide, tmp_path)
    (tmp_path / "S1.json").write_text("[]")
    (tmp_path / "S12.json").write_text("[]")
    with pytest.raises(UserError, match=r"found S1\.json, S1\.png; keep one"):
        from_file(slide, tmp_path)


def test_unknown_method_is_refused(slide: Slide) -> None:
    with pytest.raises(UserError, match="method=otsu"):
        find_tissue(slide, "otsu", SETTINGS)
