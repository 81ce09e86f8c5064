"""The atypical-figure head: is a mitotic figure that was found typical or atypical?

A small classifier on the trunk of the localiser: mean and maximum of its features over the middle
half of a crop, and a linear layer. Task: MIDOG 2025, track 2; labels: AMi-Br (Bertram et al., BVM
2025). A crop covers the 32 um around a figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from detection_kd.models.cam import WeakLocaliser
from patch_encoder.slides import Slide
from patch_encoder.tiles.grid import make_tile_geometry, read_tile
from wsi_common.checkpoint import load_checkpoint_of, load_weights

KIND = "atypical_head"
COVERED = 32.0
"""Side of a crop, um."""
CLASSES = ("typical", "atypical")


class CropFeatures(nn.Module):
    """Features of crops: (B, 3, S, S) uint8 -> (B, 2 C), the mean and the maximum over the middle
    half of a localiser's map of C features.
    """

    def __init__(self, localiser: WeakLocaliser) -> None:
        super().__init__()
        self.localiser = localiser
        self.dim = 2 * int(localiser.trunk.channels)

    def forward(self, pixels: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        """Pooled features."""
        maps = self.localiser.features(pixels.float() / 255)
        rows, columns = (slice(size // 4, size - size // 4) for size in maps.shape[-2:])
        middle = maps[..., rows, columns].flatten(2)  # (B, C, cells)
        return torch.cat([middle.mean(-1), middle.amax(-1)], dim=1).float()


class AtypicalHead(nn.Module):
    """Logits of `CLASSES` for crops.

    Args:
        features: the trunk and its pooling.
        head: from its features to two logits.
        mpp: um per px of the crops.
    """

    def __init__(self, features: CropFeatures, head: nn.Linear, mpp: float) -> None:
        super().__init__()
        self.features, self.head, self.mpp = features, head, mpp
        self.side = count_pixels(mpp)

    def forward(self, pixels: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b 2"]:
        """Logits (B, 2)."""
        return self.head(self.features(pixels)).float()

    def describe(self) -> dict[str, Any]:
        """What it takes to build this network again, for a checkpoint's `config`."""
        return {"kind": KIND, "mpp": self.mpp, "localiser": self.features.localiser.describe()}


def count_pixels(mpp: float) -> int:
    """Side of a crop at `mpp` um per px, px."""
    return round(COVERED / mpp)


def load_atypical(path: str | Path) -> AtypicalHead:
    """A trained head from its checkpoint alone, in evaluation mode.

    Raises:
        UserError: the file is no checkpoint of `train_atypical`.
    """
    content = load_checkpoint_of(path, KIND, "an atypical-figure head", "train_atypical")
    described = content["config"]
    features = CropFeatures(WeakLocaliser.from_description(described["localiser"]))
    model = AtypicalHead(features, nn.Linear(features.dim, len(CLASSES)), described["mpp"])
    load_weights(model, content["model"], str(path))
    return model.eval()


@torch.no_grad()
def score_crops(
    model: AtypicalHead, crops: UInt8[np.ndarray, "n s s 3"], batch_size: int = 64
) -> Float[np.ndarray, " n"]:
    """Probability that each figure is atypical, (N,), the mean over the eight symmetries.

    Args:
        model: in evaluation mode; crops go to its device.
        crops: of `model.side` px at `model.mpp`, figures in the middle.
        batch_size: crops per step.
    """
    device, scores = model.head.weight.device, [np.zeros(0)]
    for start in range(0, len(crops), batch_size):
        pixels = torch.from_numpy(np.ascontiguousarray(crops[start : start + batch_size]))
        pixels = pixels.to(device).permute(0, 3, 1, 2)
        views = [
            torch.rot90(p, turn, (2, 3)) for p in (pixels, pixels.flip(3)) for turn in range(4)
        ]
        found = torch.stack([model(view).softmax(1)[:, 1] for view in views]).mean(0)
        scores.append(found.double().cpu().numpy())
    return np.concatenate(scores)


def read_crops(
    slide: Slide, points: Sequence[tuple[float, float]], model: AtypicalHead
) -> UInt8[np.ndarray, "n s s 3"]:
    """The crops (N, S, S, 3) around points (x, y), px of level 0, as `score_crops` takes them.

    Raises:
        UserError: the slide's resolution is unknown or too coarse.
    """
    geometry = make_tile_geometry(slide, model.side, model.mpp)
    half = geometry.patch_size_level0 / 2
    crops = [read_tile(slide, geometry, round(x - half), round(y - half)) for x, y in points]
    return np.array(crops, np.uint8).reshape(-1, model.side, model.side, 3)


def resize_crop(crop: UInt8[np.ndarray, "h w 3"], mpp: float) -> UInt8[Tensor, "3 s s"]:
    """A published crop of `COVERED` um at another resolution, resampled as tiles of slides are."""
    side = count_pixels(mpp)
    small = Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()
