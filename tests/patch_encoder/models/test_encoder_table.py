"""Every row of the encoder table builds, and gives the width and the size that its authors publish.
No weights, no storage.
"""

from __future__ import annotations

import pytest
import torch

from patch_encoder.models.encoder_table import ENCODERS
from patch_encoder.models.encoders import CLASSICAL, build_encoder

# TRIDENT's and MIL-Lab's tables of widths; the other widths are those of the model cards
PUBLISHED_WIDTHS = {
    "resnet50": 1024, "resnet50_trunc": 1024, "resnet50_full": 2048, "uni": 1024, "uni2_h": 1536,
    "conch": 512,
    "conch_v1_5": 768, "virchow": 2560, "virchow2": 2560, "virchow2_cls": 1280, "phikon": 768,
    "phikon_v2": 1024,
    "gigapath": 1536, "h_optimus_0": 1536, "h_optimus_1": 1536, "h0_mini": 768, "musk": 1024,
    "midnight12k": 3072,
    "gpfm": 1024, "kaiko_vits16": 384, "kaiko_vitb8": 768, "kaiko_vitb16": 768,
    "kaiko_vitl14": 1024, "lunit_vits8": 384,
    "hibou_b": 768, "hibou_l": 1024, "ctranspath": 768, "plip": 512, "biomedclip": 512, "clip": 512,
    "clip_vitl14": 768, "openmidnight": 1536, "keep": 768, "mstar": 1024, "imagenet_lite0": 1280,
}  # fmt: skip
# millions of parameters as published: a wrong SwiGLU packing, depth or patch size shows here and
# not in the width
PUBLISHED_SIZES = {
    "uni": 303, "uni2_h": 681, "virchow": 631, "virchow2": 631, "gigapath": 1135,
    "h_optimus_0": 1135, "h0_mini": 86,
    "phikon": 86, "phikon_v2": 303, "ctranspath": 28, "hibou_b": 86, "hibou_l": 304,
    "midnight12k": 1135, "dinov2_vitg14": 1135,
    "dinov3_vits16plus": 29, "dinov3_vith16plus": 841, "dinov3_vit7b16": 6716, "clip_vitb32": 88,
    "resnet18": 11,
    "kaiko_vits16": 22, "brow": 86, "openmidnight": 1135, "mstar": 303, "keep": 305,
    "imagenet_lite0": 3,
}  # fmt: skip
# rows of an architecture that another row has, and the very largest: built with `-m slow`
REPEATED = (
    "resnet50_trunc", "mae_vitb16", "mae_vitl16", "mae_vith14", "dino_vits8", "dino_vitb8",
    "dinov2_vitb14", "dinov2_vitg14",
    "dinov2_vits14_reg", "dinov2_vitl14_reg", "dinov2_vitg14_reg", "dinov3_vith16plus",
    "dinov3_vit7b16", "clip_vitb16",
    "virchow", "virchow2_cls", "h_optimus_1", "kaiko_vits8", "kaiko_vitb16", "lunit_vits16",
    "quiltnet_b16", "brow", "mstar",
)  # fmt: skip
NETWORKS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in REPEATED else [])
    for name in ENCODERS
    if name not in CLASSICAL
]


@pytest.mark.parametrize("name", NETWORKS)
def test_row_builds_and_gives_its_width(name: str) -> None:
    row = ENCODERS[name]
    with torch.device("meta"):
        encoder = build_encoder(name, "random")
        side = row.fit.size
        features = encoder.model(torch.empty(2, 3, side, side, dtype=torch.uint8))
    assert tuple(features.shape) == (2, row.width) == (2, encoder.dim)
    assert encoder.dim == PUBLISHED_WIDTHS.get(name, encoder.dim)
    millions = sum(parameter.numel() for parameter in encoder.model.parameters()) / 1e6
    assert round(millions) == PUBLISHED_SIZES.get(name, round(millions))
    assert encoder.provenance["encoder"] == encoder.name == name


def test_published_widths_are_all_of_the_table() -> None:
    assert set(PUBLISHED_WIDTHS) <= set(ENCODERS)
    assert set(PUBLISHED_SIZES) <= set(ENCODERS)
    assert all(
        row.width == CLASSICAL[name][0] for name, row in ENCODERS.items() if name in CLASSICAL
    )


@pytest.mark.parametrize("name", list(ENCODERS))
def test_row_says_what_a_user_has_to_know(name: str) -> None:
    row = ENCODERS[name]
    if name in CLASSICAL:
        return
    assert row.licence
    assert row.citation
    assert row.precision in {"fp32", "bf16", "fp16"}
    assert row.weights.count("/") == 1 or name in {"brow", "imagenet_lite0"}
    assert (row.mpp is None) or (0.2 <= row.mpp <= 1.2 and row.tile)
    assert row.fit.size
    # CONCH, MUSK and DINOv3 aside, all are 224
    assert row.fit.size == {"conch": 448, "conch_v1_5": 448, "musk": 384}.get(
        name, 256 if name.startswith("dinov3") else 224
    )


@pytest.mark.parametrize(
    "name", [name for name, row in ENCODERS.items() if row.weights.startswith("timm/")]
)
def test_hub_names_are_those_that_the_libraries_know(name: str) -> None:
    import open_clip
    import timm

    row = ENCODERS[name]
    if row.library == "timm":
        published = timm.get_pretrained_cfg(row.weights.removeprefix("timm/"))
        assert published.hf_hub_id == row.weights
        assert row.weights.removeprefix("timm/") in timm.list_pretrained()
        assert (tuple(published.mean), tuple(published.std)) == row.statistics
    else:
        architecture = row.model.removesuffix("-quickgelu")
        assert (
            open_clip.get_pretrained_cfg(architecture, "openai")["hf_hub"].strip("/") == row.weights
        )
