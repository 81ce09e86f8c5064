"""What the stages leave on disk, as layers and facts of a slide page."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mil.heatmaps.attention_maps import AttentionMaps, write_attention_maps
from patch_encoder.bags.bag import Bag
from patch_encoder.slide_page import Config, main
from patch_encoder.viewer.arrays import KINDS
from patch_encoder.viewer.facts import list_predictions, read_tables
from patch_encoder.viewer.heat import read_attention_maps, read_heat
from patch_encoder.viewer.layers import check_layers, read_layers
from patch_encoder.viewer.shapes import read_shapes
from tests.patch_encoder.viewer.results import BOXES, FIGURES, SIDE, TILE, write_results
from wsi_common.errors import UserError
from wsi_common.files import write_json


def unpack(packed: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["bytes"]), KINDS[packed["kind"]])


@pytest.fixture
def results(tmp_path: Path) -> dict[str, str]:
    return write_results(tmp_path)


def write_features(path: Path, *features: tuple[dict[str, Any], dict[str, Any]]) -> Path:
    found = [{"type": "Feature", "geometry": g, "properties": p} for g, p in features]
    write_json(path, {"type": "FeatureCollection", "features": found})
    return path


def test_layers_of_all_stages_are_read(results: dict[str, str]) -> None:
    found = read_layers(results, "S1", (SIDE, SIDE), (0, 0))
    layers = {layer["id"]: layer for layer in found.layers}
    assert list(layers) == ["grade_maps", "heat", "outlines", "detections", "mitoses"]
    boxes = layers["detections"]["marks"]
    assert (unpack(boxes["boxes"]) == BOXES.ravel()).all()
    np.testing.assert_allclose(unpack(boxes["measurements"]["score"]), [0.9, 0.4])
    assert [c["name"] for c in layers["detections"]["classes"]] == ["lesion", "other"]
    points = unpack(layers["mitoses"]["marks"]["boxes"]).reshape(-1, 4)
    assert (points[:, :2] == FIGURES).all() and (points[:, 2:] == FIGURES).all()
    assert layers["mitoses"]["found"] == 2, "the hot spot is an area"
    assert unpack(layers["mitoses"]["areas"]["counts"]).tolist() == [1]
    assert layers["grade_maps"]["filled"] and not layers["outlines"]["filled"]
    assert layers["outlines"]["found"] == 0, "a square of tissue is no finding"
    assert found.facts == {
        "case": "C1", "label": "tumour", "predicted": "tumour", "p(tumour)": "0.7"
    }  # fmt: skip
    assert [layer["on"] for layer in found.layers] == [True, False, True, True, True]


def test_heat_has_every_column_of_scores(results: dict[str, str]) -> None:
    found = read_heat(Path(results["heat"]), "S1", (SIDE, SIDE))
    assert found is not None
    heat = found[0]
    assert heat["side"] == TILE and heat["shown"] == "percentile"
    assert set(heat["values"]) == {"attention", "percentile"}
    attention = unpack(heat["values"]["attention"])
    np.testing.assert_allclose(attention, np.arange(1, 26) / 325, rtol=1e-6)
    assert unpack(heat["x"])[:6].tolist() == [700, 800, 900, 1000, 1100, 700]
    assert read_heat(Path(results["heat"]), "unknown", (SIDE, SIDE)) is None


def test_attention_of_classes_can_be_chosen(results: dict[str, str]) -> None:
    """Beside the heatmaps, where mil_predict leaves it; refused where it is of other tiles."""
    weights = np.random.default_rng(0).random((2, 25)).astype(np.float32)
    path = Path(results["heat"]).parent / "attention" / "S1.h5"
    maps = AttentionMaps("class", torch.tensor(weights), None)
    bag = Bag(Path("S1"), (25, 1), "float32", None)
    write_attention_maps(path, {"fold0": maps}, ["a", "b"], bag, "made")
    found = read_heat(Path(results["heat"]), "S1", (SIDE, SIDE))
    assert found is not None
    values = found[0]["values"]
    assert list(values) == ["attention", "percentile", "fold0 a", "fold0 b"]
    assert (unpack(values["fold0 b"]) == weights[1]).all()
    with pytest.raises(UserError, match="maps of the 24 scored tiles"):
        read_attention_maps(Path(results["heat"]), "S1", 24)


def test_heat_of_a_slide_of_another_size_is_refused(results: dict[str, str]) -> None:
    with pytest.raises(UserError, match="expected a slide of 99 x 1300 px, found 1300 x 1300"):
        read_heat(Path(results["heat"]), "S1", (99, SIDE))
    (Path(results["heat"]) / "scores" / "S1.csv").write_text("x,y,attention\n1,2,much\n")
    with pytest.raises(UserError, match="table of numbers"):
        read_heat(Path(results["heat"]), "S1", (SIDE, SIDE))


def test_shapes_count_from_the_slides_bounds(tmp_path: Path) -> None:
    """Points, boxes, polygons with holes and several parts, in the forms of old and new QuPath."""
    ring = [[0, 0], [10, 0], [10, 8], [0, 8], [0, 0]]
    hole = [[2, 2], [4, 2], [4, 4], [2, 2]]
    old = {"classification": {"name": "T", "colorRGB": -65536}}
    old["measurements"] = [{"name": "score", "value": 0.5}]
    path = write_features(
        tmp_path / "a.geojson",
        ({"type": "Point", "coordinates": [5, 6]}, old),
        ({"type": "Polygon", "coordinates": [ring]}, {"objectType": "detection"}),
        ({"type": "Polygon", "coordinates": [ring]}, {"objectType": "annotation", "name": "mine"}),
        ({"type": "MultiPolygon", "coordinates": [[ring, hole], [hole]]}, {}),
        ({"type": "LineString", "coordinates": [[0, 0], [1, 1]]}, {}),
    )
    found = read_shapes(path, (100, 1000))
    assert unpack(found["marks"]["boxes"]).reshape(-1, 4).tolist() == [
        [105, 1006, 105, 1006], [100, 1000, 110, 1008]
    ]  # fmt: skip
    scores = unpack(found["marks"]["measurements"]["score"])
    assert scores[0] == 0.5 and np.isnan(scores[1])
    assert found["classes"][0] == {"name": "T", "colour": [255, 0, 0]}
    assert unpack(found["areas"]["counts"]).tolist() == [1, 2, 1]
    assert unpack(found["areas"]["rings"]).tolist() == [5, 5, 4, 4]
    assert unpack(found["areas"]["points"])[:4].tolist() == [100, 1000, 110, 1000]
    assert found["areas"]["names"] == ["mine", "", ""]


def test_a_slanted_box_is_no_upright_one(tmp_path: Path) -> None:
    slanted = [[5, 0], [10, 5], [5, 10], [0, 5], [5, 0]]
    bow = [[0, 0], [5, 0], [9, 0], [9, 9], [0, 0]]
    path = write_features(
        tmp_path / "a.geojson",
        *(({"type": "Polygon", "coordinates": [ring]}, {}) for ring in (slanted, bow)),
    )
    assert read_shapes(path, (0, 0))["found"] == 0


@pytest.mark.parametrize("broken", [[["a", 1]], [[1]], [], [[float("inf"), 0]]])
def test_broken_shapes_are_named(tmp_path: Path, broken: list[Any]) -> None:
    path = tmp_path / "a.geojson"
    geometry = {"type": "Polygon", "coordinates": [broken]}
    path.write_text(json.dumps({"type": "Feature", "geometry": geometry, "properties": {}}))
    with pytest.raises(UserError, match="a.geojson: expected"):
        read_shapes(path, (0, 0))


def test_names_in_place_of_classes_are_refused(tmp_path: Path) -> None:
    point = {"type": "Point", "coordinates": [0, 0]}
    rows = [(point, {"classification": {"name": str(number)}}) for number in range(65)]
    with pytest.raises(UserError, match="at most 64 classes"):
        read_shapes(write_features(tmp_path / "a.geojson", *rows), (0, 0))


def test_a_folder_without_any_of_the_slides_is_refused(results: dict[str, str]) -> None:
    check_layers(results, ["S1", "unknown"])
    for key in ("heat", "detections"):
        with pytest.raises(UserError, match=f"{key}=.*found none"):
            check_layers({key: results[key]}, ["unknown"])


def test_tables_are_put_together_by_slide(tmp_path: Path) -> None:
    """Empty cells are left out, and rows of several folds named one after the other."""
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("slide_id,p,fold\n007,0.25,0\n007,0.5,1\n8,,0\n")
    second.write_text("\ufeffslide_id,stage\n007,II\n", encoding="utf-8")
    assert read_tables([first, second]) == {
        "007": {"p": "0.25; 0.5", "fold": "0; 1", "stage": "II"}, "8": {"fold": "0"}
    }  # fmt: skip
    first.write_text("slide,p\n007,0.25\n")
    with pytest.raises(UserError, match="expected a column slide_id, found slide, p"):
        read_tables([first])


def test_a_risk_is_not_called_a_probability() -> None:
    assert list_predictions({"label": "event at 9", "predictions": {"risk": -0.31}}) == {
        "label": "event at 9", "risk": "-0.31"
    }  # fmt: skip


def test_a_slide_with_a_broken_layer_is_listed_and_the_others_have_pages(
    results: dict[str, str], tmp_path: Path
) -> None:
    (Path(results["detections"]) / "geojson" / "S1.geojson").write_text("{")
    output = tmp_path / "out"
    assert main(Config(**results, output=str(output), workers=0)) == 1
    assert "S1" in (output / "failures.csv").read_text()
    assert not (output / "slides" / "S1.html").exists()
    assert (output / "slides" / "S2 odd #1 50%.html").exists()
    assert {path.name for path in (output / "openseadragon").iterdir()} == {
        "openseadragon.min.js", "LICENSE.txt"
    }  # fmt: skip
