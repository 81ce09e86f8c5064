"""What a recipe refuses, in one line each, and how the keys of a run change a preset."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from patch_encoder.selfdistill.view_keys import ShuffleKeys, ViewKeys
from patch_encoder.selfdistill.view_recipe import PRESETS, ViewRecipe, check_recipe
from patch_encoder.selfdistill.views import make_views
from wsi_common.config import group, load_config
from wsi_common.errors import UserError


@dataclass
class Config:
    """A script's keys of the views."""

    views: ViewKeys = group(ViewKeys, "views of a tile")
    shuffle: ShuffleKeys = group(ShuffleKeys, "patch shuffle")


def build(*arguments: str) -> ViewRecipe:
    config = load_config(Config, arguments)
    return config.views.build(config.shuffle)


def test_dino_is_dino() -> None:
    """The settings of main_dino.py, written out."""
    assert PRESETS["dino"] == ViewRecipe(
        global_size=224,
        local_size=96,
        local_number=8,
        global_scale=(0.4, 1.0),
        local_scale=(0.05, 0.4),
        scale_of_view=False,
        aspect=(3 / 4, 4 / 3),
        horizontal_flip=0.5,
        vertical_flip=0.0,
        transpose=0.0,
        hed=0.0,
        hed_probability=0.0,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_probability=0.8,
        grey_probability=0.2,
        global_blur=(1.0, 0.1),
        global_solarise=(0.0, 0.2),
        local_blur=0.5,
        blur_sigma=(0.1, 2.0),
        small_blur_sigma=2.0,
        shuffle_probability=0.0,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


@pytest.mark.parametrize(
    ("changes", "side", "patch", "message"),
    [
        ({"global_size": 100}, 256, 16, r"views.global_size=100: expected a positive multiple of"),
        ({"local_size": 98}, 256, 16, r"views.local_size=98: .*patch of 16 px"),
        ({"local_size": 0}, 256, 1, r"views.local_size=0"),
        ({"global_scale": (0.4, 1.2)}, 256, 1, r"views.global_scale=\[0.4,1.2\]: expected 0 < "),
        ({"local_scale": (0.4, 0.1)}, 256, 1, r"views.local_scale=\[0.4,0.1\]"),
        ({"local_scale": (0.0, 0.1)}, 256, 1, r"views.local_scale=\[0,0.1\]"),
        ({"local_number": -1}, 256, 1, r"views.local_number=-1: expected 0"),
        ({"shuffle_probability": 1.5}, 256, 1, r"shuffle.probability=1.5: expected 0 \(off\) to 1"),
        (
            {"shuffle_probability": 0.5, "shuffle_grid": 5},
            256,
            16,
            r"shuffle.grid=5: .*: one of 2, 7, 14$",
        ),
        ({"shuffle_probability": 0.5, "shuffle_grid": 4}, 256, 16, r"shuffle.grid=4: .*16 px"),
        ({"shuffle_probability": 0.5, "shuffle_grid": 1}, 256, 1, r"shuffle.grid=1"),
        (
            {"shuffle_probability": 0.5, "shuffle_grid": 7, "global_size": 64},
            128,
            8,
            r"one of 2, 4, 8$",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    changes: dict, side: int, patch: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_recipe(replace(PRESETS["dino"], **changes), side, patch)
    assert "\n" not in str(caught.value)


def test_ect_needs_a_field_that_holds_its_views() -> None:
    check_recipe(PRESETS["ect"], 392, 14)
    check_recipe(PRESETS["ect"], 241, 14)
    with pytest.raises(UserError, match=r"tiles of at least 241 px .* found 240; take larger"):
        check_recipe(PRESETS["ect"], 240, 14)


def test_what_fits_is_accepted() -> None:
    for preset in ("dino", "pathology"):
        recipe = replace(PRESETS[preset], shuffle_probability=0.5)
        for grid in (2, 7, 14):
            check_recipe(replace(recipe, shuffle_grid=grid), 256, 16)
        check_recipe(
            replace(recipe, local_number=0, shuffle_probability=0.0, shuffle_grid=5), 64, 8
        )


def test_keys_change_the_preset_and_leave_the_rest() -> None:
    assert build("views.preset=dino", "shuffle.probability=0") == PRESETS["dino"]
    assert build() == replace(PRESETS["pathology"], shuffle_probability=0.5, shuffle_grid=7)
    assert build(
        "views.preset=ect",
        "views.global_size=64",
        "views.local_size=32",
        "views.local_number=2",
        "views.global_scale=[0.8,1.2]",
        "views.local_scale=[0.7,1.3]",
        "shuffle.grid=4",
    ) == replace(
        PRESETS["ect"],
        global_size=64,
        local_size=32,
        local_number=2,
        global_scale=(0.8, 1.2),
        local_scale=(0.7, 1.3),
        shuffle_probability=0.5,
        shuffle_grid=4,
    )
    with pytest.raises(UserError, match=r"views.local_scale=\[0.1\]: expected two numbers"):
        build("views.local_scale=[0.1]")


def test_colour_and_blur_can_be_weakened_and_turned_off() -> None:
    half = build("views.colour=0.5", "views.blur=0.5")
    assert (half.jitter, half.hed) == ((0.1, 0.1, 0.05, 0.025), 0.025)
    assert (half.grey_probability, half.global_blur, half.local_blur) == (0.05, (0.5, 0.05), 0.25)
    none = build("views.colour=0", "views.blur=0")
    assert (*none.jitter, none.hed, none.grey_probability, *none.global_blur) == (0.0,) * 8
    with pytest.raises(UserError, match=r"views.blur=2: expected a share of the preset, 0 to 1"):
        build("views.blur=2")


def test_without_colour_and_blur_a_view_has_the_pixels_of_its_tile() -> None:
    recipe = build(
        "views.colour=0", "views.blur=0", "views.global_size=64", "shuffle.probability=0"
    )
    recipe = replace(recipe, global_scale=(1.0, 1.0), aspect=(1.0, 1.0))
    tiles = torch.arange(2 * 3 * 64 * 64).view(2, 3, 64, 64).remainder(251).to(torch.uint8)
    views = make_views(tiles, None, torch.arange(2), recipe, seed=1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
    for view in views.global_views:
        pixels = ((view * std + mean) * 255).round().to(torch.uint8)
        assert torch.equal(pixels.flatten(1).sort()[0], tiles.flatten(1).sort()[0])
