"""The detector's convolutional trunk, rebuilt from its checkpoint alone by the stages that distil
from it.

Source: He et al., CVPR 2016; frozen statistics and frozen first stages as in DETR and Deformable
DETR, dilation of the last stage as in their "DC5" models. On timm's feature extractors: any timm
model with maps of strides 8, 16 and 32 px will do; `resnet18|34|50|101` have torchvision's
parameter names and, from the hub, its ImageNet weights. Differences: trainable batch or group norm
for training without given weights; the forward pass stops at the stage that is asked for.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Union

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detection_kd.models.given_trunk import (
    GIVEN,
    GivenTrunk,
    build_named_trunk,
    fill_given_trunk,
    is_given,
)
from detection_kd.models.trunk_names import find_trunk
from patch_encoder.models.encoder_table import ENCODERS, IMAGENET, EncoderRow
from patch_encoder.models.encoder_weights import (
    convert_encoder_weights,
    find_local_file,
    find_published_file,
    read_state,
)
from wsi_common.checkpoint import (
    load_checkpoint,
    load_tensors,
    load_weights,
    read_weights,
    save_checkpoint,
)
from wsi_common.errors import UserError, did_you_mean

Trunk = Union["Backbone", GivenTrunk]
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
NORMS = (
    # batch norm keeps statistics and affine parameters of the given weights, as published
    "frozen",
    "batch",  # as the model has it, trainable
    "group",  # the same in training and evaluation, whatever the batch; ResNets only
)
# of trunks that are no ResNets: published detectors, ours, transformers' detectors
PREFIXES = (
    "backbone.0.body.",
    "backbone.",
    "model.backbone.conv_encoder.model.",
    "model.backbone.model.",
)
BLOCK_BY_BLOCK = ("EfficientNetFeatures", "MobileNetV3Features")  # of timm
STAGES = 5  # stem, and strides 4, 8, 16, 32
HUB = "hub"
UNPUBLISHED = EncoderRow("timm", "", "", 0)  # of a file that no encoder's row stands for


class Backbone(nn.Module):
    """A trunk without its classifier.

    Args:
        name: one of `RESNETS` or any timm model with feature maps.
        norm: one of `NORMS`.
        dilation: the last stage keeps stride 16 and dilates its convolutions instead.
        source: "": random weights; "hub": timm's; else a weights file in timm's own format.

    Attributes:
        channels: channels of the maps of strides 8, 16 and 32 px; their index is the "needle" of
            D2VFM.

    Raises:
        UserError: no such model, no such maps, or weights that cannot be had.
    """

    def __init__(self, name: str, norm: str, dilation: bool = False, source: str = "") -> None:
        from timm.models import FeatureListNet  # a while to load

        super().__init__()
        if norm not in NORMS:
            raise UserError(
                f"norm '{norm}': expected one of {', '.join(NORMS)}; {did_you_mean(norm, NORMS)}"
            )
        trunk = _create(name, norm, dilation, source)
        self.name, self.norm, self.dilation = name, norm, dilation
        self.channels: tuple[int, int, int] = tuple(trunk.feature_info.channels())
        self.stage_names = [info["module"].replace(".", "_") for info in trunk.feature_info.info]
        self.channels_last = str(getattr(trunk, "output_fmt", "")) == "Format.NHWC"
        self.steps: list[str] = list(trunk) if isinstance(trunk, FeatureListNet) else []
        self.taps: list[str] = list(trunk.return_layers) if self.steps else []
        for step in self.steps:  # flat, so that a ResNet's parameters have their published names
            self.add_module(step, trunk[step])
        if not self.steps:
            self.trunk = trunk
        self._own_statistics(name)

    def _own_statistics(self, name: str) -> None:
        import timm

        config = timm.get_pretrained_cfg(_tagged(name), allow_unregistered=True)
        self.same_statistics = config is None or (tuple(config.mean), tuple(config.std)) == IMAGENET
        if config is not None and not self.same_statistics:
            (mean, std), (own_mean, own_std) = (
                torch.tensor(pair) for pair in (IMAGENET, (config.mean, config.std))
            )
            self.register_buffer("scale", (std / own_std).view(3, 1, 1), persistent=False)
            self.register_buffer(
                "shift", ((mean - own_mean) / own_std).view(3, 1, 1), persistent=False
            )

    def forward(
        self, images: Float[Tensor, "b 3 h w"], upto: int = 2
    ) -> list[Float[Tensor, "b _c _h _w"]]:
        """Maps of strides 8, 16, 32, no further than number `upto` (0, 1 or 2).

        Args:
            images: normalised with ImageNet's mean and standard deviation, whatever the trunk was
                trained with.
            upto: last map to compute.
        """
        x = images if self.same_statistics else images * self.scale + self.shift
        maps = self._maps(x, upto) if self.steps else self.trunk(x)[: upto + 1]
        return (
            [map.permute(0, 3, 1, 2).contiguous() for map in maps] if self.channels_last else maps
        )

    def _maps(self, x: Tensor, upto: int) -> list[Tensor]:
        maps = []
        for step in self.steps:
            x = getattr(self, step)(x)
            if step in self.taps:
                maps.append(x)
            if len(maps) > upto:
                break
        return maps

    def truncate(self, upto: int) -> None:
        """Drop what comes after map `upto`, for good; nothing for trunks that cannot be cut."""
        if not self.steps:
            _cut_blocks(self.trunk, self.trunk.feature_info.module_name()[upto])
            return
        for step in self.steps[self.steps.index(self.taps[upto]) + 1 :]:
            delattr(self, step)
            self.steps.remove(step)

    def stages(self) -> dict[str, int]:
        """Stage 0 (stem) ... 4 (stride 32) of every parameter: that of the first map behind it."""
        order = [_flat(name) for name, _ in self.named_modules()]
        ends = [
            max((i for i, name in enumerate(order) if _within(name, stage)), default=-1)
            for stage in self.stage_names
        ]
        first, last = STAGES - len(ends), STAGES - 1
        found = {}
        for name, _ in self.named_parameters():
            module = order.index(_flat(name.rpartition(".")[0]))
            found[name] = next(
                (first + stage for stage, end in enumerate(ends) if module <= end), last
            )
        return found

    def freeze(self, stages: int) -> None:
        """Keep the first `stages` of stem, strides 4, 8, 16, 32 as they are; published: 2."""
        frozen = [name for name, stage in self.stages().items() if stage < stages]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in frozen and parameter.requires_grad)

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Backbone:
        """The trunk that `describe` was called on, with random weights."""
        return cls(description["name"], description["norm"], description.get("dilation", False))

    def describe(self) -> dict[str, Any]:
        """What it takes to build this trunk again, for a checkpoint's `config`."""
        return {"kind": "backbone", "name": self.name, "norm": self.norm, "dilation": self.dilation}


def _create(name: str, norm: str, dilation: bool, source: str) -> nn.Module:
    """timm's feature extractor with maps of strides 8, 16 and 32 px."""
    import timm  # a while to load

    from detection_kd.models.frozen_norm import freeze_norms

    if not timm.is_model(name.split(".")[0]):
        known = [*RESNETS, *timm.list_models()]
        raise UserError(
            f"backbone '{name}': timm {timm.__version__} has no such model; "
            f"{did_you_mean(name, known)}"
        )
    options: dict[str, Any] = {"output_stride": 16} if dilation else {}
    if norm == "group":
        options["norm_layer"] = "groupnorm"
    if name in RESNETS:
        options["zero_init_last"] = (
            False  # as published and in torchvision: short trainings from scratch suffer from zeros
        )
    build = partial(
        timm.create_model, _tagged(name), features_only=True, out_indices=(-3, -2, -1), **options
    )
    try:
        with torch.device("meta"):
            strides = build().feature_info.reduction()
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        AssertionError,
        NotImplementedError,
    ) as error:
        reason = str(error).strip().partition("\n")[0][:160]
        raise UserError(
            f"backbone '{name}': cannot be built with norm={norm}, dilation={dilation}: {reason}"
        ) from None
    wanted = [8, 16, 16] if dilation else [8, 16, 32]
    if strides != wanted:
        raise UserError(
            f"backbone '{name}': expected feature maps of strides {wanted} px, found {strides}"
        )
    trunk = _with_weights(build, name, source) if source else build()
    return freeze_norms(trunk) if norm == "frozen" else trunk


def _with_weights(build: partial[nn.Module], name: str, source: str) -> nn.Module:
    """The extractor with published weights, or with those of a file in timm's own format."""
    if source != HUB:
        file = find_local_file(Path(source), UNPUBLISHED)
        return _copy_network(build(), name, UNPUBLISHED, file)
    packaged = next((n for n, r in ENCODERS.items() if r.package and r.model == name), "")
    if packaged:
        row = ENCODERS[packaged]
        return _copy_network(build(), name, row, find_published_file(row, packaged))
    try:
        return build(pretrained=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0][:160]
        raise UserError(
            f"weights of {name}: cannot be fetched ({reason}); fetch timm/{_tagged(name)} from "
            "the Hugging Face hub elsewhere "
            "and give the file as weights=, or train from scratch with pretrained=false norm=batch"
        ) from None


def _copy_network(trunk: nn.Module, name: str, row: EncoderRow, file: Path) -> nn.Module:
    """The extractor with weights of the whole network; timm itself would pass over weights of
    another name, and leave random values in their place.

    Raises:
        UserError: a tensor of the extractor is not in the file, or has another shape there.
    """
    import timm

    network = timm.create_model(name, num_classes=0)  # whose names and rules the file has
    given = convert_encoder_weights(network, row, read_state(file))
    values = {_flat(key): value for key, value in given.items()}
    own = trunk.state_dict()
    fitting = {
        key: values[_flat(key)]
        for key, value in own.items()
        if _flat(key) in values and values[_flat(key)].shape == value.shape
    }
    missing = sorted(_drop_counts(own).keys() - fitting.keys())
    if missing:
        raise UserError(
            f"{file}: weights of another architecture: expected those of timm's {name}, found none "
            f"of the right shape for {len(missing)} of {len(own)} tensors, first {missing[0]}"
        )
    trunk.load_state_dict(own | fitting)
    return trunk


def _drop_counts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the counts of batches that batch norm keeps."""
    return {k: value for k, value in weights.items() if not k.endswith("num_batches_tracked")}


def _tagged(name: str) -> str:
    """timm's name; the papers' ResNets get torchvision's weights, as published."""
    return f"{name}.tv_in1k" if name in RESNETS else name


def _cut_blocks(trunk: nn.Module, last: str) -> None:
    """Drop the blocks behind `last` of a trunk that goes through them one by one."""
    name, _, place = last.rpartition(".")
    if type(trunk).__name__ in BLOCK_BY_BLOCK and name == "blocks":
        trunk.blocks = trunk.blocks[: int(place) + 1]


def _flat(name: str) -> str:
    return name.replace(".", "_").removeprefix("trunk_").removeprefix("model_")


def _within(module: str, stage: str) -> bool:
    return module == stage or module.startswith(stage + "_")


def build_trunk(
    name: str, norm: str, dilation: bool = False, settings: dict[str, Any] | None = None
) -> Trunk:
    """A trunk with random weights: timm's, or by `torchvision:<model>` and `transformers:<model>`.

    Args:
        name, norm, dilation: as for `Backbone`.
        settings: what a checkpoint says of a trunk of transformers.

    Raises:
        UserError: no such model, or no maps of strides 8, 16 and 32 px.
    """
    if not is_given(name):
        return Backbone(name, norm, dilation)
    if dilation:
        raise UserError(f"dilation=true: expected a backbone of timm with it, found '{name}'")
    return build_named_trunk(name, norm, settings=settings)


def rebuild_trunk(description: dict[str, Any]) -> Trunk:
    """The trunk that `describe` was called on, with random weights."""
    dilation, settings = description.get("dilation", False), description.get("settings")
    return build_trunk(description["name"], description["norm"], dilation, settings)


def load_backbone(path: str | Path) -> tuple[Trunk, dict[str, Any]]:
    """The trained trunk of a detector, for use as a fixed feature extractor.

    A trunk trained with batch norm comes back with the statistics frozen (norm "frozen"): the same
    function as in evaluation mode, which a later `train()` cannot undo.

    Args:
        path: `backbone.pt` or a whole checkpoint of `train_detector`, or a file of ResNet weights
            alone.

    Returns:
        The trunk, and its description (`name`, `norm`, `dilation`).

    Raises:
        UserError: the file holds no such trunk.
    """
    content = load_tensors(path, "a detector's backbone")
    weights = read_trunk_weights(content)
    described = _description(content, weights, path)
    norm = "group" if described["norm"] == "group" else "frozen"
    backbone = rebuild_trunk(described | {"norm": norm})
    fill_weights(backbone, weights, str(path))
    return backbone, backbone.describe()


def save_backbone(detector: str | Path, path: str | Path) -> None:
    """Write the trunk of a detector's checkpoint as a file of its own, which `load_backbone` takes.

    Raises:
        UserError: the file `detector` is no checkpoint.
    """
    content = load_checkpoint(detector)
    save_checkpoint(
        path,
        model=read_trunk_weights(content),
        config=content["config"]["backbone"],
        epoch=content["epoch"],
    )


def _description(content: Any, weights: dict[str, Tensor], path: str | Path) -> dict[str, Any]:
    if "config" in content:
        config = load_checkpoint(path, "a detector's backbone")["config"]
        config = config.get("backbone", config)
        if isinstance(config.get("name"), str) and config.get("norm") in NORMS:
            return config
    if "layer3.0.conv1.weight" not in weights:
        raise UserError(
            f"{path}: expected a ResNet trunk (backbone.pt or a detector checkpoint), found "
            f"{sorted(weights)[:3]}"
        )
    blocks = sum(name.startswith("layer3.") and name.endswith(".conv1.weight") for name in weights)
    bottleneck = "layer3.0.conv3.weight" in weights
    deep = "d" if "conv1.0.weight" in weights else ""  # three convolutions in the stem
    name = {(False, 2): "resnet18", (False, 6): "resnet34", (True, 6): "resnet50"}.get(
        (bottleneck, blocks), "resnet101"
    )
    return {"name": name + deep, "norm": "frozen"}


def read_trunk_weights(content: Any) -> dict[str, Tensor]:
    """A trunk's weights out of a state dict, a trunk checkpoint or a whole detector's, published or
    ours; see `trunk_names`.
    """
    weights = content if isinstance(content, dict) else {}
    if (given := _read_given_weights(weights)) is not None:
        return given
    for wrapper in ("model", "state_dict"):  # ours and detectron2's; MMDetection's and Lightning's
        weights = weights[wrapper] if isinstance(weights.get(wrapper), dict) else weights
    if (trunk := find_trunk(weights)) is not None:
        return trunk
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in weights):
            weights = {
                name.removeprefix(prefix): value
                for name, value in weights.items()
                if name.startswith(prefix)
            }
    return {name: value for name, value in weights.items() if not name.startswith("fc.")}


def _read_given_weights(content: dict[str, Any]) -> dict[str, Tensor] | None:
    """The trunk's weights of a checkpoint whose trunk is a `GivenTrunk`, by its own names; None for
    every other file.
    """
    config = content.get("config")
    described = config.get("backbone", config) if isinstance(config, dict) else {}
    if not (isinstance(described, dict) and is_given(str(described.get("name", "")))):
        return None
    kept = {name.removeprefix("backbone."): value for name, value in content["model"].items()}
    return {name: value for name, value in kept.items() if name.startswith("body.")}


def fill_weights(backbone: Trunk, weights: dict[str, Tensor], source: str) -> None:
    """Load weights of the same architecture; the count of batches that batch norm keeps is dropped
    or set to 0 as needed.

    Raises:
        UserError: weights of another architecture.
    """
    if isinstance(backbone, GivenTrunk):
        fill_given_trunk(backbone, weights, source)
        return
    kept = _drop_counts(weights)
    counts = [name for name, _ in backbone.named_buffers() if name.endswith("num_batches_tracked")]
    load_weights(backbone, kept | {name: torch.tensor(0) for name in counts}, source)


def fill_pretrained(trunk: Trunk, source: str) -> None:
    """Give a trunk the weights of the hub or of a file, as for `build_pretrained`; one that was
    given as an object keeps its own where the source is the hub.

    Raises:
        UserError: weights that cannot be had, or of another architecture.
    """
    if not isinstance(trunk, GivenTrunk):
        given = build_pretrained(trunk.name, trunk.norm, trunk.dilation, source)
        trunk.load_state_dict(given.state_dict())
    elif source != HUB:
        content = read_weights(source, "weights of a trunk")
        given_weights = _read_given_weights(content) or content.get("state_dict", content)
        fill_given_trunk(trunk, given_weights, source)
    elif trunk.name != GIVEN:
        given = build_named_trunk(trunk.name, trunk.norm, pretrained=True)
        fill_given_trunk(trunk, given.body.state_dict(), trunk.name)


def build_pretrained(name: str, norm: str, dilation: bool, source: str) -> Backbone:
    """A trunk with given weights.

    Args:
        name, norm, dilation: as for `Backbone`.
        source: "hub", or a file: a ResNet's state dict, a detector's checkpoint (ours or
            published), or timm's own format.

    Raises:
        UserError: weights that cannot be had, or of another architecture.
    """
    if source == HUB:
        return Backbone(name, norm, dilation, source)
    weights = read_trunk_weights(read_weights(source, "weights of a trunk"))
    backbone = Backbone(name, norm, dilation)
    own = _drop_counts(backbone.state_dict())
    if name not in RESNETS and _drop_counts(weights).keys() != own.keys():
        return Backbone(name, norm, dilation, source)
    fill_weights(backbone, weights, source)
    return backbone
