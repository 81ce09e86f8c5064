"""The encoders by name: library, weights, input, width. One row each; the published TS2G-KD set plus two classical ones.

`width` is what the bag's D will be. Licences are the weights' own; gated weights have to be asked for at their hub.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class EncoderRow:
    """How to build one encoder.

    Attributes:
        library: timm, open_clip, transformers or classical.
        model: the library's name of the architecture.
        weights: where its hub keeps the weights; what an error tells the user to fetch.
        width: D.
        statistics: (mean, std) per channel of pixels in [0, 1].
        input_size: side in pixels that a tile is resized to.
        normalise: features are divided by their L2 norm, as TS2G-KD does for this encoder.
        licence: of the weights; "gated" where access has to be asked for.
        options: keyword arguments of the library's constructor.
    """

    library: str
    model: str
    weights: str
    width: int
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    input_size: int = 224
    normalise: bool = False
    licence: str = ""
    options: dict[str, Any] = field(default_factory=dict)


ENCODERS: dict[str, EncoderRow] = {
    "resnet18": EncoderRow("timm", "resnet18", "timm/resnet18.tv_in1k", 512, licence="BSD-3"),
    "resnet34": EncoderRow("timm", "resnet34", "timm/resnet34.tv_in1k", 512, licence="BSD-3"),
    # layer4 and the classifier cut off, as in CLAM and TS2G-KD
    "resnet50": EncoderRow("timm", "resnet50", "timm/resnet50.tv_in1k", 1024, licence="BSD-3", options={"out_stage": 3}),
    "dinov2": EncoderRow(
        "timm",
        "vit_base_patch14_dinov2",
        "timm/vit_base_patch14_dinov2.lvd142m",
        768,
        normalise=True,
        licence="Apache-2.0",
        options={"img_size": 224},
    ),
    "mae": EncoderRow(
        "timm",
        "vit_base_patch16_224",
        "timm/vit_base_patch16_224.mae",
        768,
        licence="CC-BY-NC-4.0",
        options={"global_pool": "token"},
    ),
    "gigapath": EncoderRow(
        "timm",
        "vit_giant_patch14_dinov2",
        "prov-gigapath/prov-gigapath",
        1536,
        licence="gated, non-commercial",
        options={"img_size": 224, "patch_size": 16, "mlp_ratio": 5.33334, "global_pool": "token"},
    ),
    "clip": EncoderRow(
        "open_clip", "ViT-B-16", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", 512, OPENAI_CLIP, normalise=True, licence="MIT"
    ),
    "biomedclip": EncoderRow(
        "open_clip_timm",
        "vit_base_patch16_224",
        "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        512,
        OPENAI_CLIP,
        normalise=True,
        licence="MIT",
    ),
    "plip": EncoderRow("transformers", "clip-vit-base-patch32", "vinid/plip", 512, OPENAI_CLIP, licence="MIT"),
    "stain_texture": EncoderRow("classical", "stain_texture", "", 0),
    "mean_colour": EncoderRow("classical", "mean_colour", "", 3),
}
