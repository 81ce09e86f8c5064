"""The pixels of graded patches at the teacher's resolution: kept in memory where they fit, else
read when they are asked for.

AT+ keeps every patch as float32, 38 GB for the 12,081 labelled ones of SICAPv2; bytes take a
quarter, and a set above KEPT_BYTES none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from detection_kd.graded_patches.graded_set import GradedPatch, GradedSet
from patch_encoder.probing.pictures import read_picture
from patch_encoder.slides import open_slide
from patch_encoder.tiles.coordinates import TileGeometry
from patch_encoder.tiles.grid import make_tile_geometry, read_tile
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes
from wsi_common.progress import progress

KEPT_BYTES = 2 * 2**30
CHUNK = 256  # patches from one line of progress to the next


class PatchPixels:
    """Square patches of `side` px.

    Attributes:
        patches: what is read.
        side: px. Larger pictures are reduced to it by averaging; smaller ones are refused.
    """

    def __init__(self, patches: GradedSet, side: int) -> None:
        """Check that the files are there, and read all of them where they fit into memory.

        Raises:
            UserError: a file that is not there or no picture, a picture that is not square or
                smaller than `side`, a place that is not on its slide.
        """
        self.patches, self.side = patches, side
        files = dict.fromkeys(patch.path for patch in patches.patches)
        absent = [path for path in files if not path.exists()]
        if absent:
            raise UserError(
                f"{absent[0]}: expected the file of a graded patch, found nothing there "
                f"({len(absent)} of {len(files)} files are missing)"
            )
        self._kept: UInt8[np.ndarray, "n s s 3"] | None = None
        if len(patches) * side * side * 3 <= KEPT_BYTES:
            starts = range(0, len(patches), CHUNK)
            parts = [
                self._load(range(start, min(start + CHUNK, len(patches))))
                for start in progress(starts, "read patches", len(starts), "chunks")
            ]
            self._kept = np.concatenate(parts)

    @property
    def in_memory(self) -> bool:
        """Whether reading takes no time, so that workers would not help."""
        return self._kept is not None

    def digest(self) -> str:
        """Of what decides a training: side, grades, and of every patch its name, label, slide,
        case and place, and its pixels; of pixels that are not in memory the size of the file.
        """
        sizes = {path: path.stat().st_size for path in {p.path for p in self.patches.patches}}
        lines = [repr((self.side, self.patches.grades, self.patches.mpp))]
        lines += [
            repr((p.path.name, p.label, p.slide, p.case, p.position, sizes[p.path]))
            for p in self.patches.patches
        ]
        kept = [] if self._kept is None else [memoryview(self._kept)]
        return sha256_bytes("\n".join(lines).encode(), *kept)

    def read(self, numbers: Int64[np.ndarray, " b"]) -> UInt8[Tensor, "b 3 s s"]:
        """The pixels of these patches.

        Raises:
            UserError: as for the constructor.
        """
        found = self._load(numbers.tolist()) if self._kept is None else self._kept[numbers]
        return torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()

    def _load(self, numbers: Sequence[int]) -> UInt8[np.ndarray, "b s s 3"]:
        chosen = [self.patches.patches[number] for number in numbers]
        if self.patches.mpp is None:
            read = [reduce_picture(patch, self.side) for patch in chosen]
            return np.stack(read)
        pixels = np.empty((len(chosen), self.side, self.side, 3), np.uint8)
        for path in dict.fromkeys(patch.path for patch in chosen):
            with open_slide(path) as slide:
                geometry = make_tile_geometry(slide, self.side, self.patches.mpp)
                for row, patch in enumerate(chosen):
                    if patch.path == path:
                        pixels[row] = read_tile(slide, geometry, *_find_corner(patch, geometry))
        return pixels


def _find_corner(patch: GradedPatch, geometry: TileGeometry) -> tuple[int, int]:
    """The corner of a patch of a slide; beyond the slide, it would be read as glass."""
    assert patch.position is not None
    size = geometry.level0_width, geometry.level0_height
    if not all(0 <= place < length for place, length in zip(patch.position, size, strict=True)):
        raise UserError(
            "{}: expected the corners of patches on the slide, {} x {} level-0 px, found x={}, "
            "y={}; mend its row or remove it".format(patch.path, *size, *patch.position)
        )
    return patch.position


def reduce_picture(patch: GradedPatch, side: int) -> UInt8[np.ndarray, "s s 3"]:
    """The picture of a patch at `side` px, each pixel the mean of the area that it covers.

    Raises:
        UserError: it cannot be read, is not square, or is smaller.
    """
    pixels = read_picture(patch.path)
    height, width = pixels.shape[:2]
    if height != width or height < side:
        raise UserError(
            f"{patch.path}: expected a square picture of at least {side} px a side, found "
            f"{width} x {height}; set a smaller side or remove the picture"
        )
    if height == side:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX))
