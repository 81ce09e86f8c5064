"""Image and box transforms of detector training and evaluation.

Source: DETR and Deformable DETR, `datasets/coco.py`: horizontal flip; a random short side, or first
a random crop. Differences: sizes are arguments; `symmetry` adds the other flips and rotations by 90
degrees, because a slide has no up or down; pixels stay bytes, a batch is normalised on its device.
On torchvision's transforms v2, which move boxes with their image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from patch_encoder.stain.augment import HedJitter


class Transpose(v2.Transform):
    """Swap x and y; with both flips it makes all eight symmetries of the square."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """An image (C, H, W) -> (C, W, H); xyxy boxes -> yxyx on the swapped canvas."""
        if isinstance(inpt, tv_tensors.Image):
            return tv_tensors.Image(inpt.as_subclass(torch.Tensor).mT)
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            swapped = inpt.as_subclass(torch.Tensor)[:, [1, 0, 3, 2]]
            height, width = inpt.canvas_size
            return tv_tensors.BoundingBoxes(
                swapped, format=inpt.format, canvas_size=(width, height)
            )
        return inpt


class RandomSizeCrop(v2.Transform):
    """Cut a random rectangle whose sides lie between `low` and `high` px, or the image where it is
    smaller.
    """

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Position and size of the rectangle, px."""
        height, width = v2.functional.get_size(flat_inputs[0])
        crop_height, crop_width = (self._side(side) for side in (height, width))
        top, left = (
            _randint(0, side - crop) for side, crop in ((height, crop_height), (width, crop_width))
        )
        return {"top": top, "left": left, "height": crop_height, "width": crop_width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut image and boxes."""
        return self._call_kernel(v2.functional.crop, inpt, **params)

    def _side(self, side: int) -> int:
        return _randint(min(self.low, side), min(self.high, side))


class JitterStain(v2.Transform):
    """Make haematoxylin, eosin and DAB of an image a little stronger or weaker (`HedJitter`).

    Args:
        strength: factors are 1 -+ strength, shifts -+ strength in optical density.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.jitter = HedJitter(strength, strength)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """A seed, drawn from the generator that all transforms of a sample draw from."""
        return {"seed": int(torch.randint(2**62, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Jitter images; boxes stay."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        generator = torch.Generator().manual_seed(params["seed"])
        return tv_tensors.Image(self.jitter(inpt.as_subclass(torch.Tensor), generator))


def _randint(low: int, high: int) -> int:
    """A random integer in [low, high]."""
    return int(torch.randint(low, high + 1, ()))


def make_train_transform(
    sizes: Sequence[int],
    max_size: int,
    *,
    crop_sizes: Sequence[int] = (),
    crop_range: tuple[int, int] = (384, 600),
    symmetry: bool = False,
    stain: float = 0.0,
) -> v2.Compose:
    """Published augmentation.

    Args:
        sizes: short sides to choose from, px.
        max_size: the most a long side may have, px.
        crop_sizes: short sides before the crop, px; empty: never crop.
        crop_range: smallest and largest side of the crop, px.
        symmetry: also flip upside down and rotate by 90 degrees.
        stain: strength of `JitterStain`; 0: off.
    """
    steps: list[v2.Transform] = [v2.RandomHorizontalFlip()]
    if symmetry:
        steps += [v2.RandomVerticalFlip(), v2.RandomApply([Transpose()], p=0.5)]
    resize = v2.RandomShortestSize(list(sizes), max_size)
    if crop_sizes:
        crop = v2.Compose(
            [v2.RandomShortestSize(list(crop_sizes)), RandomSizeCrop(*crop_range), resize]
        )
        steps.append(v2.RandomChoice([resize, crop]))
    else:
        steps.append(resize)
    if stain:
        steps.append(JitterStain(stain))
    return v2.Compose([*steps, *_finish()])


def make_eval_transform(size: int, max_size: int) -> v2.Compose:
    """Fixed short side; annotations are not needed."""
    return v2.Compose([v2.RandomShortestSize([size], max_size), *_finish()])


def _finish() -> list[v2.Transform]:
    """Boxes inside the image and with an area."""
    return [
        v2.ClampBoundingBoxes(),
        v2.SanitizeBoundingBoxes(min_size=1, labels_getter=lambda sample: sample[1]["labels"]),
    ]
