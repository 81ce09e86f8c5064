"""RRT-MIL against region by region loops, with the options of every published command."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import layer_norm
from torch.utils._python_dispatch import TorchDispatchMode

from mil.models import build
from mil.models.rrt import RRT, CrossRegion, SelfAttention
from wsi_common.errors import UserError


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


def token_logits(cross: CrossRegion, x: torch.Tensor) -> torch.Tensor:
    """(P, k), tile by tile."""
    if isinstance(cross.phi, torch.nn.Parameter):
        return torch.stack([cross.phi.T @ row for row in x])
    first, _, last = cross.phi
    return torch.stack([last.weight @ torch.tanh(first.weight @ row) for row in x])


def by_hand(model: RRT, bag: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    embedded = torch.relu(bag @ model.pooling.embed[0].weight.T + model.pooling.embed[0].bias)
    x, n, r = embedded, len(bag), model.region.regions
    tokens, members = cut(
        layer_norm(x, x.shape[1:], model.region.norm.weight, model.region.norm.bias), r
    )
    seen = torch.zeros_like(tokens)
    for region in members:
        seen[region] = attended(model.region.attn, tokens[region])
    x = x + seen[:n]
    tokens, members = cut(
        layer_norm(x, x.shape[1:], model.cross.norm.weight, model.cross.norm.bias), r
    )
    cross = model.cross.attn
    logits = [token_logits(cross, tokens[region]) for region in members]  # (P, k) each
    k = logits[0].shape[1]
    summary = [
        [torch.softmax(part[:, t], 0) @ tokens[region] for t in range(k)]
        for part, region in zip(logits, members)
    ]
    mixed = [
        attended(cross.attn, torch.stack([tokens_of[t] for tokens_of in summary])) for t in range(k)
    ]  # k x (W, F)
    back = torch.zeros_like(tokens)
    for w, (part, region) in enumerate(zip(logits, members)):
        for i, place in enumerate(region):
            for t in range(k):
                low, high = part[:, t].min(), part[:, t].max()
                back[place] += (
                    torch.softmax(part[i], 0)[t]
                    * (part[i, t] - low)
                    / (high - low + 1e-8)
                    * mixed[t][w]
                )
    x = x + back[:n]
    if model.shortcut:
        x = x + embedded
    h = layer_norm(x, x.shape[1:], model.norm.weight, model.norm.bias)
    act = {"relu": torch.relu, "tanh": torch.tanh}[activation]
    a = torch.softmax(act(h @ model.pooling.attend[0].weight.T) @ model.pooling.score.weight[0], 0)
    return model.pooling.head.weight @ (a @ h) + model.pooling.head.bias, a


CASES = [
    (1, {"regions": 2}),
    (16, {"regions": 2, "shortcut": False}),
    (21, {"regions": 2, "tokens": 2, "cross_heads": 1, "shortcut": False}),
    (21, {"regions": 2, "tokens": 3, "cross_heads": 4, "cross_mlp": True, "activation": "relu"}),
    (30, {"regions": 3, "tokens": 2, "shortcut": False, "activation": "relu"}),
]


@torch.no_grad()
@pytest.mark.parametrize(("n", "options"), CASES)
def test_model_is_its_loops(n: int, options: dict):
    torch.manual_seed(0)
    model = RRT(6, 3, hidden=8, heads=2, epeg=3, **options).eval()
    model.region.attn.pe.bias.fill_(0.3)
    bag = torch.randn(n, 6)
    logits, a = by_hand(model, bag, options.get("activation", "tanh"))
    output = model(bag)
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.attention, a, rtol=1e-4, atol=1e-5)


def test_defaults_are_the_published_command():
    """C16-R50 of the authors' README: --da_act=tanh --epeg_k=15 --crmsa_k=1 --all_shortcut; the
    rest as in their main.py.
    """
    model = RRT(1024, 2)
    assert (
        model.region.regions == model.cross.regions == 8
        and model.region.attn.heads == model.cross.attn.attn.heads == 8
    )
    assert model.region.attn.pe.weight.shape == (8, 1, 15, 1) and model.cross.attn.attn.pe is None
    assert model.cross.attn.phi.shape == (512, 1) and model.shortcut
    pooling = model.pooling
    assert isinstance(pooling.attend[1], torch.nn.Tanh) and pooling.attend[0].weight.shape == (
        128,
        512,
    )
    assert pooling.attend[0].bias is None and pooling.gate is None
    assert (
        pooling.embed[2].dropped == 64
        and model.region.attn.proj[1].dropped == model.cross.attn.attn.proj[1].dropped == 26
    )


def test_the_other_published_commands_can_be_set():
    plip = build("rrt", 512, 2, epeg=13, tokens=3, cross_heads=1, cross_mlp=True)  # TCGA-NSCLC-PLIP
    assert [tuple(p.shape) for p in plip.cross.attn.phi.parameters()] == [(128, 512), (3, 128)]
    assert plip.cross.attn.attn.heads == 1 and plip.region.attn.heads == 8
    first, last = plip.cross.attn.phi[0].weight.detach(), plip.cross.attn.phi[2].weight.detach()
    assert float(first.std()) == pytest.approx(
        math.sqrt(2 / (128 + 512)), rel=0.03
    )  # Xavier, as all linear layers
    assert float(last.std()) == pytest.approx(math.sqrt(2 / (128 + 3)), rel=0.2)


def test_weights_start_as_the_authors():
    torch.manual_seed(0)
    model = RRT(64, 2, tokens=3)
    phi, kernel = model.cross.attn.phi.detach(), model.region.attn.pe.weight.detach()
    # torch takes the k columns for the inputs: bound sqrt(6 / (1 + 5) / k)
    assert (
        float(phi.abs().max()) == pytest.approx(3**-0.5, rel=0.01) and abs(float(phi.mean())) < 0.05
    )
    # a depthwise convolution: 15 inputs and 8 * 15 outputs a unit
    assert float(kernel.std()) == pytest.approx(math.sqrt(2 / (15 + 120)), rel=0.2)
    assert not model.region.attn.pe.bias.any() and not model.region.attn.pe.bias.requires_grad


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [
            x
            for x in (out if isinstance(out, (tuple, list)) else (out,))
            if isinstance(x, torch.Tensor)
        ]
        self.numbers = max([self.numbers, *(x.numel() for x in tensors)])
        return out


def test_no_attention_matrix_is_made():
    """900 tiles in 2 x 2 regions: the logits, 4 regions x 2 heads x 225 x 225, would be 405,000
    numbers.
    """
    model, bag = RRT(16, 2, hidden=16, heads=2, regions=2, epeg=3).train(), torch.randn(900, 16)
    with Largest() as largest:
        model(bag).logits.sum().backward()
    assert largest.numbers == 900 * 128  # the pooling's attention layer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epeg": 14}, "epeg=14, regions=8, tokens=1: expected an odd number"),
        ({"tokens": 0}, "tokens=0"),
        ({"regions": 0}, "regions=0"),
        ({"hidden": 12}, "hidden=12: expected a multiple of heads=8"),
        ({"cross_heads": 7}, "hidden=512: expected a multiple of cross_heads=7"),
        ({"heads": 0}, "multiple of heads=0"),
        ({"activation": "tan"}, "activation=tan: did you mean 'tanh'"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        RRT(6, 2, **options)
