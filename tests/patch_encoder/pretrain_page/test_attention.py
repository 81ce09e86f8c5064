"""Attention maps are those of the last block, whatever tokens a ViT has; other networks have the
strength of their last feature map.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from patch_encoder.models.encoders import PixelEncoder
from patch_encoder.pretrain_page.attention import (
    NORM,
    attend,
    describe_maps,
    has_class_attention,
    make_maps,
)
from patch_encoder.pretrain_page.slide_map import (
    SlideMap,
    choose_tiles,
    draw_first_slide,
    draw_slide,
    order_sources,
)
from patch_encoder.selfdistill.backbone import build_student_backbone
from patch_encoder.slides import open_slide
from patch_encoder.tile_stream.sources import find_sources
from patch_encoder.tiles.grid import read_tile
from tests.training_rows import slides_inputs
from wsi_common.errors import UserError

STATISTICS = ((0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
TILES = torch.randint(0, 256, (2, 3, 64, 48), generator=torch.manual_seed(0), dtype=torch.uint8)


def build(arch: str, **options: Any) -> PixelEncoder:
    torch.manual_seed(0)
    network = build_student_backbone(arch, image_size=64, **options)
    return PixelEncoder(network, STATISTICS).eval()


@pytest.mark.parametrize("registers", [0, 4])
def test_attention_is_what_the_last_block_weighs_its_values_with(registers: int) -> None:
    """The weights, put in front of the block's own values, give what its projection gets for the
    class token.
    """
    encoder = build("vit_tiny", patch_size=16, registers=registers)
    network: Any = encoder.network
    seen: dict[str, Tensor] = {}
    attention = network.blocks[-1].attn
    attention.qkv.register_forward_hook(lambda _, inputs, out: seen.setdefault("qkv", out))
    attention.proj.register_forward_pre_hook(lambda _, inputs: seen.setdefault("in", inputs[0]))
    pixels = encoder.scaled(TILES)
    with torch.no_grad():
        shares = attend(network, pixels)
    tokens = 1 + registers + 4 * 3
    assert shares.shape == (2, 3, tokens)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3))
    values = seen["qkv"][..., 2 * 192 :].unflatten(-1, (3, 64))  # (B, N, heads, width)
    weighed = torch.einsum("bhn,bnhd->bhd", shares, values).flatten(1)
    torch.testing.assert_close(weighed, seen["in"][:, 0], rtol=1e-4, atol=1e-5)
    assert not attention._forward_pre_hooks, "nothing stays in the network"

    maps = make_maps(encoder, TILES)
    assert maps.shape == (2, 3, 4, 3)
    torch.testing.assert_close(maps.flatten(2), shares[..., 1 + registers :])


def test_attention_follows_a_patch_that_the_class_token_asks_for() -> None:
    """With keys that are the patches' brightness, the bright patch has nearly all attention."""
    encoder = build("vit_tiny", patch_size=16)
    attention: Any = encoder.network.blocks[-1].attn  # type: ignore[union-attr,index]
    seen: list[Tensor] = []
    attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tiles = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    tiles[:, :, 16:32, 48:64] = 255
    make_maps(encoder, tiles)
    tokens = seen[0][0]
    with torch.no_grad():
        direction = tokens[1 + 7] - tokens[1:].mean(0)  # of the patch in row 1, column 3
        attention.qkv.weight.zero_()
        attention.qkv.bias.zero_()
        attention.qkv.bias[0::64][:3] = 40.0
        attention.qkv.weight[192 : 2 * 192 : 64] = direction
    maps = make_maps(encoder, tiles)[0]
    assert (maps.flatten(1).argmax(1) == 7).all() and maps[:, 1, 3].min() > 0.5


@pytest.mark.parametrize(
    ("arch", "channels"), [("resnet18", 1), ("timm:swin_tiny_patch4_window7_224", -1)]
)
def test_networks_without_a_class_token_show_the_length_of_their_last_vectors(
    arch: str, channels: int
) -> None:
    encoder = build(arch)
    network: Any = encoder.network
    assert describe_maps(network) == NORM
    tiles = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        features = network.forward_features(encoder.scaled(tiles))
    maps = make_maps(encoder, tiles)
    assert maps.shape == (2, 1, 7, 7)
    torch.testing.assert_close(maps[:, 0], features.square().sum(channels).sqrt())


def test_a_vit_that_pools_its_patches_has_no_attention_to_show() -> None:
    network = timm.create_model("test_vit", class_token=False, global_pool="avg", img_size=64)
    encoder = PixelEncoder(network, STATISTICS).eval()
    tiles = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert isinstance(network, VisionTransformer) and not has_class_attention(network)
    with torch.no_grad():
        tokens = network.forward_features(encoder.scaled(tiles))
    expected = tokens.norm(dim=-1).unflatten(-1, (4, 4))
    torch.testing.assert_close(make_maps(encoder, tiles)[:, 0], expected)


def test_maps_lie_where_their_tiles_are() -> None:
    drawn = SlideMap(0.25, (40, 60))
    values = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    drawn.paste(values, 80, 40, 64)
    drawn.paste(values + 2, 80, 40, 64)  # overlaps: the mean
    drawn.paste(values, -32, 136, 64)  # past the left and the lower border
    expected = np.zeros((40, 60))
    for row, col in np.ndindex(2, 2):
        expected[10 + 8 * row : 18 + 8 * row, 20 + 8 * col : 28 + 8 * col] = values[row, col] + 1
    expected[34:40, 0:8] = 2.0  # the right half of the first row
    mean = drawn.total / np.maximum(drawn.weight, 1)
    np.testing.assert_allclose(mean, expected)
    glass = np.full((40, 60, 3), 200, np.uint8)
    shown = drawn.colours(glass)
    assert (shown[drawn.weight == 0] == 200).all() and (shown[drawn.weight > 0] != 200).any()


def test_a_slide_is_mapped_tile_by_tile(tmp_path: Path) -> None:
    """Batches hold the stored tiles in their order; more tiles than allowed are thinned out."""
    slides_inputs(tmp_path)
    sources = find_sources(tmp_path / "corpus", {})
    seen: list[np.ndarray] = []

    def measure(pictures: np.ndarray) -> np.ndarray:
        seen.extend(pictures)
        return pictures.mean(axis=3)[:, None, :2, :2] / 255

    drawn = draw_slide(sources[0], 9, measure)
    chosen = sources[0].coordinates.coords[choose_tiles(25, 9)]
    assert (drawn.tiles, drawn.all_tiles, drawn.unread) == (9, 25, 0)
    assert len(seen) == 9 and drawn.map.shape == drawn.overview.shape == (192, 192, 3)
    with open_slide(sources[0].path) as slide:
        for picture, (x, y) in zip(seen, chosen.tolist(), strict=True):
            expected = read_tile(slide, sources[0].coordinates.geometry, x, y)
            np.testing.assert_array_equal(picture, expected)


def test_the_slide_with_most_tiles_that_are_not_too_many_is_shown(tmp_path: Path) -> None:
    """A slide that cannot be opened makes room for the next one."""
    slides_inputs(tmp_path)
    corpus = tmp_path / "corpus"
    corners = np.load(corpus / "site0" / "s0.npy")
    for number, count in enumerate((3, 9, 5, 25, 24, 25)):
        np.save(corpus / f"site{number % 2}" / f"s{number}.npy", corners[:count])
    sources = find_sources(corpus, {})
    ordered = [source.slide_id for source in order_sources(sources, 10)]
    assert ordered == ["s1", "s2", "s0", "s4", "s3", "s5"]
    assert order_sources(sources, 2)[0].slide_id == "s0"
    assert choose_tiles(25, 3).tolist() == [0, 12, 24] and len(choose_tiles(5, 9)) == 5

    def blank(pictures: np.ndarray) -> np.ndarray:
        return np.zeros((len(pictures), 1, 2, 2), np.float32)

    (corpus / "site1" / "s1.tiff").write_bytes(b"no slide")
    assert draw_first_slide(sources, 10, blank).name == "site0/s2"
    for file in corpus.rglob("*.tiff"):
        file.write_bytes(b"no slide")
    with pytest.raises(UserError, match="none that can be opened"):
        draw_first_slide(sources, 10, blank)
