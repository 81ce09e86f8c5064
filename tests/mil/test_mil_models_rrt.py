"""RRT-MIL against region by region loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import layer_norm

from common.errors import UserError
from mil.models.rrt import RRT, SelfAttention


def attended(layer: SelfAttention, x: torch.Tensor) -> torch.Tensor:
    """(P, F): head by head, the position code as a sum over shifted rows of the logits."""
    p, width = x.shape
    size = width // layer.heads
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, dim=1)
    outs = []
    for h in range(layer.heads):
        part = slice(h * size, (h + 1) * size)
        logits = q[:, part] @ k[:, part].T / math.sqrt(size)
        if layer.pe is not None:
            kernel = layer.pe.weight[h, 0, :, 0]
            coded = logits + layer.pe.bias[h]
            for i in range(p):
                for shift, w in enumerate(kernel, start=-(len(kernel) // 2)):
                    if 0 <= i + shift < p:
                        coded[i] += w * logits[i + shift]
            logits = coded
        outs.append(torch.softmax(logits, 1) @ v[:, part])
    return torch.cat(outs, 1) @ layer.proj[0].weight.T + layer.proj[0].bias


def cut(x: torch.Tensor, regions: int) -> tuple[torch.Tensor, list[list[int]]]:
    """The padded square's tokens and the members of each region."""
    side = next(s for s in range(regions, 99, regions) if s * s >= len(x))
    step = side // regions
    members = [
        [(r * step + i) * side + c * step + j for i in range(step) for j in range(step)]
        for r in range(regions)
        for c in range(regions)
    ]
    return torch.cat([x, torch.zeros(side * side - len(x), x.shape[1])]), members


def by_hand(model: RRT, bag: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    embedded = torch.relu(bag @ model.pooling.embed[0].weight.T + model.pooling.embed[0].bias)
    x, n, r = embedded, len(bag), model.region.regions
    tokens, members = cut(layer_norm(x, x.shape[1:], model.region.norm.weight, model.region.norm.bias), r)
    seen = torch.zeros_like(tokens)
    for region in members:
        seen[region] = attended(model.region.attn, tokens[region])
    x = x + seen[:n]
    tokens, members = cut(layer_norm(x, x.shape[1:], model.cross.norm.weight, model.cross.norm.bias), r)
    cross = model.cross.attn
    logits = [tokens[region] @ cross.phi for region in members]  # (P, k) each
    k = cross.phi.shape[1]
    summary = [[torch.softmax(part[:, t], 0) @ tokens[region] for t in range(k)] for part, region in zip(logits, members)]
    mixed = [attended(cross.attn, torch.stack([tokens_of[t] for tokens_of in summary])) for t in range(k)]  # k x (W, F)
    back = torch.zeros_like(tokens)
    for w, (part, region) in enumerate(zip(logits, members)):
        for i, place in enumerate(region):
            for t in range(k):
                low, high = part[:, t].min(), part[:, t].max()
                back[place] += torch.softmax(part[i], 0)[t] * (part[i, t] - low) / (high - low + 1e-8) * mixed[t][w]
    x = x + back[:n]
    if model.shortcut:
        x = x + embedded
    h = layer_norm(x, x.shape[1:], model.norm.weight, model.norm.bias)
    a = torch.softmax(torch.relu(h @ model.pooling.attend[0].weight.T) @ model.pooling.score.weight[0], 0)
    return model.pooling.head.weight @ (a @ h) + model.pooling.head.bias, a


@torch.no_grad()
@pytest.mark.parametrize(("n", "regions", "shortcut"), [(1, 2, False), (16, 2, False), (21, 2, True), (30, 3, False)])
def test_model_is_its_loops(n: int, regions: int, shortcut: bool):
    torch.manual_seed(0)
    model = RRT(6, 3, hidden=8, heads=2, regions=regions, epeg=3, tokens=2, shortcut=shortcut).eval()
    model.region.attn.pe.bias.fill_(0.3)
    bag = torch.randn(n, 6)
    logits, a = by_hand(model, bag)
    output = model(bag)
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.attention, a, rtol=1e-4, atol=1e-5)


def test_published_sizes():
    model = RRT(1024, 2)
    assert model.region.regions == model.cross.regions == 8 and model.region.attn.heads == model.cross.attn.attn.heads == 8
    assert model.region.attn.pe.weight.shape == (8, 1, 15, 1) and model.cross.attn.attn.pe is None
    assert model.cross.attn.phi.shape == (512, 3) and not model.shortcut


def test_even_kernel_is_refused():
    with pytest.raises(UserError, match="epeg=14"):
        RRT(6, 2, epeg=14)
