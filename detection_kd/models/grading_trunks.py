"""Trunks of grading networks: from pixels to the maps that are averaged and graded; and how strides
are taken out of one, so that the map of a small image keeps its size.

Source: VGG16 (Simonyan and Zisserman, ICLR 2015) ends at conv5_3 without its ReLU and without
pool5, as in AT+ (cvblab/kd_resolution). Differences: any timm model with maps will do, and a small
network of VGG's form trains within minutes on a CPU.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detection_kd.models.cam import NORMS, make_norm
from detection_kd.models.normalised_network import find_statistics
from patch_encoder.models.encoder_table import IMAGENET, EncoderRow, Statistics
from patch_encoder.models.encoder_weights import find_local_file, find_published_file, read_state
from patch_encoder.selfdistill.backbone import RANDOM, build_student_backbone, find_initial_row
from wsi_common.checkpoint import load_weights
from wsi_common.errors import UserError

SMALL, VGG16 = "small", "vgg16"
PROBE = 256  # px; side of the image that strides are found with, a multiple of any trunk's stride
POOLS = (nn.MaxPool2d, nn.AvgPool2d)


class GradingTrunk(nn.Module):
    """What every trunk has.

    Attributes:
        width: K, channels of its map.
        stages: names of the modules whose outputs are its levels, the last one last.
        statistics: mean and standard deviation per channel of the pixels that it wants.
    """

    width: int
    stages: list[str]
    statistics: Statistics = IMAGENET

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k _h _w"]:
        """The last map."""
        raise NotImplementedError


class SmallGradingTrunk(GradingTrunk):
    """A stem and three blocks of two convolutions, stride 8 px: 200,000 parameters.

    Args:
        norm: one of `NORMS`. Neither mixes the cells of one image: a norm over an image, as group
            norm, would take away what its average says about the grade.
    """

    width = 96

    def __init__(self, norm: str = NORMS[0]) -> None:
        super().__init__()
        self.stem = _convolve(3, 16, norm, stride=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                _convolve(i, o, norm),
                _convolve(o, o, norm),
                nn.MaxPool2d(2) if pool else nn.Identity(),
            )
            for i, o, pool in ((16, 32, True), (32, 64, True), (64, self.width, False))
        )
        self.stages = [f"blocks.{i}" for i in range(3)]

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k _h _w"]:
        """The last map; none of its values is below 0."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def _convolve(inputs: int, outputs: int, norm: str, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, make_norm(norm, outputs), nn.ReLU(inplace=True))


class VggTrunk(GradingTrunk):
    """VGG16 up to conv5_3, stride 16 px, with torchvision's names and random start.

    Args:
        init: as for `build_student_backbone`.

    Raises:
        UserError: weights that cannot be had or are of another network.
    """

    width = 512

    def __init__(self, init: str = RANDOM) -> None:
        from torchvision.models import vgg  # a while to load

        super().__init__()
        self.features = vgg.make_layers(vgg.cfgs["D"])[:29]
        self.stages = [f"features.{i}" for i in (4, 9, 16, 23, 28)]
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        if init != RANDOM:
            row = find_initial_row(init)
            file = (
                find_published_file(row, init, key="init")
                if row
                else find_local_file(Path(init), EncoderRow("timm", "", "", 0))
            )
            weights = {k: v for k, v in read_state(file).items() if k.startswith("features.")}
            load_weights(self, weights, str(file))

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k _h _w"]:
        """The last map, of either sign."""
        return self.features(x)


class TimmGradingTrunk(GradingTrunk):
    """All of a timm model but its pooling and classifier.

    Args:
        name: timm's.
        init: as for `build_student_backbone`.

    Raises:
        UserError: no such model, one without maps, or weights that cannot be had.
    """

    def __init__(self, name: str, init: str = RANDOM) -> None:
        super().__init__()
        self.network = build_student_backbone(f"timm:{name}", init=init)
        described = getattr(self.network, "feature_info", [])
        self.stages = [f"network.{info['module']}" for info in described]
        self.channels_last = str(getattr(self.network, "output_fmt", "")) == "NHWC"
        self.statistics = find_statistics(self.network, init)
        self.width = int(self.network.num_features)
        shape = trace_shape(self, PROBE)
        if len(shape) != 4 or shape[1] != self.width:
            raise UserError(
                f"trunk={name}: expected a network whose last layer is a map, found an output of "
                f"{shape}; choose a convolutional one, such as resnet18 or tf_efficientnet_lite0"
            )

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b ..."]:
        """The last map; of a network without maps, whatever it has."""
        found = self.network.forward_features(x)
        return found.permute(0, 3, 1, 2) if self.channels_last else found


def build_trunk(
    name: str, init: str, removed_strides: int = 0, norm: str = NORMS[0]
) -> GradingTrunk:
    """A trunk with its first weights.

    Args:
        name: small, vgg16 or a timm model.
        init: random, an encoder's name or a weights file.
        removed_strides: how many of the first halvings are taken out.
        norm: of the trunk small, one of `NORMS`.

    Raises:
        UserError: a trunk, weights or strides that cannot be had.
    """
    if name == SMALL and init != RANDOM:
        raise UserError(
            f"trunk=small: expected init=random, found {init}; set it, or choose another trunk"
        )
    trunk: GradingTrunk
    if name == SMALL:
        trunk = SmallGradingTrunk(norm)
    else:
        trunk = VggTrunk(init) if name == VGG16 else TimmGradingTrunk(name, init)
    remove_strides(trunk, removed_strides, name)
    return trunk


def trace_shape(trunk: nn.Module, side: int) -> tuple[int, ...]:
    """Shape of the output for one image of `side` px; nothing is computed.

    Raises:
        UserError: the image is too small, or the trunk wants another size.
    """
    empty = {
        name: tensor.detach().to("meta")
        for name, tensor in (*trunk.named_parameters(), *trunk.named_buffers())
    }
    pixels = torch.empty(1, 3, side, side, device="meta")
    training = trunk.training
    trunk.eval()
    try:
        with torch.no_grad():
            return tuple(torch.func.functional_call(trunk, empty, (pixels,)).shape)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0][:120]
        raise UserError(f"images of {side} px do not suit the trunk: {reason}") from None
    finally:
        trunk.train(training)


def remove_strides(trunk: nn.Module, count: int, name: str) -> None:
    """Let the first `count` layers that halve the map keep its size; weights stay as they are.

    A student that sees 4 times fewer pixels per side and has lost two strides has a map of its
    teacher's size, and its later layers see the same tissue as the teacher's.

    Args:
        trunk: it is changed in place.
        count: convolutions and poolings of the same input, as of a block and its shortcut, count as
            one.
        name: of the trunk, for errors.

    Raises:
        UserError: there are fewer, or one whose stride its padding depends on.
    """
    if count == 0:
        return
    strided = _find_strided(trunk)
    sides = sorted(strided, reverse=True)
    if not 0 <= count <= len(sides):
        raise UserError(
            f"removed_strides={count}: expected 0 to {len(sides)}, as many as trunk={name} has"
        )
    wanted = trace_shape(trunk, PROBE)[-1]
    for side in sides[:count]:
        wanted *= max(_stride(module) for module in strided[side])
        for module in strided[side]:
            if isinstance(module, POOLS) and _pair(module.kernel_size) <= _pair(module.stride):
                module.kernel_size = 1  # windows that do not overlap: nothing is left to pool
            module.stride = (1, 1) if isinstance(module, nn.Conv2d) else 1
    found = trace_shape(trunk, PROBE)[-1]
    if found != wanted:
        raise UserError(
            f"removed_strides={count}: expected a map of {wanted} cells per side of trunk={name}, "
            f"found {found}; its layers cannot do without their strides"
        )


def _find_strided(trunk: nn.Module) -> dict[int, list[Any]]:
    """Layers with a stride, by the side of their input in px."""
    found: dict[int, list[Any]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        found.setdefault(inputs[0].shape[-2], []).append(module)

    handles = [
        module.register_forward_hook(note)
        for module in trunk.modules()
        if isinstance(module, (nn.Conv2d, *POOLS)) and _stride(module) > 1
    ]
    trace_shape(trunk, PROBE)
    for handle in handles:
        handle.remove()
    return found


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _stride(module: Any) -> int:
    return math.isqrt(math.prod(_pair(module.stride)))
