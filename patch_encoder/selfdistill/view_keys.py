"""The configuration keys of the views: a preset, and what a run may change in it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from patch_encoder.selfdistill.view_recipe import PRESETS, ViewRecipe
from wsi_common.config import key
from wsi_common.errors import UserError


@dataclass
class ShuffleKeys:
    """INTELLIGENS's patch shuffle; the teacher sees the same views whole."""

    probability: float = key(
        0.5, "probability that the student's copy of a global view is shuffled; 0: off, as DINO"
    )
    grid: int = key(
        7, "squares per side of a shuffled view; a square holds whole patches of the network"
    )


@dataclass
class ViewKeys:
    """The views of a tile; None keeps what the preset says."""

    preset: str = key(
        "pathology", "colours, symmetries and boxes of the views", choices=list(PRESETS)
    )
    global_size: int | None = key(None, "side of the two global views, px")
    local_size: int | None = key(None, "side of the local views, px")
    local_number: int | None = key(None, "local views per tile; 0: none")
    global_scale: list[float] | None = key(
        None, "smallest and largest area of a global view's box, as a share of the tile"
    )
    local_scale: list[float] | None = key(
        None, "smallest and largest area of a local view's box, as a share of the tile"
    )
    colour: float = key(
        1.0,
        "strength of stain and colour jitter, share of grey views; 1: as the preset, 0: none",
    )
    blur: float = key(1.0, "share of blurred views; 1: as the preset, 0: none")

    def build(self, shuffle: ShuffleKeys) -> ViewRecipe:
        """The preset with these changes.

        Raises:
            UserError: a scale is not a pair, a share is not one.
        """
        for name, share in (("colour", self.colour), ("blur", self.blur)):
            if not 0 <= share <= 1:
                raise UserError(f"views.{name}={share:g}: expected a share of the preset, 0 to 1")
        preset = PRESETS[self.preset]
        sizes = {
            name: value
            for name in ("global_size", "local_size", "local_number")
            if (value := getattr(self, name)) is not None
        }
        scales = {
            name: _read_pair(name, value)
            for name in ("global_scale", "local_scale")
            if (value := getattr(self, name)) is not None
        }
        return replace(
            preset.weaken(self.colour, self.blur),
            **sizes,
            **scales,
            shuffle_probability=shuffle.probability,
            shuffle_grid=shuffle.grid,
        )


def _read_pair(name: str, value: list[float]) -> tuple[float, float]:
    if len(value) != 2:
        raise UserError(
            f"views.{name}={value}: expected two numbers, the smallest and the largest area"
        )
    return value[0], value[1]
