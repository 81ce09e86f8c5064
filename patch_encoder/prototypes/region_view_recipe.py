"""How the views of a region are drawn: the settings, and their configuration keys.

HIPT's region views, which SLPD keeps, are crops of 14 x 14 and 6 x 6 out of 16 x 16 tiles, mirrored
left-right with probability 1/2: 18 different global views of a region and 242 local ones. The other
symmetries and the dropout of tiles and channels are additions, off by default.
"""

from __future__ import annotations

from dataclasses import dataclass

from wsi_common.config import key
from wsi_common.errors import UserError

# how many of the eight symmetries are drawn from, in the order of `symmetry_maps`
SYMMETRIES = {"none": 1, "mirror": 2, "eight": 8}


@dataclass(frozen=True)
class RegionViewRecipe:
    """All settings of the views.

    Attributes:
        global_side, local_side: sides of the views, in tiles.
        local_number: local views per region; there are always two global ones.
        symmetries: one of SYMMETRIES.
        tile_dropout: probability that a tile of a view is masked; one tile always stays.
        channel_dropout: probability that a feature channel is zero in all tiles of a view; the
            others grow by 1 / (1 - probability).
    """

    global_side: int = 14
    local_side: int = 6
    local_number: int = 8
    symmetries: str = "mirror"
    tile_dropout: float = 0.0
    channel_dropout: float = 0.0


@dataclass
class RegionViewKeys:
    """The views of a region."""

    global_side: int | None = key(
        None, "side of the two global views, tiles; default: 14/16 of the region's"
    )
    local_side: int | None = key(None, "side of the local views, tiles; default: 6/16")
    local_number: int = key(8, "local views per region; 0: none", least=0)
    symmetries: str = key(
        "mirror",
        "symmetries that views are drawn from; mirror: left-right, as HIPT",
        choices=list(SYMMETRIES),
    )
    tile_dropout: float = key(0.0, "probability that a tile of a view is masked")
    channel_dropout: float = key(
        0.0, "probability that a feature channel is zero in all tiles of a view"
    )

    def build(self, region_tiles: int) -> RegionViewRecipe:
        """The settings for regions of so many tiles per side.

        Raises:
            UserError: views that are larger than a region, or a probability outside [0, 1).
        """
        recipe = RegionViewRecipe(
            _default(self.global_side, region_tiles * 14 / 16),
            _default(self.local_side, region_tiles * 6 / 16),
            self.local_number,
            self.symmetries,
            self.tile_dropout,
            self.channel_dropout,
        )
        for name in ("global_side", "local_side"):
            if not 1 <= getattr(recipe, name) <= region_tiles:
                raise UserError(
                    f"views.{name}={getattr(recipe, name)}: expected 1 to {region_tiles} tiles, "
                    "the side of a region"
                )
        for name in ("tile_dropout", "channel_dropout"):
            if not 0 <= getattr(recipe, name) < 1:
                raise UserError(
                    f"views.{name}={getattr(recipe, name):g}: expected 0 (off) to below 1"
                )
        return recipe


def _default(side: int | None, share: float) -> int:
    return max(1, round(share)) if side is None else side
