"""Where cells lie: by hand, and by dots that have to be found where they were drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection_kd.evaluation.peaks import find_peaks
from detection_kd.evaluation.tile_predictions import (
    count_hits,
    find_field_detections,
    predict_tiles,
)
from detection_kd.fields.field_tiles import FieldTiles
from detection_kd.mitosis_sets.point_set import MITOSIS, AnnotatedField, PointSet
from detection_kd.models.cam import LocaliserKeys, WeakLocaliser
from detection_kd.models.cell_grid import CellGrid, make_averaging, measure_cells
from detection_kd.whole_slides.mitosis_candidates import detect_candidates
from patch_encoder.extraction.loop import ExtractSettings
from patch_encoder.tiles.coordinates import Coordinates, SlideJob, TileGeometry
from wsi_common.distributed import World
from wsi_common.errors import UserError

CPU = torch.device("cpu")
TRUNKS = [("small", 3), ("resnet18", 3), ("tf_efficientnet_lite0", 3)]
DOTS = [(40.5, 60.5), (97.5, 83.5), (60.5, 130.5), (139.5, 52.5), (111.5, 118.5), (72.5, 95.5)]
SIDE = 176  # px of the tiles that dots are drawn on


def find_averaging_network(trunk: str, stage: int) -> WeakLocaliser:
    """A localiser that only averages, which answers a white dot on black with the logit 4."""
    model = WeakLocaliser(LocaliserKeys(trunk=trunk, stage=stage, init="random")).eval()
    make_averaging(model.trunk)
    model.set_statistics(((0, 0, 0), (1, 1, 1)))
    torch.nn.init.ones_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    with torch.no_grad():
        highest = float(model(draw_dot(DOTS[4])).maps.max())
    torch.nn.init.constant_(model.head.weight, 8 / highest)
    torch.nn.init.constant_(model.head.bias, -4.0)
    return model


def draw_dot(dot: tuple[float, float]) -> torch.Tensor:
    """A black tile (1, 3, SIDE, SIDE) with one white pixel, whose middle is `dot`."""
    pixels = torch.zeros(1, 3, SIDE, SIDE)
    pixels[0, :, int(dot[1]), int(dot[0])] = 1.0
    return pixels


@pytest.fixture(scope="module", params=TRUNKS, ids=lambda known: known[0])
def model(request: pytest.FixtureRequest) -> WeakLocaliser:
    return find_averaging_network(*request.param)


@pytest.mark.parametrize(
    ("trunk", "stage", "side", "expected"),
    [
        ("small", 3, 64, (4, -1.5)),
        ("resnet18", 1, 64, (4, -1.5)),
        ("resnet18", 3, 64, (16, -7.5)),
        ("resnet18", 3, 500, (16, -7.5)),  # 32 cells, not 500 / 32 px apart
        ("tf_efficientnet_lite0", 2, 64, (8, 3.5)),
        ("tf_efficientnet_lite0", 3, 64, (16, 7.5)),
        ("tf_efficientnet_lite0", 3, 500, (16, -4.5)),  # 250, then 125: pads on both sides
        ("convnext_atto", 1, 64, (8, 0.0)),
        ("vit_tiny_patch16_224", 3, 224, (16, 0.0)),
    ],
)
def test_cells_lie_where_strides_and_padding_put_them(
    trunk: str, stage: int, side: int, expected: tuple[float, float]
) -> None:
    """Every halving of symmetric padding moves cells by half a px of its input up and left, and by
    as much down and right where TensorFlow's padding is on one side only.
    """
    model = WeakLocaliser(LocaliserKeys(trunk=trunk, stage=stage, init="random"))
    cells = model.find_cells(side)
    assert cells.stride == expected[0] and cells.offset == pytest.approx(expected[1], abs=0.05)


def test_a_dot_is_found_within_the_rounding_of_a_cell(model: WeakLocaliser) -> None:
    errors, naive = [], []
    cells = model.find_cells(SIDE)
    for dot in DOTS:
        with torch.no_grad():
            probability = model(draw_dot(dot)).maps[0, 0].sigmoid().numpy()
        shares = CellGrid(SIDE / probability.shape[-1])
        for found, grid in ((errors, cells), (naive, shares)):
            found.append(find_peaks(probability, float(probability.max()), grid)[0][0] - dot)
    assert np.abs(errors).max() <= cells.stride / 2 + 1e-3
    assert np.abs(naive).max() > cells.stride / 2 + 0.25


def test_fields_and_slides_have_the_dot_where_it_was_drawn(
    model: WeakLocaliser, tmp_path: Path
) -> None:
    """In level-0 px: the field is read at half its resolution."""
    dot, cells = DOTS[4], model.find_cells(SIDE)
    pixels = (draw_dot(dot)[0] * 255).byte()  # (3, SIDE, SIDE)
    large = pixels.permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
    Image.fromarray(large).save(tmp_path / "field.png")
    centre = np.array([dot]) * 2
    mitosis = (centre, np.array([MITOSIS]))
    field = AnnotatedField("f", tmp_path / "field.png", "case", "", 0.25, *mitosis)
    tiles = FieldTiles(PointSet((field,)), SIDE, 0.5)
    options = {"batch_size": 1, "precision": "fp32", "workers": 0, "label": ""}
    predictions = predict_tiles(model, tiles, World(0, 1, CPU), **options)
    (found,) = find_field_detections(tiles, predictions)
    geometry = TileGeometry("f", 2 * SIDE, 2 * SIDE, 0, SIDE, 0.5, 0.25, 0.0, 2 * SIDE, 2 * SIDE)
    coordinates = Coordinates(np.zeros((1, 2), np.int64), geometry)
    job = SlideJob("f", tmp_path / "field.png", coordinates, None)
    settings = ExtractSettings(CPU, "fp32", 1, 0)
    (on_slide,) = detect_candidates(model, 1.0, settings, pixels[None], [job])
    for points in (found.found / 0.25, on_slide.points):
        assert np.abs(points[0] - centre).max() <= cells.stride + 1e-3  # half a cell
    np.testing.assert_allclose(found.found[0] / 0.25, on_slide.points[0])
    assert (predictions.cells, tiles.labels.tolist()) == (cells, [1])
    hits, strays = count_hits(tiles, predictions, predictions.maps.max((1, 2)).astype(float))
    assert (hits.tolist(), strays.tolist()) == ([1], [0])


def test_looking_for_cells_draws_nothing_and_works_in_inference(model: WeakLocaliser) -> None:
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        assert model.find_cells(96).stride == model.find_cells(SIDE).stride
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_max_pool_of_unknown_padding_is_refused() -> None:
    class OneSided(torch.nn.MaxPool2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.nn.functional.pad(x, (0, 1, 0, 1)))

    with pytest.raises(UserError, match="expected max pools that pad alike .* found OneSided"):
        measure_cells(torch.nn.Sequential(OneSided(3, 2)), 64)
