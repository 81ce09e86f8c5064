"""Building encoder networks through timm, open_clip and transformers, and loading their weights strictly."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from common.checkpoint import load_weights, read_weights
from common.errors import UserError
from patch_encoder.models.encoder_table import EncoderRow

NETWORK_ERRORS = (OSError, RuntimeError, ValueError)


class TruncatedResNet(nn.Module):
    """A timm ResNet up to `out_stage` (1..4), global average pooled: (B, 3, H, W) -> (B, C)."""

    def __init__(self, trunk: nn.Module, out_stage: int) -> None:
        super().__init__()
        for stage in range(out_stage + 1, 5):
            setattr(trunk, f"layer{stage}", nn.Identity())
        self.trunk = trunk

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C)."""
        return self.trunk.forward_features(pixels).mean(dim=(2, 3))  # type: ignore[operator]


class ClipVision(nn.Module):
    """The projected image embedding of transformers' CLIP: (B, 3, H, W) -> (B, 512)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 512)."""
        return self.model(pixel_values=pixels).image_embeds


def build_backbone(row: EncoderRow, *, pretrained: bool, name: str) -> nn.Module:
    """The network of a table row, with its hub's weights when `pretrained`.

    Raises:
        UserError: the hub cannot be reached; says which weights to fetch and where to give them.
    """
    builders = {"timm": _timm, "open_clip": _open_clip, "open_clip_timm": _open_clip_timm, "transformers": _transformers}
    try:
        return builders[row.library](row, pretrained)
    except NETWORK_ERRORS as error:
        if not pretrained:
            raise
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(
            f"encoder '{name}': its weights could not be had from the hub ({reason}); "
            f"fetch '{row.weights}' on a machine with network and give the file or folder as weights=..."
        ) from error


def _timm(row: EncoderRow, pretrained: bool) -> nn.Module:
    import timm

    options = dict(row.options)
    out_stage = options.pop("out_stage", None)
    overlay = {"hf_hub_id": row.weights} if pretrained else None
    network = timm.create_model(row.model, pretrained=pretrained, num_classes=0, pretrained_cfg_overlay=overlay, **options)
    return TruncatedResNet(network, out_stage) if out_stage else network


def _open_clip(row: EncoderRow, pretrained: bool) -> nn.Module:
    import open_clip

    if pretrained:
        model, _ = open_clip.create_model_from_pretrained(f"hf-hub:{row.weights}")
        return model.visual
    return open_clip.create_model(row.model, pretrained=None).visual


def _open_clip_timm(row: EncoderRow, pretrained: bool) -> nn.Module:
    import open_clip
    from open_clip.timm_model import TimmModel

    if pretrained:
        model, _ = open_clip.create_model_from_pretrained(f"hf-hub:{row.weights}")
        return model.visual
    return TimmModel(row.model, embed_dim=row.width, image_size=row.input_size, pool="", proj="linear", pretrained=False)


def _transformers(row: EncoderRow, pretrained: bool) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    if pretrained:
        return ClipVision(CLIPVisionModelWithProjection.from_pretrained(row.weights))
    # CLIP ViT-B/32, the architecture of PLIP
    return ClipVision(CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=32, projection_dim=row.width)))


def load_backbone_weights(network: nn.Module, row: EncoderRow, path: Path) -> None:
    """Load a local file, or a folder that holds one weights file, into the network; every key has to fit.

    Raises:
        UserError: no file, several files, or weights of another architecture.
    """
    file = _weights_file(path)
    weights = read_weights(file, "a weights file")
    weights = weights.get("model", weights.get("state_dict", weights))
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{file}: expected a state dict of tensors for '{row.model}', found {type(weights).__name__}")
    load_weights(network, _renamed(weights, network), str(file))


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        files = [file for suffix in ("safetensors", "bin", "pt", "pth") for file in sorted(path.glob(f"*.{suffix}"))]
        if len(files) != 1:
            raise UserError(
                f"weights={path}: expected one weights file in the folder, found {[f.name for f in files]}; name the file"
            )
        return files[0]
    if not path.is_file():
        raise UserError(f"weights={path}: expected a weights file, found none")
    return path


def _renamed(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The entries of `weights` that the network has a place for, under the network's own names.

    Known wrappings are taken off; what a full model has beside the image tower (text tower, classifier, layers behind
    a truncation) is left out. What is then missing is refused by the strict loading that follows.
    """
    own = network.state_dict()
    for prefix in ("", "visual.", "model.", "module.", "backbone."):
        for added in ("", "model.", "trunk."):
            renamed = {f"{added}{key.removeprefix(prefix)}": value for key, value in weights.items() if key.startswith(prefix)}
            if own.keys() <= renamed.keys():
                return {key: renamed[key] for key in own}
    return weights
