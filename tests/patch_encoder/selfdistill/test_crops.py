"""Boxes and reflections: drawn as torchvision's RandomResizedCrop draws them, resized as Pillow and
torchvision resize.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from patch_encoder.selfdistill.crops import cut_one_by_one, cut_together
from patch_encoder.selfdistill.view_draws import draw_views
from patch_encoder.selfdistill.view_recipe import PRESETS, ViewKind
from tests.patch_encoder.selfdistill.view_fixture import draw_tiles

SIDE, COUNT = 256, 6000
BOXES = np.array([[0, 0, 100, 100], [10, 5, 40, 90], [50, 60, 50, 20], [7, 9, 13, 11]])
FLIPS = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]], bool)


def draw_boxes(kind: ViewKind, preset: str = "dino", side: int = SIDE) -> np.ndarray:
    indices = np.arange(COUNT)
    return draw_views(PRESETS[preset], [kind], [0], indices, side, seed=0).boxes


@pytest.mark.parametrize("kind", [PRESETS["dino"].global_kinds[0], PRESETS["dino"].local_kind])
def test_boxes_are_distributed_as_torchvisions(kind: ViewKind) -> None:
    """Heights, widths, areas, aspects and places by Kolmogorov and Smirnov's test."""
    boxes = draw_boxes(kind)
    torch.manual_seed(0)
    image = torch.empty(3, SIDE, SIDE)
    crop = transforms.RandomResizedCrop
    theirs = np.array([crop.get_params(image, kind.scale, (3 / 4, 4 / 3)) for _ in range(COUNT)])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= SIDE).all()
    for ours, reference in (
        *zip(boxes.T, theirs.T),
        (boxes[:, 2] * boxes[:, 3], theirs[:, 2] * theirs[:, 3]),
        (boxes[:, 3] / boxes[:, 2], theirs[:, 3] / theirs[:, 2]),
        (boxes[:, 0] + boxes[:, 2], theirs[:, 0] + theirs[:, 2]),
        (boxes[:, 1] + boxes[:, 3], theirs[:, 1] + theirs[:, 3]),
    ):
        assert stats.ks_2samp(ours, reference).pvalue > 0.005


def test_boxes_that_never_fit_become_the_whole_tile() -> None:
    boxes = draw_boxes(ViewKind(32, (1.0, 1.0), None, 0.0, 0.0), side=7)
    assert (boxes[:, 2:].min(0) >= 6).all()
    impossible = draw_boxes(ViewKind(32, (1.0, 1.0), 50, 0.0, 0.0), side=40)
    assert (impossible == [0, 0, 40, 40]).all()


@pytest.mark.parametrize("kind", [PRESETS["ect"].global_kinds[0], PRESETS["ect"].local_kind])
def test_ect_keeps_the_scale_of_the_field(kind: ViewKind) -> None:
    boxes = draw_boxes(kind, "ect", 392)
    area, aspect = boxes[:, 2] * boxes[:, 3] / kind.side**2, boxes[:, 3] / boxes[:, 2]
    assert 0.88 < area.min() < 0.91 and 1.09 < area.max() < 1.12 and abs(area.mean() - 1) < 0.01
    assert 0.93 < aspect.min() < 0.96 and 1.04 < aspect.max() < 1.07
    assert boxes[:, 0].min() == 0 and (boxes[:, 0] + boxes[:, 2]).max() == 392


@pytest.mark.parametrize("side", [96, 32])
def test_pixels_of_a_box_are_pillows_and_torchvisions(side: int) -> None:
    tiles = draw_tiles(4, 100)
    sources, size = np.array([2, 0, 3, 1]), [side, side]
    cut = cut_one_by_one(tiles, sources, BOXES, FLIPS, side)
    exact = cut_together(tiles, sources, BOXES, FLIPS, side)
    for number, (source, box) in enumerate(zip(sources, BOXES.tolist())):
        bicubic = {"size": size, "interpolation": InterpolationMode.BICUBIC}
        picture = TF.to_pil_image(tiles[source])
        pillow = TF.pil_to_tensor(TF.resized_crop(picture, *box, **bicubic)).float()
        ideal = TF.resized_crop(tiles[source].float(), *box, **bicubic, antialias=True)
        across, down, transposed = FLIPS[number]
        for dim, wanted in ((-1, across), (-2, down)):
            pillow, ideal = (part.flip(dim) if wanted else part for part in (pillow, ideal))
        pillow, ideal = (part.mT if transposed else part for part in (pillow, ideal))
        assert (cut[number] - pillow).abs().max() <= 2
        assert (cut[number] != pillow).float().mean() < 0.01
        assert torch.allclose(exact[number], ideal.clamp(0, 255), atol=2e-3)


def test_symmetries_come_in_the_presets_shares() -> None:
    """DINO flips left and right only; ECT also up and down; a slide has eight symmetries."""
    for preset, shares in (
        ("dino", (0.5, 0, 0)),
        ("ect", (0.5, 0.5, 0)),
        ("pathology", (0.5,) * 3),
    ):
        recipe = PRESETS[preset]
        draws = draw_views(recipe, [recipe.local_kind], [3], np.arange(COUNT), 392, seed=0)
        assert np.allclose(draws.flips.mean(0), shares, atol=0.02)
        assert (draws.flips.mean(0)[np.array(shares) == 0] == 0).all()
    codes, counts = np.unique(draws.flips @ [4, 2, 1], return_counts=True)
    assert len(codes) == 8 and np.allclose(counts / COUNT, 1 / 8, atol=0.02)
