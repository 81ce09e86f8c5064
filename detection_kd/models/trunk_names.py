"""The ResNet trunk of any detector under the names that `Backbone` has, which are torchvision's and
timm's.

Known are the names of torchvision's detectors, MMDetection, Lightning modules and other wrappers
(any prefix), detectron2, and Hugging Face's ResNet and RT-DETR (whose stem has three convolutions:
timm's `resnet50d`). A trunk that was trained on other pixels than ImageNet-normalised RGB gets a
first convolution that takes those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from patch_encoder.models.encoder_table import IMAGENET
from wsi_common.errors import UserError

# what the name of one parameter of every trunk looks like: all before it is the prefix of the trunk
ANCHORS = (
    r"layer3\.0\.conv1\.weight$",  # torchvision, timm, MMDetection
    r"res4\.0\.conv1\.weight$",  # detectron2
    r"encoder\.stages\.2\.layers\.0\.layer\.0\.convolution\.weight$",  # Hugging Face
)
DETECTRON2 = (
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.conv1\.", "conv1."),
    (r"^res(\d)\.", lambda found: f"layer{int(found[1]) - 1}."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
)
HUGGINGFACE = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^embedder\.embedder\.2\.normalization\.", "bn1."),
    (r"^embedder\.embedder\.(\d)\.convolution\.", lambda found: f"conv1.{3 * int(found[1])}."),
    (r"^embedder\.embedder\.(\d)\.normalization\.", lambda f: f"conv1.{3 * int(f[1]) + 1}."),
    (r"^encoder\.stages\.(\d)\.layers\.", lambda found: f"layer{int(found[1]) + 1}."),
    (r"\.layer\.(\d)\.convolution\.", lambda found: f".conv{int(found[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda found: f".bn{int(found[1]) + 1}."),
    (r"\.shortcut\.1\.convolution\.", ".downsample.1."),  # after a pooling
    (r"\.shortcut\.1\.normalization\.", ".downsample.2."),
)
PLAIN_SHORTCUT = (
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)
DEEP_SHORTCUT = (  # of timm's "d" models, where the pooling is a layer
    (r"\.shortcut\.convolution\.", ".downsample.1."),
    (r"\.shortcut\.normalization\.", ".downsample.2."),
)


def find_trunk(weights: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The trunk's weights under our names, None where there is no ResNet among the weights.

    Raises:
        UserError: several trunks, as of a teacher and a student.
    """
    anchors = [
        (name[: found.start()], number)
        for name in weights
        for number, anchor in enumerate(ANCHORS)
        if (found := re.search(r"(?:^|(?<=\.))" + anchor, name))
    ]
    if not anchors:
        return None
    if len(anchors) > 1:
        raise UserError(
            f"expected the weights of one trunk, found {len(anchors)}, below "
            f"{', '.join(repr(prefix) for prefix, _ in anchors)}; save one of them alone"
        )
    ((prefix, number),) = anchors
    own = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }
    own = {
        name: value for name, value in own.items() if not re.match(r"(fc|head|classifier)\.", name)
    }
    if number == 1:
        return take_detectron2_pixels(rename(own, DETECTRON2), weights)
    if number == 2:
        deep = "embedder.embedder.0.convolution.weight" in own
        renamed = rename(own, (*HUGGINGFACE, *(DEEP_SHORTCUT if deep else PLAIN_SHORTCUT)))
        # RT-DETR takes pixels in 0..1 as they are
        return take_pixels(renamed, *IMAGENET[::-1]) if deep else renamed
    return own


def rename(weights: Mapping[str, Tensor], rules: Any) -> dict[str, Tensor]:
    """Weights under the names that the rules (pattern, replacement) give, one after the other."""
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def take_detectron2_pixels(
    trunk: dict[str, Tensor], weights: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A trunk of detectron2, whose file says which pixels it takes: (0..255 - pixel_mean) /
    pixel_std, blue first where its mean is the lowest.
    """
    if "pixel_mean" not in weights:
        return trunk
    mean, std = (weights[f"pixel_{kind}"].flatten().float() for kind in ("mean", "std"))
    first = "conv1.weight"
    if mean[0] < mean[2]:
        trunk = trunk | {first: trunk[first].flip(1)}
        mean, std = mean.flip(0), std.flip(0)
    own_mean, own_std = (torch.tensor(values) for values in IMAGENET)
    return take_pixels(trunk, 255 * own_std / std, (255 * own_mean - mean) / std)


def take_pixels(trunk: dict[str, Tensor], factor: Any, offset: Any) -> dict[str, Tensor]:
    """A trunk of pixels `factor` * x + `offset` per channel, as one of ImageNet-normalised pixels
    x: the factor goes into the first convolution, the offset into the mean of the norm behind it.
    """
    deep = "conv1.0.weight" in trunk
    first, norm = ("conv1.0.weight", "conv1.1") if deep else ("conv1.weight", "bn1")
    factor, offset = (torch.as_tensor(values).view(1, 3, 1, 1) for values in (factor, offset))
    kernel = trunk[first]
    shift = (kernel * offset).sum((1, 2, 3))
    return trunk | {
        first: kernel * factor,
        f"{norm}.running_mean": trunk[f"{norm}.running_mean"] - shift,
    }
