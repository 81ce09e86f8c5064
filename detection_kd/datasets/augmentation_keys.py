"""The configuration keys of augmentation: the sizes that the detector is trained at, and what
D2VFM adds to flips, turns and `scales`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detection_kd.datasets.tile_augmentation import TileAugmentation
from patch_encoder.stain.augment import HedJitter
from wsi_common.config import key
from wsi_common.errors import UserError

LEAST_SIDE = 32  # px


@dataclass
class DetectionSizes:
    """The sizes of the detector's published augmentation."""

    sizes: list[int] = key(list(range(480, 801, 32)), "short sides to choose from, px")
    max_size: int = key(1333, "most px of the long side")
    crop_sizes: list[int] = key(
        [400, 500, 600], "short sides before a random crop, px; [] never crops"
    )
    crop_range: list[int] = key([384, 600], "smallest and largest side of a crop, px")
    symmetry: bool = key(False, "also flip upside down and rotate by 90 degrees")
    stain: float = key(
        0.0, "scale and shift the stains' densities by up to this, 0.05 is mild; 0: off"
    )
    eval_size: int = key(800, "short side in evaluation, px")
    pad_to: int = key(
        0, "pad batches to at least this side, px; 0: to the largest image of the batch"
    )


@dataclass
class AugmentationKeys:
    """What `augment` adds to flips and turns; published: crop=true sizes=[480,512,...,800]."""

    sizes: list[int] = key(
        [], "a step's tiles are resized to one of these sides, drawn at random, px; empty: scales"
    )
    crop: bool = key(
        False,
        "cut half of the tiles at random, as Deformable DETR, and bring them back to their size",
    )
    stain: float = key(
        0.0, "scale and shift the stains' densities by up to this, 0.05 is mild; 0: off"
    )
    colour: float = key(0.0, "scale brightness, contrast and saturation by 1 -+ this; 0: off")
    blur: float = key(0.0, "blur half of the tiles with a sigma of up to this, px; 0: off")

    def of_tiles(self) -> TileAugmentation:
        """What happens to single tiles, in the workers; `sizes` are for the training loop."""
        stain = HedJitter(self.stain, self.stain) if self.stain else None
        return TileAugmentation(self.crop, stain, self.colour, self.blur)

    def check(
        self, augment: bool, scales: Sequence[float], cache: bool, online_teacher: str
    ) -> None:
        """Refuse keys that contradict each other or would do nothing.

        Raises:
            UserError: one of them.
        """
        if cache and (augment or list(scales) != [1.0] or self.sizes or online_teacher):
            raise UserError(
                "cache=true: expected augment=false, scales=[1.0], no augmentation.sizes and no "
                "online_teacher, since cached "
                "features cannot be augmented"
            )
        if not scales or not all(0 < scale <= 4 for scale in scales):
            raise UserError(f"scales={list(scales)}: expected factors above 0, at most 4")
        if self.sizes and (list(scales) != [1.0] or min(self.sizes) < LEAST_SIDE):
            raise UserError(
                f"augmentation.sizes={self.sizes}: expected sides of at least {LEAST_SIDE} px, "
                "and scales=[1.0] with them"
            )
        if not (0 <= self.stain < 1 and 0 <= self.colour <= 1 and 0 <= self.blur <= 10):
            raise UserError(
                "augmentation: expected 0 <= stain < 1, 0 <= colour <= 1, 0 <= blur <= 10, found "
                f"{self.stain:g}, "
                f"{self.colour:g}, {self.blur:g}"
            )
        if not augment and (self.crop or self.stain or self.colour or self.blur):
            raise UserError(
                "augmentation.crop, stain, colour, blur: expected augment=true with them, found "
                "augment=false"
            )
