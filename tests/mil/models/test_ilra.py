"""ILRA-MIL against attention written out head by head."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm

from mil.models.ilra import ILRA, CrossAttention

BAG = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))


def attended(
    block: CrossAttention, queries: torch.Tensor, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 16's block and its mean attention, head by head."""
    inner, heads = block.attention, block.attention.num_heads
    q0 = block.fc_q(queries)
    wq, wk, wv = inner.in_proj_weight.chunk(3)
    bq, bk, bv = inner.in_proj_bias.chunk(3)
    q, k, v = q0 @ wq.T + bq, block.fc_k(keys) @ wk.T + bk, block.fc_v(keys) @ wv.T + bv
    size, outs, maps = q.shape[1] // heads, [], []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        a = torch.softmax(q[:, part] @ k[:, part].T / size**0.5, 1)
        maps.append(a)
        outs.append(a @ v[:, part])
    seen = torch.cat(outs, 1) @ inner.out_proj.weight.T + inner.out_proj.bias
    norms = [block.norm0, block.norm1]

    def norm(x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        return (
            layer_norm(x, x.shape[-1:], layer.weight, layer.bias)
            if isinstance(layer, torch.nn.LayerNorm)
            else x
        )

    out = norm(q0 + seen, norms[0])
    out = norm(out + torch.relu(out @ block.fc_o.weight.T + block.fc_o.bias), norms[1])
    if block.gate is not None:
        g = queries @ block.gate[0].weight.T + block.gate[0].bias
        out = out * g * torch.sigmoid(g)
    return out, sum(maps) / heads


@torch.no_grad()
@pytest.mark.parametrize(("rank", "layers", "norm"), [(1, 2, True), (3, 1, True), (2, 2, False)])
def test_blocks_and_pooling_are_attention_through_latents(rank: int, layers: int, norm: bool):
    torch.manual_seed(0)
    model = ILRA(6, 3, hidden=16, heads=4, rank=rank, layers=layers, norm=norm).eval()
    tiles = BAG
    for block in model.blocks:
        assert block.latent.shape == (rank, 16)
        low, _ = attended(block.project_forward, block.latent, tiles)
        tiles, _ = attended(block.project_backward, tiles, low)
    bag, attention = attended(model.pooling, model.query, tiles)
    output = model(BAG)
    torch.testing.assert_close(
        output.logits, model.head.weight @ bag[0] + model.head.bias, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(output.attention, attention[0], rtol=1e-5, atol=1e-6)


def test_latents_and_query_start_xavier_uniform():
    torch.manual_seed(0)
    model = ILRA(8, 2, rank=4)
    for start, rows in ((model.blocks[0].latent, 4), (model.blocks[1].latent, 4), (model.query, 1)):
        bound = (6 / (rows + 256)) ** 0.5
        assert (
            start.shape == (rows, 256) and 0.9 * bound < float(start.detach().abs().max()) <= bound
        )
        assert abs(float(start.detach().std()) - bound / 3**0.5) < 0.2 * bound


def test_published_sizes():
    model = ILRA(1024, 2)
    assert len(model.blocks) == 2 and model.blocks[0].latent.shape == (1, 256)
    assert model.pooling.attention.num_heads == 8 and isinstance(
        model.pooling.norm0, torch.nn.LayerNorm
    )
    assert model.pooling.gate is None and model.blocks[0].project_forward.gate is not None
