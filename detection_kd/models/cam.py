"""A network that is told whether a tile holds a mitosis, and shows where: a trunk, a 1x1
convolution that makes a map of logits, and the pooling of the map to the logit of the tile.

Source: class activation maps (Zhou et al., CVPR 2016) as in UTS (cvblab/Mitosis-UTS), where the
maximum of the map, enlarged to the tile, is the tile's logit. Differences: any timm model is a
trunk and what lies behind its last stage is dropped; the map has a bias; pooling may precede the
enlargement, and may also be a top-k mean or log-sum-exp; pixels are normalised as the trunk's
weights want them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from detection_kd.models.cell_grid import CellGrid, measure_cells, takes_patches
from detection_kd.models.normalised_network import NormalisedNetwork, find_statistics
from patch_encoder.models.encoder_table import IMAGENET
from patch_encoder.selfdistill.backbone import RESNETS, build_student_backbone
from wsi_common.checkpoint import load_checkpoint_of, load_weights
from wsi_common.config import key
from wsi_common.errors import UserError

KIND = "weak_localiser"
SMALL = "small"
POOLINGS = ("max", "mean", "topk", "lse")
MODES = ("instance", "embedding")
NORMS = ("batch", "layer")


@dataclass
class LocaliserKeys:
    """The network that localises, and the weights that it starts from."""

    trunk: str = key(
        "resnet18",
        "network below the map; small (100,000 parameters, stride 4 px), resnet18, resnet50, or "
        "any timm model with intermediate maps",
    )
    stage: int = key(
        3,
        "last stage of a timm trunk that is kept; 1 to 4 have strides of 4 to 32 px",
        least=1,
    )
    norm: str = key(
        "batch",
        "normalisation of the trunk small; layer: of each cell, the same for any batch",
        choices=NORMS,
    )
    init: str = key(
        "timm:resnet18.tv_in1k",
        "initial weights of the trunk; random, an encoder's name (imagenet_lite0, "
        "timm:<model>.<tag>) or a file",
    )
    mode: str = key(
        "instance",
        "instance: pool the map of logits; embedding: pool the features",
        choices=MODES,
    )
    pooling: str = key(
        "max", "from map to tile; topk and lse lie between max and mean", choices=POOLINGS
    )
    top_share: float = key(0.05, "share of the cells that pooling=topk averages")
    sharpness: float = key(5.0, "factor of pooling=lse; a large one is the maximum")
    enlarged: bool = key(
        False, "enlarge the map to the size of the tile before it is pooled, as published"
    )

    def check(self) -> None:
        """Refuse what contradicts itself."""
        if self.trunk == SMALL and self.init != "random":
            raise UserError(
                f"network.trunk=small: expected network.init=random, found {self.init}; set it, or "
                "choose another trunk"
            )
        if self.mode == "embedding" and self.enlarged:
            raise UserError(
                "network.mode=embedding: expected network.enlarged=false, since features are "
                "pooled as they are"
            )
        if not 0 < self.top_share <= 1 or self.sharpness <= 0:
            raise UserError(
                f"network.top_share={self.top_share}, network.sharpness={self.sharpness}: expected "
                "a share within 0..1 and a positive factor"
            )


class CamOutput(NamedTuple):
    """What the network says about tiles.

    Attributes:
        maps: logits of the cells (B, 1, h, w).
        bags: logits of the tiles (B,).
    """

    maps: Float[Tensor, "b 1 h w"]
    bags: Float[Tensor, " b"]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 one.

    Args:
        inputs, outputs: channels.
        stride: of the first convolution.
        norm: one of `NORMS`.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.norms = nn.ModuleList(make_norm(norm, outputs) for _ in range(3))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """A map of `stride` times fewer rows and columns."""
        inner = functional.relu(self.norms[0](self.first(x)))
        return functional.relu(self.norms[1](self.second(inner)) + self.norms[2](self.shortcut(x)))


class CellNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell.

    Group norm would tell every cell about the whole map, and a network that is only asked whether
    there is a mitosis would then be right in the wrong place.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The map, normalised."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_norm(norm: str, channels: int) -> nn.Module:
    """A layer that normalises a map."""
    return nn.BatchNorm2d(channels) if norm == "batch" else CellNorm(channels)


class SmallTrunk(nn.Sequential):
    """A stem and two residual blocks: enough for figures of some 20 px, within minutes on a CPU."""

    def __init__(self, norm: str) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False),
            make_norm(norm, 16),
            nn.ReLU(),
            ResidualBlock(16, 32, 2, norm),
            ResidualBlock(32, 64, 1, norm),
        )
        self.channels, self.statistics = 64, IMAGENET


class TimmTrunk(nn.Module):
    """A timm model up to one of its stages.

    Args:
        name: timm's name; `resnet18` and `resnet50` start as torchvision's do.
        stage: number of the last intermediate map, 0 being the stem's.
        init: as for `build_student_backbone`.

    Raises:
        UserError: no such model or stage, or weights that cannot be had.
    """

    def __init__(self, name: str, stage: int, init: str) -> None:
        super().__init__()
        arch = name if name in RESNETS else f"timm:{name}"
        self.network = build_student_backbone(arch, init=init)
        described = getattr(self.network, "feature_info", [])
        if not hasattr(self.network, "forward_intermediates") or stage >= len(described):
            raise UserError(
                f"network.stage={stage}: expected a trunk with so many intermediate maps, found "
                f"{len(described)} in network.trunk={name}; choose another"
            )
        self.stage, self.channels = stage, int(described[stage]["num_chs"])
        self.stride = float(described[stage]["reduction"])
        self.statistics = find_statistics(self.network, init)
        self.network.prune_intermediate_layers([stage], prune_norm=True, prune_head=True)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c _h _w"]:
        """The map of the last stage that is kept."""
        (found,) = self.network.forward_intermediates(
            x, indices=[self.stage], stop_early=True, intermediates_only=True
        )
        return found


class WeakLocaliser(NormalisedNetwork):
    """Tiles in, maps of logits and logits of the tiles out.

    Args:
        keys: trunk, pooling and where the weights come from.

    Raises:
        UserError: keys that contradict each other, or a trunk that cannot be had.
    """

    def __init__(self, keys: LocaliserKeys) -> None:
        super().__init__()
        keys.check()
        self.keys = keys
        self.trunk = build_trunk(keys)
        self.head = nn.Conv2d(self.trunk.channels, 1, 1)
        self.set_statistics(self.trunk.statistics)

    def features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c _h _w"]:
        """The trunk's map, which `head` turns into logits; pixels are 0..1."""
        return self.trunk(self.normalise(pixels))

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> CamOutput:
        """Map and logit of every tile, in fp32; pixels are 0..1."""
        found, keys = self.features(pixels), self.keys
        maps = self.head(found).float()
        if keys.mode == "embedding":
            pooled = pool_cells(found, keys.pooling, keys.top_share, keys.sharpness)  # (B, C)
            return CamOutput(maps, self.head(pooled[..., None, None]).float().flatten())
        shown = enlarge_maps(maps, pixels.shape[-2:]) if keys.enlarged else maps
        bags = pool_cells(shown, keys.pooling, keys.top_share, keys.sharpness)
        return CamOutput(maps, bags.flatten())

    def find_cells(self, side: int) -> CellGrid:
        """Where the cells of the maps of tiles of `side` px lie in these."""
        return _find_cells(self.keys.trunk, self.keys.stage, side)

    def describe(self) -> dict[str, Any]:
        """What it takes to build this network again, for a checkpoint's `config`."""
        return {"kind": KIND, "network": asdict(self.keys), "statistics": self.statistics}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> WeakLocaliser:
        """The network that `describe` was called on, with random weights."""
        model = cls(LocaliserKeys(**{**description["network"], "init": "random"}))
        model.set_statistics(description["statistics"])
        model.keys.init = description["network"]["init"]
        return model


def build_trunk(keys: LocaliserKeys) -> SmallTrunk | TimmTrunk:
    """The network below the map, with the weights that it starts from."""
    if keys.trunk == SMALL:
        return SmallTrunk(keys.norm)
    return TimmTrunk(keys.trunk, keys.stage, keys.init)


@lru_cache
def _find_cells(trunk: str, stage: int, side: int) -> CellGrid:
    """Cells of a trunk that is built for this; weights do not matter, and nothing is drawn."""
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        network = build_trunk(LocaliserKeys(trunk=trunk, stage=stage, init="random"))
        if isinstance(network, TimmTrunk) and takes_patches(network.network):
            return CellGrid(network.stride)
        return measure_cells(network, side)


def pool_cells(
    maps: Float[Tensor, "b c h w"], pooling: str, top_share: float, sharpness: float
) -> Float[Tensor, "b c"]:
    """One number per map.

    Args:
        maps: of logits or features.
        pooling: one of `POOLINGS`; lse is log(mean(exp(r x))) / r.
        top_share: share of the cells that `topk` averages, at least one cell.
        sharpness: r of `lse`.
    """
    cells = maps.flatten(2).float()  # (B, C, h * w)
    count = cells.shape[-1]
    if pooling == "max":
        return cells.amax(-1)
    if pooling == "mean":
        return cells.mean(-1)
    if pooling == "topk":
        return cells.topk(max(1, math.ceil(top_share * count)), dim=-1).values.mean(-1)
    return ((sharpness * cells).logsumexp(-1) - math.log(count)) / sharpness


def enlarge_maps(maps: Float[Tensor, "b c h w"], size: Any) -> Float[Tensor, "b c _h _w"]:
    """The maps with as many rows and columns as `size` says, bilinear, corners on corners."""
    return functional.interpolate(maps, tuple(size), mode="bilinear", align_corners=True)


def load_localiser(path: str | Path) -> tuple[WeakLocaliser, dict[str, Any]]:
    """A trained network from its checkpoint alone, in evaluation mode.

    Returns:
        The network and its description: `mpp` and `side` of the tiles that it was trained on, the
        stain, and the thresholds `threshold` (of points) and `bag_threshold` (of tiles).

    Raises:
        UserError: the file is no checkpoint of `train_mitosis`.
    """
    content = load_checkpoint_of(path, KIND, "a mitosis localiser", "train_mitosis")
    described = content["config"]
    model = WeakLocaliser.from_description(described)
    load_weights(model, content["model"], str(path))
    return model.eval(), described
