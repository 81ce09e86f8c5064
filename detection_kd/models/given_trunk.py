"""A trunk that timm does not build: a torchvision model, a backbone of transformers, or any module
that gives maps of strides 8, 16 and 32 px.

    trunk = wrap_trunk(torchvision.models.convnext_tiny(weights="DEFAULT"))
    detector = DeformableDETR(trunk, classes=2, architecture=Architecture())

What a module gives is found by a dry run on a small picture, not by its name. A model that gives no
maps itself (a torchvision classifier) is traced, and the last map of each stride is taken. By name,
`torchvision:<model>` and `transformers:<folder or repository>` do the same in a configuration; such
trunks are rebuilt from a checkpoint alone, a given object is not: hand it over again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detection_kd.models.trunk_stages import find_stages
from wsi_common.errors import UserError, did_you_mean

SIZE = (128, 192)  # height and width of the dry run, px; no stride gives both the same
STRIDES = (8, 16, 32)
KINDS = ("torchvision", "transformers")
GIVEN = "given"  # of a module that has no name


class GivenTrunk(nn.Module):
    """The same interface as `Backbone` around another module.

    Args:
        body: images (B, 3, H, W) -> maps, as a list, a mapping, or an object with `feature_maps`.
        name: what a checkpoint calls it.
        norm: `batch`: as it comes; `frozen`: batch norm keeps its statistics and parameters.
        settings: what builds the same body again, for a checkpoint; None: nothing does.

    Attributes:
        channels: of the maps of strides 8, 16 and 32 px.

    Raises:
        UserError: another norm, a body that cannot run, or one without these maps.
    """

    def __init__(
        self,
        body: nn.Module,
        name: str = GIVEN,
        norm: str = "batch",
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "frozen"):
            raise UserError(f"norm={norm}: expected batch or frozen with the backbone '{name}'")
        places, widths, self.channels_last = _find_maps(body, name)
        if norm == "frozen":
            from detection_kd.models.frozen_norm import freeze_norms  # a while to load

            body = freeze_norms(body)
        self.body, self.name, self.norm, self.dilation = body, name, norm, False
        self.channels: tuple[int, int, int] = widths
        self.places, self.settings = places, settings

    def forward(
        self, images: Float[Tensor, "b 3 h w"], upto: int = 2
    ) -> list[Float[Tensor, "b _c _h _w"]]:
        """Maps of strides 8, 16, 32, no further than number `upto`; all of them are computed.

        Args:
            images: normalised with ImageNet's mean and standard deviation.
            upto: last map that is returned.
        """
        outputs = _list_maps(self.body(images))
        maps = [outputs[place] for place in self.places[: upto + 1]]
        return [m.permute(0, 3, 1, 2).contiguous() for m in maps] if self.channels_last else maps

    def truncate(self, upto: int) -> None:
        """Nothing: where the body could be cut is not known."""

    def stages(self) -> dict[str, int]:
        """Stage 0 (stem) ... 4 (stride 32) of every parameter, by the maps of a dry run."""
        with torch.no_grad():
            found = find_stages(self.body, SIZE, lambda: _run(self.body, self.name))
        return {f"body.{name}": stage for name, stage in found.items()}

    def freeze(self, stages: int) -> None:
        """Keep the first `stages` of stem, strides 4, 8, 16, 32 as they are."""
        for name, stage in self.stages().items() if stages else ():
            if stage < stages:
                self.get_parameter(name).requires_grad_(False)

    def describe(self) -> dict[str, Any]:
        """What it takes to build this trunk again, for a checkpoint's `config`."""
        described = {"kind": "backbone", "name": self.name, "norm": self.norm, "dilation": False}
        return described | ({} if self.settings is None else {"settings": self.settings})


def wrap_trunk(module: nn.Module, *, norm: str = "batch") -> GivenTrunk:
    """Make a trunk of the detector out of a module that a caller built.

    Args:
        module: gives maps (a list, a mapping, transformers' `feature_maps`, timm's
            `features_only`), or a torchvision classifier. Its weights are kept.
        norm: `batch`: as it comes; `frozen`: batch norm keeps its statistics.

    Raises:
        UserError: it gives no maps of strides 8, 16 and 32 px.
    """
    return GivenTrunk(_trace_where_needed(module, type(module).__name__), norm=norm)


def is_given(name: str) -> bool:
    """Whether a backbone's name means a trunk of this module."""
    return name == GIVEN or name.partition(":")[0] in KINDS


def build_named_trunk(
    name: str,
    norm: str,
    *,
    pretrained: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> GivenTrunk:
    """The trunk of a name such as `torchvision:convnext_tiny` or `transformers:<folder>`.

    Args:
        name: the kind, a colon, and the model's name, its folder or its repository on the hub.
        norm: as for `GivenTrunk`.
        pretrained: whether it has its published weights; else random ones.
        settings: of a checkpoint: its own `settings`.

    Raises:
        UserError: no such model, weights that cannot be had, or no maps of these strides.
    """
    kind, _, model = name.partition(":")
    if name == GIVEN:
        raise UserError(
            "backbone 'given': expected a name, found a trunk that was given as an object; build "
            "it with wrap_trunk and pass it as trunk="
        )
    if kind == "torchvision":
        body = _build_torchvision(name, model, pretrained)
        return GivenTrunk(_trace_where_needed(body, name), name, norm)
    return _build_transformers(name, model, norm, pretrained, settings)


def _build_torchvision(name: str, model: str, pretrained: bool) -> nn.Module:
    from torchvision import models  # a while to load

    known = models.list_models(module=models)
    if model not in known:
        raise UserError(f"backbone '{name}': no such model; {did_you_mean(model, known)}")
    try:
        return models.get_model(model, weights="DEFAULT" if pretrained else None)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:160]
        raise UserError(
            f"weights of {name}: cannot be fetched ({reason}); set pretrained=false, or give a "
            "whole detector as detector="
        ) from None


def _build_transformers(
    name: str, model: str, norm: str, pretrained: bool, settings: Mapping[str, Any] | None
) -> GivenTrunk:
    from transformers import AutoBackbone, AutoConfig  # a while to load
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    try:
        if settings is None:
            config = AutoConfig.from_pretrained(model)
            # all stages, of which the dry run picks three
            config.out_features = list(config.stage_names)
        else:
            kept = dict(settings)
            config = AutoConfig.for_model(kept.pop("model_type"), **kept)
        body = (
            # AutoBackbone itself asks the hub, also for a folder
            MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(model, config=config)
            if pretrained and settings is None
            else AutoBackbone.from_config(config)
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"backbone '{name}': transformers cannot build it: {reason}; give a folder with "
            "config.json, and weights unless pretrained=false"
        ) from None
    plain = config.to_diff_dict() | {"model_type": config.model_type}
    plain["out_features"] = list(config.out_features)
    return GivenTrunk(body, name, norm, {k: v for k, v in plain.items() if _is_plain(v)})


def _is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold a value."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def fill_given_trunk(trunk: GivenTrunk, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights by the names of the wrapped module, or of a trunk that was saved here; what a
    classifier has beyond its maps is passed over.

    Raises:
        UserError: weights are missing, or of another shape.
    """
    own = trunk.body.state_dict()
    counts = {name for name in own if name.endswith("num_batches_tracked")}
    given = {name.removeprefix("body."): value for name, value in weights.items()}
    fitting = {
        name: given[name]
        for name in own
        if name in given and name not in counts and given[name].shape == own[name].shape
    }
    missing = sorted(own.keys() - fitting.keys() - counts)
    if missing:
        raise UserError(
            f"{source}: expected weights of the backbone '{trunk.name}', found none of the right "
            f"shape for {len(missing)} of {len(own)} tensors, first {missing[0]}"
        )
    trunk.body.load_state_dict(own | fitting)


def _trace_where_needed(module: nn.Module, name: str) -> nn.Module:
    """The module itself where it gives maps, else a trace of it that returns all of its maps."""
    with torch.no_grad():
        output = _run(module, name)
    if len(_list_maps(output)) >= len(STRIDES):
        return module
    from torchvision.models.feature_extraction import (  # a while to load
        create_feature_extractor,
        get_graph_node_names,
    )

    try:
        in_training, in_evaluation = get_graph_node_names(module)
        nodes = [node for node in in_evaluation[1:] if node in set(in_training)]
        traced = create_feature_extractor(module, return_nodes=nodes)
        with torch.no_grad():
            found = _run(traced, name)
        chosen = _last_of_each_stride(found)
        return create_feature_extractor(module, return_nodes=chosen) if chosen else module
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError):
        return module  # it cannot be traced; the dry run says what it gives


def _last_of_each_stride(outputs: Mapping[str, Any]) -> list[str]:
    last = {_find_stride(value): name for name, value in outputs.items()}
    chosen = [last[found] for found in last if found is not None and found[0] in STRIDES]
    return chosen if len(chosen) >= len(STRIDES) else []


def _run(module: nn.Module, name: str) -> Any:
    """What a module makes of a grey picture, in evaluation mode."""
    training = module.training
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    try:
        return module.eval()(torch.zeros(1, 3, *SIZE, device=device))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0][:160]
        raise UserError(
            f"backbone '{name}': expected a network that takes pictures of {SIZE[1]} x {SIZE[0]} "
            f"px, its dry run failed: {reason}"
        ) from None
    finally:
        module.train(training)


def _list_maps(output: Any) -> list[Tensor]:
    """The four-dimensional tensors of whatever a network returns, in order."""
    output = getattr(output, "feature_maps", output)
    if isinstance(output, Tensor):
        output = [output]
    elif isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, Iterable):
        output = []
    return [value for value in output if isinstance(value, Tensor) and value.ndim == 4]


def _find_stride(value: Any) -> tuple[int, bool] | None:
    """Stride of a map of the dry run, and whether its channels are last; None: it is no map."""
    if not isinstance(value, Tensor) or value.ndim != 4:
        return None
    for stride in (2, 4, *STRIDES):
        sides = tuple(side // stride for side in SIZE)
        if tuple(value.shape[2:]) == sides:
            return stride, False
        if tuple(value.shape[1:3]) == sides:
            return stride, True
    return None


def _find_maps(body: nn.Module, name: str) -> tuple[list[int], tuple[int, int, int], bool]:
    """Places of the three maps among a body's outputs, their channels, and whether these are last.

    Raises:
        UserError: a map is missing.
    """
    with torch.no_grad():
        maps = _list_maps(_run(body, name))
    found = {_find_stride(value): place for place, value in enumerate(maps)}
    for last in (False, True):
        if all((stride, last) in found for stride in STRIDES):
            places = [found[stride, last] for stride in STRIDES]
            first, second, third = (maps[place].shape[3 if last else 1] for place in places)
            return places, (first, second, third), last
    shapes = [tuple(value.shape[1:]) for value in maps]
    raise UserError(
        f"backbone '{name}': expected feature maps of strides 8, 16 and 32 px, found shapes "
        f"{shapes} for a picture of {SIZE[1]} x {SIZE[0]} px; take a network with a pyramid of maps"
    )
