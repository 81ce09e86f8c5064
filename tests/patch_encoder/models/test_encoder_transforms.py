"""Transforms against the libraries' own processors on random tiles: equal, or one grey level where
the reason is written.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from patch_encoder.models.encoder_names import RESAMPLING, _processor, find_row
from patch_encoder.models.encoder_table import ENCODERS, EncoderRow
from patch_encoder.models.encoders import CLASSICAL, PixelEncoder
from patch_encoder.models.transforms import Fit, ToInputSize

SQUARES = [(224, 224), (256, 256), (512, 512), (97, 97)]
SIZES = [*SQUARES, (300, 211), (230, 401)]


def tile(height: int, width: int) -> np.ndarray:
    """Noise over a gradient: no filter gets away with a wrong kernel, none saturates everywhere."""
    noise = np.random.default_rng(height * 1000 + width).integers(0, 120, (height, width, 3))
    ramp = np.linspace(0, 135, width)[None, :, None]
    return (noise + ramp).astype(np.uint8)


def ours(row: EncoderRow, pixels: np.ndarray) -> Tensor:
    """What the network gets, (3, h, w)."""
    flat = PixelEncoder(nn.Identity(), row.statistics)
    return flat.forward.__wrapped__(flat, ToInputSize(row.fit)(pixels)[None])[0]


def levels(row: EncoderRow, found: Tensor, expected: Tensor) -> float:
    """Largest difference in grey levels."""
    assert found.shape == expected.shape
    return float(
        ((found - expected).abs() * torch.tensor(row.statistics[1]).view(3, 1, 1) * 255).max()
    )


TIMM = [
    "timm:resnet50.tv_in1k", "timm:vit_base_patch16_224.mae", "timm:vit_small_patch16_224.dino",
    "timm:test_vit.r160_in1k",
    "timm:vit_base_patch14_dinov2.lvd142m", "timm:vit_small_patch16_dinov3_qkvb.lvd1689m",
    "timm:vit_base_patch16_siglip_224.v2_webli",    "timm:beit3_base_patch16_224.in22k_ft_in1k",
]  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_see_what_timm_makes(name: str) -> None:
    import timm.data

    row = find_row(name)
    settings = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg(name.removeprefix("timm:")).to_dict()
    )
    processor = timm.data.create_transform(**settings, is_training=False)
    for size in SIZES:
        assert (
            levels(row, ours(row, tile(*size)), processor(Image.fromarray(tile(*size)))) < 1e-3
        ), size


@pytest.mark.parametrize("name", ["dinov3_vitb16", "kaiko_vits16", "lunit_vits16"])
def test_timm_rows_of_the_table_see_the_square_that_timm_makes(name: str) -> None:
    import timm.data

    row = ENCODERS[name]
    processor = timm.data.create_transform(
        (3, row.fit.size, row.fit.size), is_training=False, interpolation=row.fit.interpolation,
        mean=row.statistics[0],
        std=row.statistics[1], crop_pct=1.0,
    )  # fmt: skip
    for size in SIZES:
        assert levels(row, ours(row, tile(*size)), processor(Image.fromarray(tile(*size)))) < 1e-3


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("clip", "ViT-B-16/laion2b_s34b_b88k"), ("clip_vitb32", "ViT-B-32/openai"),
        ("clip_vitl14", "ViT-L-14/openai"),
        ("open_clip:ViT-B-16-SigLIP/webli", "ViT-B-16-SigLIP/webli"),
        ("open_clip:ViT-L-14-336/openai", "ViT-L-14-336/openai"),
    ],
)  # fmt: skip
def test_open_clip_rows_see_what_open_clip_makes(name: str, tag: str) -> None:
    import open_clip

    row = find_row(name)
    architecture, _, weights = tag.partition("/")
    published = open_clip.get_pretrained_cfg(architecture, weights)
    wanted = {
        key: published[key]
        for key in ("mean", "std", "interpolation", "resize_mode")
        if key in published
    }
    processor = open_clip.image_transform(row.fit.size, is_train=False, **wanted)
    for size in SIZES:
        assert levels(row, ours(row, tile(*size)), processor(Image.fromarray(tile(*size)))) < 1e-3


def torchvision_pipeline(row: EncoderRow) -> Callable[[Image.Image], Tensor]:
    """The pipeline of the model cards, as their authors write it."""
    from torchvision import transforms

    first, crop, filtering = CARDS[row.weights]
    steps = [
        transforms.Resize(first, filtering),
        transforms.CenterCrop(crop),
        transforms.ToTensor(),
    ]
    return transforms.Compose([*steps, transforms.Normalize(*row.statistics)])


BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
CARDS = {
    "MahmoodLab/UNI": (224, 224, BILINEAR),
    "MahmoodLab/UNI2-h": (224, 224, BILINEAR),
    "MahmoodLab/CONCH": (448, 448, BICUBIC),
    "paige-ai/Virchow2": (224, 224, BICUBIC),
    "prov-gigapath/prov-gigapath": (256, 224, BICUBIC),
    "kaiko-ai/midnight": (224, 224, BILINEAR),
    "owkin/phikon-v2": (224, 224, BILINEAR),
    "xiangjx/musk": (384, 384, BICUBIC),
    "Astaxanthin/KEEP": (224, 224, BICUBIC),
    "timm/resnet50.tv_in1k": (
        224,
        224,
        BILINEAR,
    ),  # CLAM: the whole tile, without timm's crop of a photograph
}


@pytest.mark.parametrize(
    "name",
    [
        "uni",
        "uni2_h",
        "conch",
        "virchow2",
        "gigapath",
        "midnight12k",
        "phikon_v2",
        "musk",
        "keep",
        "resnet50_trunc",
    ],
)
def test_pathology_rows_see_what_their_cards_write(name: str) -> None:
    from torchvision.transforms import InterpolationMode

    row = ENCODERS[name]
    filters = {BILINEAR: InterpolationMode.BILINEAR, BICUBIC: InterpolationMode.BICUBIC}
    card = CARDS[row.weights]
    CARDS[row.weights] = (*card[:2], filters.get(card[2], card[2]))
    processor = torchvision_pipeline(row)
    for size in SIZES:
        assert levels(row, ours(row, tile(*size)), processor(Image.fromarray(tile(*size)))) < 1e-3


def transformers_processors() -> dict[str, tuple[str, dict[str, object]]]:
    """Row -> (processor class, its published settings where they are not the class's own)."""
    imagenet = {
        "image_mean": list(ENCODERS["phikon"].statistics[0]),
        "image_std": list(ENCODERS["phikon"].statistics[1]),
    }
    return {
        "plip": ("CLIPImageProcessor", {}),
        "phikon": ("ViTImageProcessor", {"size": {"height": 224, "width": 224}, **imagenet}),
        "mae_vitb16": ("ViTImageProcessor", {"size": {"height": 224, "width": 224}, **imagenet}),
        "dinov2_vitb14": (
            "BitImageProcessor",
            {
                "size": {"shortest_edge": 256},
                "crop_size": {"height": 224, "width": 224},
                "resample": 3,
                **imagenet,
            },
        ),
    }


@pytest.mark.parametrize("name", list(transformers_processors()))
def test_transformers_rows_see_what_its_processors_make(name: str) -> None:
    import transformers

    kind, settings = transformers_processors()[name]
    row = ENCODERS[name]
    # on PIL, as the weights' authors ran it; transformers 5 has this beside its new default,
    # version 4 as the only one
    reference = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    for size in SQUARES:
        # an odd margin of an oblong picture is halved the other way round there; tiles are square
        expected = reference(**settings)(Image.fromarray(tile(*size)), return_tensors="pt")[
            "pixel_values"
        ][0]
        assert levels(row, ours(row, tile(*size)), expected) < 1e-3, size
        # the new default resizes with torchvision's fixed-point kernel, which rounds otherwise, in
        # each of two passes
        fast = getattr(transformers, kind)(**settings)(
            Image.fromarray(tile(*size)), return_tensors="pt"
        )["pixel_values"][0]
        assert levels(row, ours(row, tile(*size)), fast) < 2.01, size
        assert ((ours(row, tile(*size)) - fast).abs() > 1e-3).float().mean() < 0.02, size


@pytest.mark.parametrize("name", list(transformers_processors()))
def test_processor_files_are_read_as_the_rows_say(name: str) -> None:
    import transformers

    kind, settings = transformers_processors()[name]
    fit, statistics = _processor(getattr(transformers, kind)(**settings).to_dict())
    row = ENCODERS[name]
    assert (fit, statistics) == (row.fit, row.statistics)
    # the short form of older files
    old = {
        "size": 224,
        "do_resize": True,
        "do_normalize": True,
        "resample": 3,
        "crop_size": 224,
        "do_center_crop": True,
    }
    assert _processor(old)[0] == Fit(224, 224)
    assert _processor({"size": 224, "resample": 2})[0] == Fit(224, None, "bilinear", squash=True)
    assert {RESAMPLING[number] for number in (2, 3)} == {"bilinear", "bicubic"}


@pytest.mark.parametrize("size", SIZES)
def test_every_rule_gives_the_input_that_its_network_takes(size: tuple[int, int]) -> None:
    for name, row in ENCODERS.items():
        if name in CLASSICAL or (row.fit.side is None and min(size) < 224):
            continue
        item = ToInputSize(row.fit)(tile(*size))
        assert item.shape == (3, row.fit.size, row.fit.size), name
        assert item.dtype == torch.uint8
        assert item.is_contiguous()
        assert row.fit.whole()(tile(*size)).shape == (row.fit.size, row.fit.size, 3)


def test_rules_by_hand() -> None:
    pixels = tile(256, 256)
    assert np.array_equal(Fit(None, 224)(pixels), pixels[16:240, 16:240])
    assert np.array_equal(Fit(256, 224)(pixels), pixels[16:240, 16:240])
    assert Fit(None)(pixels) is pixels
    assert (repr(Fit(None)), repr(Fit(224, 224)), repr(Fit(256, 224, "bilinear"))) == (
        "native size", "resize(224, bicubic)", "resize(256, bilinear), crop(224)",
    )  # fmt: skip
    assert Fit(256, 224).whole() == Fit(224, None, squash=True)
