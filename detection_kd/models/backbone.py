"""ResNet trunk of the detector, rebuilt from its checkpoint alone by the stages that distil from it.

Source: He et al., CVPR 2016, on torchvision's definition; frozen statistics and frozen stem as in DETR and Deformable DETR.
Differences: 18 and 34 layers beside 50; trainable batch or group norm for training without ImageNet weights; the forward
pass stops at the stage that is asked for.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from common.checkpoint import load_checkpoint, load_tensors, load_weights
from common.errors import UserError, did_you_mean

DEPTHS = {
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
}
NORMS = {
    "frozen": FrozenBatchNorm2d,  # statistics and affine parameters of the pretrained weights, as published
    "batch": nn.BatchNorm2d,
    "group": partial(nn.GroupNorm, 32),  # the same in training and evaluation, whatever the batch
}
PREFIXES = ("backbone.0.body.", "backbone.")  # published detectors, ours


class Backbone(nn.Module):
    """ResNet without its classifier.

    Args:
        name: a key of `DEPTHS`.
        norm: a key of `NORMS`.

    Attributes:
        channels: channels of layer2, layer3 and layer4 (strides 8, 16, 32 px); their index is the "needle" of D2VFM.
    """

    def __init__(self, name: str, norm: str) -> None:
        super().__init__()
        for choice, valid in ((name, DEPTHS), (norm, NORMS)):
            if choice not in valid:
                raise UserError(f"backbone '{choice}': expected one of {', '.join(valid)}; {did_you_mean(choice, valid)}")
        trunk = DEPTHS[name](weights=None, norm_layer=NORMS[norm])
        self.name, self.norm = name, norm
        self.conv1, self.bn1 = trunk.conv1, trunk.bn1
        self.layer1, self.layer2, self.layer3, self.layer4 = trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4
        self.channels: tuple[int, int, int] = (512, 1024, 2048) if name == "resnet50" else (128, 256, 512)

    def forward(self, images: Float[Tensor, "b 3 h w"], upto: int = 2) -> list[Float[Tensor, "b _c _h _w"]]:
        """Maps of layer2 ... layer4, no further than stage `upto` (0, 1 or 2).

        Args:
            images: normalised with ImageNet's mean and standard deviation.
            upto: last stage to compute.
        """
        x = self.bn1(self.conv1(images)).relu()
        x = self.layer1(nn.functional.max_pool2d(x, kernel_size=3, stride=2, padding=1))
        maps = []
        for stage in (self.layer2, self.layer3, self.layer4)[: upto + 1]:
            x = stage(x)
            maps.append(x)
        return maps

    def freeze_stem(self) -> None:
        """Keep the first convolution and layer1 as they are, as published for ImageNet weights."""
        for part in (self.conv1, self.bn1, self.layer1):
            part.requires_grad_(False)

    def describe(self) -> dict[str, str]:
        """What it takes to build this trunk again, for a checkpoint's `config`."""
        return {"kind": "backbone", "name": self.name, "norm": self.norm}


def load_backbone(path: str | Path) -> tuple[Backbone, dict[str, Any]]:
    """The trained trunk of a detector, for use as a fixed feature extractor.

    A trunk trained with batch norm comes back with the statistics frozen (norm "frozen"): the same function as in
    evaluation mode, which a later `train()` cannot undo.

    Args:
        path: `backbone.pt` or a whole checkpoint of `train_detector`, or a file of ResNet weights alone.

    Returns:
        The trunk, and its description (`name`, `norm`).

    Raises:
        UserError: the file holds no such trunk.
    """
    content = load_tensors(path, "a detector's backbone")
    weights = trunk_weights(content)
    described = _description(content, weights, path)
    norm = "group" if described["norm"] == "group" else "frozen"
    backbone = Backbone(described["name"], norm)
    fill(backbone, weights, str(path))
    return backbone, backbone.describe()


def _description(content: Any, weights: dict[str, Tensor], path: str | Path) -> dict[str, Any]:
    if "config" in content:
        config = load_checkpoint(path, "a detector's backbone")["config"]
        config = config.get("backbone", config)
        if config.get("name") in DEPTHS and config.get("norm") in NORMS:
            return config
    if "layer3.0.conv1.weight" not in weights:
        raise UserError(f"{path}: expected a ResNet trunk (backbone.pt or a detector checkpoint), found {sorted(weights)[:3]}")
    blocks = sum(name.startswith("layer3.") and name.endswith(".conv1.weight") for name in weights)
    name = "resnet50" if "layer3.0.conv3.weight" in weights else {2: "resnet18"}.get(blocks, "resnet34")
    return {"name": name, "norm": "frozen"}


def trunk_weights(content: Any) -> dict[str, Tensor]:
    """A trunk's weights out of a state dict, a trunk checkpoint or a whole detector's, published or ours."""
    weights = content.get("model", content) if isinstance(content, dict) else {}
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return {name: value for name, value in weights.items() if not name.startswith("fc.")}


def fill(backbone: Backbone, weights: dict[str, Tensor], source: str) -> None:
    """Load weights of the same architecture; the count of batches that batch norm keeps is dropped or set to 0 as needed.

    Raises:
        UserError: weights of another architecture.
    """
    kept = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    counts = [name for name, _ in backbone.named_buffers() if name.endswith("num_batches_tracked")]
    load_weights(backbone, kept | {name: torch.tensor(0) for name in counts}, source)


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights of the trunk, from its cache or its server.

    Raises:
        UserError: no network and nothing in the cache.
    """
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url  # type: ignore[attr-defined]
    try:
        return trunk_weights(torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True))
    except OSError as error:  # URLError and HTTPError are OSErrors
        raise UserError(
            f"ImageNet weights of {name}: cannot be fetched ({error}); fetch {url} elsewhere and give the file as weights=, "
            "or train from scratch with pretrained=false norm=batch"
        ) from None
