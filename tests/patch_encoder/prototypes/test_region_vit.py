"""The region encoder: HIPT's size, keys and arithmetic, and a mask behind which nothing counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from patch_encoder.prototypes.region_packing import cut_cluster_view, pack_regions
from patch_encoder.prototypes.region_vit import RegionViT
from patch_encoder.selfdistill.head import DINOHead
from patch_encoder.selfdistill.student import SelfDistilled, make_teacher
from wsi_common.checkpoint import load_weights
from wsi_common.errors import UserError

State = dict[str, Tensor]


def published_state() -> State:
    """Random weights with the names and shapes of HIPT's `vit4k_xs`."""
    shapes = {
        "cls_token": (1, 1, 192), "pos_embed": (1, 197, 192),
        "phi.0.weight": (192, 384), "phi.0.bias": (192,),
    }  # fmt: skip
    block = {"norm1": (192,), "attn.qkv": (576, 192), "attn.proj": (192, 192), "norm2": (192,),
             "mlp.fc1": (768, 192), "mlp.fc2": (192, 768)}  # fmt: skip
    for number in range(6):
        for name, shape in block.items():
            shapes[f"blocks.{number}.{name}.weight"] = shape
            shapes[f"blocks.{number}.{name}.bias"] = shape[:1]
    shapes |= {"norm.weight": (192,), "norm.bias": (192,)}
    generator = torch.Generator().manual_seed(0)
    return {n: 0.05 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}


def run_by_hand(state: State, features: Tensor) -> Tensor:
    """HIPT's forward pass of one region (D, g, g) without glass, written out."""
    width, heads, side = 192, 6, features.shape[-1]
    x = F.gelu(features.flatten(1).T @ state["phi.0.weight"].T + state["phi.0.bias"])
    x = torch.cat([state["cls_token"][0], x])
    places = state["pos_embed"][:, 1:].transpose(1, 2).reshape(1, width, 14, 14)
    if side != 14:
        factor = (side + 0.1) / 14
        places = F.interpolate(places, scale_factor=(factor, factor), mode="bicubic")
    x = x + torch.cat([state["pos_embed"][0, :1], places[0].flatten(1).T])

    def norm(x: Tensor, name: str) -> Tensor:
        spread = x.var(-1, unbiased=False, keepdim=True)
        scaled = (x - x.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for block in (f"blocks.{number}." for number in range(6)):
        parts = linear(norm(x, f"{block}norm1"), f"{block}attn.qkv").split(width, dim=1)
        q, k, v = (part.unflatten(1, (heads, -1)).transpose(0, 1) for part in parts)
        attention = (q @ k.mT / math.sqrt(width / heads)).softmax(-1)
        x = x + linear((attention @ v).transpose(0, 1).flatten(1), f"{block}attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}norm2"), f"{block}mlp.fc1"))
        x = x + linear(hidden, f"{block}mlp.fc2")
    return norm(x, "norm")[0]


def draw_regions(count: int, side: int, width: int, share: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(side)
    features = torch.randn(count, side, side, width, generator=generator)
    return features, torch.rand(count, side, side, generator=generator) < share


def small(drop_path: float = 0.0) -> RegionViT:
    torch.manual_seed(0)
    return RegionViT(12, width=24, depth=3, heads=4, grid=5, drop_path=drop_path)


def test_the_published_size() -> None:
    with torch.device("meta"):
        network = RegionViT()
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_781_504
    assert network.num_features == 192


@pytest.mark.parametrize("side", [14, 16, 6])
def test_files_of_hipt_give_hipts_embeddings(side: int) -> None:
    """Every key is used, and positions on other grids are interpolated as there."""
    state, network = published_state(), RegionViT().eval()
    load_weights(network, state, "vit4k_xs.pth")
    features, valid = draw_regions(2, side, 384)
    with torch.no_grad():
        found = network(pack_regions(features, valid))
    expected = torch.stack([run_by_hand(state, region.permute(2, 0, 1)) for region in features])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.std() > 0.01


def test_weights_of_another_shape_are_refused() -> None:
    state = published_state()
    with pytest.raises(UserError, match=r"1 missing \['norm.bias'\]"):
        load_weights(RegionViT(), {n: v for n, v in state.items() if n != "norm.bias"}, "file")
    with pytest.raises(UserError, match="of another shape"):
        load_weights(RegionViT(in_dim=512), state, "file")


def test_what_invalid_tiles_hold_changes_nothing() -> None:
    """Not the embedding and no gradient, even where it is no number."""
    network = small()
    features, valid = draw_regions(3, 5, 12, share=0.5)
    results = []
    for content in (0.0, 7.0, float("nan")):
        filled = features.masked_fill(~valid[..., None], content)
        network.zero_grad()
        embedding = network(pack_regions(filled, valid))
        embedding.sum().backward()
        results.append((embedding.detach(), network.phi[0].weight.grad.clone()))
    for embedding, gradient in results[1:]:
        assert torch.equal(embedding, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_the_network_itself_does_not_look_at_invalid_tiles() -> None:
    network = small()
    packed = pack_regions(*draw_regions(3, 5, 12, share=0.5))
    other = packed.clone()
    other[:, :-1] = torch.where(packed[:, -1:] > 0, packed[:, :-1], 3.0)
    with torch.no_grad():
        torch.testing.assert_close(network(other), network(packed), rtol=0, atol=1e-6)


def test_valid_tiles_count_with_their_place() -> None:
    network = small()
    features, valid = draw_regions(1, 5, 12, share=0.5)
    with torch.no_grad():
        plain = network(pack_regions(features, valid))
        turned = network(pack_regions(features.flip(1), valid.flip(1)))
        fewer = valid.clone()
        fewer[tuple(valid.nonzero()[0])] = False
        assert not torch.allclose(network(pack_regions(features, fewer)), plain)
    assert not torch.allclose(turned, plain)


def test_a_region_without_tiles_has_a_finite_embedding() -> None:
    features, valid = draw_regions(2, 5, 12)
    valid[1] = False
    network = small()
    embedding = network(pack_regions(features, valid))
    assert embedding.isfinite().all()
    embedding[1].sum().backward()
    assert not network.phi[0].weight.grad.any(), "the class token alone"


def test_stochastic_depth_rises_and_the_teacher_has_none() -> None:
    student = SelfDistilled(small(drop_path=0.6), DINOHead(24, 16, 8, 4))
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in student.backbone.blocks]
    assert rates == pytest.approx([0.0, 0.3, 0.6])
    views = [pack_regions(*draw_regions(4, side, 12)) for side in (5, 5, 2)]
    teacher = make_teacher(student)
    logits, features = teacher(views)
    assert (logits.shape, features.shape) == ((12, 16), (12, 24))
    assert torch.equal(teacher(views)[0], logits)
    assert not torch.equal(student(views)[0], student(views)[0])


def test_half_precision() -> None:
    network, packed = small(), pack_regions(*draw_regions(2, 4, 12))
    with torch.autocast("cpu", torch.bfloat16):
        found = network(packed)
    torch.testing.assert_close(found.float(), network(packed), rtol=0.1, atol=0.1)


def test_packing_keeps_tiles_as_rows() -> None:
    features, valid = draw_regions(2, 4, 5, share=0.5)
    packed = pack_regions(features.half(), valid)
    assert packed.shape == (2, 6, 4, 4) and packed.dtype == torch.float32
    assert packed.permute(0, 2, 3, 1).is_contiguous()
    assert torch.equal(packed[:, -1] > 0, valid)
    expected = features.half().float() * valid[..., None]
    assert torch.equal(packed[:, :-1].permute(0, 2, 3, 1), expected)


def test_the_cluster_view_is_the_middle_or_the_region() -> None:
    packed = pack_regions(*draw_regions(2, 16, 3, share=0.9))
    assert cut_cluster_view(packed, "full") is packed
    assert torch.equal(cut_cluster_view(packed, "center14"), packed[:, :, 1:15, 1:15])
    eight = pack_regions(*draw_regions(2, 8, 3))
    assert cut_cluster_view(eight, "center14").shape == (2, 4, 7, 7)


def test_the_cluster_view_moves_to_where_tiles_are() -> None:
    valid = torch.zeros(3, 16, 16, dtype=torch.bool)
    valid[0, 15, 4] = True  # only below the middle
    valid[1, 0, 0] = True  # only above and left of it
    features = torch.randn(3, 16, 16, 3)
    found = cut_cluster_view(pack_regions(features, valid), "center14")
    assert found[:, -1].sum((1, 2)).tolist() == [1, 1, 0]
    assert torch.equal(found[0, :3, 13, 3], features[0, 15, 4])
    assert torch.equal(found[1, :3, 0, 0], features[1, 0, 0])


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="width=25: expected a multiple of the 4 heads"):
        RegionViT(width=25, heads=4)
