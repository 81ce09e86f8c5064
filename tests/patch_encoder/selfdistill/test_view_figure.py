"""The figure shows what the network sees, back in colours that people can look at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from patch_encoder.selfdistill.view_figure import draw_view_figure
from patch_encoder.selfdistill.view_recipe import PRESETS
from patch_encoder.selfdistill.views import make_views
from tests.patch_encoder.selfdistill.view_fixture import COLOURS_OFF, draw_tiles
from wsi_common.figures import save_figure

SMALL = {"global_size": 64, "local_size": 32, "local_number": 2, "shuffle_grid": 2}


@pytest.mark.parametrize("wide", [True, False])
def test_columns_are_the_views_of_their_tile(wide: bool, tmp_path: Path) -> None:
    tiles, indices = draw_tiles(2, 96), torch.tensor([4, 9])
    context = draw_tiles(2, 96, seed=1) if wide else None
    recipe = replace(PRESETS["dino"], **SMALL, shuffle_probability=1.0 if wide else 0.0)
    figure = draw_view_figure(tiles, context, indices, recipe, seed=0)
    axes = np.array(figure.axes).reshape(2, -1)
    extra = ["student's copy 1", "student's copy 2", "context image", "pyramid view"]
    titles = ["tile and boxes", "global 1", "global 2", *(extra if wide else [])]
    assert [a.get_title().split("\n")[0] for a in axes[0]] == [*titles, "local 1", "local 2"]

    views = make_views(tiles, context, indices, recipe, seed=0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
    for column, shown in ((0, tiles), (2, views.global_views[1]), (-1, views.local_views[1])):
        pixels = shown if column == 0 else (shown * std + mean) * 255
        for row in range(2):
            found = axes[row, column].images[0].get_array()
            assert np.abs(found - pixels[row].permute(1, 2, 0).numpy()).max() <= 0.51
    assert save_figure(figure, tmp_path / "views.png").stat().st_size > 10_000


def test_boxes_are_where_the_views_come_from() -> None:
    """Views without changes of colour are the resized boxes of a tile that names its places."""
    ramp = torch.arange(128, dtype=torch.uint8)
    tile = torch.stack(
        [ramp.expand(128, 128), ramp[:, None].expand(128, 128), ramp.expand(128, 128)]
    )
    recipe = replace(PRESETS["dino"], **SMALL, **COLOURS_OFF)
    indices = torch.tensor([3])
    views = make_views(tile[None], None, indices, recipe, seed=0)
    patches = draw_view_figure(tile[None], None, indices, recipe, seed=0).axes[0].patches
    shown = [*views.global_views, *views.local_views]
    for patch, view in zip(patches, shown, strict=True):
        pixels = view[0] * 255
        for channel, start, length in (
            (0, patch.get_x(), patch.get_width()), (1, patch.get_y(), patch.get_height()),
        ):  # fmt: skip
            assert abs(float(pixels[channel].min()) - (start + 0.5)) <= 2
            assert abs(float(pixels[channel].max()) - (start + length - 0.5)) <= 2
