"""What happens to a tile before its encoder sees it: resize and crop in the workers, on bytes.

Every published processor of the table is one of three rules: the shorter side to `side` and a
centre crop of `crop` (torchvision, timm, open_clip, CLIP's and DINOv2's processors), both sides to
`side` (ViT's processors), or a crop only. Scaling to [0, 1] and mean/std are left to the device
(`PixelEncoder`), so that a tile travels as uint8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Fit:
    """How a tile becomes the encoder's input.

    Attributes:
        side: length in pixels that the shorter side is resized to (both sides when `squash`); None:
            no resizing.
        crop: side of the centre crop that follows; None: no crop.
        interpolation: bilinear, bicubic or lanczos, all with antialiasing (PIL's).
        squash: resize both sides, whatever the aspect ratio.
    """

    side: int | None
    crop: int | None = None
    interpolation: str = "bicubic"
    squash: bool = False

    def __call__(self, tile: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> uint8 (h, w, 3)."""
        height, width = self._compute_size(*tile.shape[:2])
        if (height, width) != tile.shape[:2]:
            tile = np.asarray(
                Image.fromarray(tile).resize((width, height), FILTERS[self.interpolation])
            )
        if self.crop is None:
            return tile
        # torchvision's rounding of an odd margin
        top, left = (round((length - self.crop) / 2.0) for length in (height, width))
        return tile[max(top, 0) : max(top, 0) + self.crop, max(left, 0) : max(left, 0) + self.crop]

    def _compute_size(self, height: int, width: int) -> tuple[int, int]:
        if self.side is None:
            return height, width
        if self.squash:
            return self.side, self.side
        shorter = min(height, width)
        return int(self.side * height / shorter), int(self.side * width / shorter)

    def whole(self) -> Fit:
        """The same without the crop: the whole tile, resized to what the crop would have left."""
        return replace(self, side=self.crop, crop=None, squash=True) if self.crop else self

    @property
    def size(self) -> int | None:
        """Side of the network's input in pixels; None: the tile's own."""
        return self.crop or self.side

    def __repr__(self) -> str:
        if self.side is None:
            return f"crop({self.crop})" if self.crop else "native size"
        cropped = f", crop({self.crop})" if self.crop not in (None, self.side) else ""
        return f"resize({self.side}, {self.interpolation}){cropped}"


class ToInputSize:
    """uint8 (H, W, 3) -> (3, h, w) by a `Fit`, or bicubic to a side; None keeps the size."""

    def __init__(self, fit: Fit | int | None) -> None:
        self.fit = fit if isinstance(fit, Fit) else Fit(fit, squash=True)

    def __call__(self, tile: np.ndarray) -> UInt8[Tensor, "3 h w"]:
        return torch.from_numpy(np.array(self.fit(tile))).permute(2, 0, 1).contiguous()

    def __repr__(self) -> str:
        return repr(self.fit)


class Describe:
    """uint8 (H, W, 3) -> float32 (D,): a classical descriptor, computed in the workers."""

    def __init__(self, descriptor: Callable[[np.ndarray], np.ndarray]) -> None:
        self.descriptor = descriptor

    def __call__(self, tile: np.ndarray) -> Float[Tensor, " d"]:
        return torch.from_numpy(self.descriptor(tile))

    def __repr__(self) -> str:
        return self.descriptor.__name__
