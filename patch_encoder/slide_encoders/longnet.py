"""LongNet's transformer with dilated attention, in plain PyTorch.

Source: Ding et al., "LongNet", arXiv 2307.02486, section 3.2, as microsoft/torchscale and
prov-gigapath/prov-gigapath run it (pre-norm with sub-layer norms, no relative positions). For each
pair of a segment length s and a dilation r the tokens are cut into segments, and in each segment
the i-th of r groups of heads attends among the tokens i, i + r, i + 2r, ...; a token's results of
all pairs are added up with weights in proportion to their softmax denominators (equation 10).
Differences: no flash-attn, so that it runs on a CPU; queries go block by block, so that memory does
not grow with the square of the tokens. Where a segment is filled up, the added keys are zeros that
take part in the softmax, as in torchscale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

BLOCK = 1 << 25  # attention weights that are computed at a time


class DilatedAttention(nn.Module):
    """Self-attention that grows linearly with the number of tokens.

    Args:
        width: of a token.
        heads: number H of heads, a multiple of every ratio.
        segments: lengths s in tokens.
        ratios: dilation r of each of them; the first is 1, so that every token is in some segment.
    """

    def __init__(
        self, width: int, heads: int, segments: Sequence[int], ratios: Sequence[int]
    ) -> None:
        super().__init__()
        assert width % heads == 0 and all(heads % ratio == 0 for ratio in ratios), (heads, ratios)
        self.heads, self.pairs = heads, tuple(zip(segments, ratios, strict=True))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.inner_attn_ln = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "l w"]) -> Float[Tensor, "l w"]:
        """Tokens of one sequence."""
        q, k, v = (
            project(x).unflatten(1, (self.heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        parts = [attend_dilated(q, k, v, *pair) for pair in self.pairs]
        outputs = torch.stack([output for output, _ in parts])  # (pairs, L, H, E)
        shares = torch.softmax(torch.stack([total for _, total in parts]), dim=0)
        mixed = (outputs * shares[..., None].to(outputs.dtype)).sum(0)
        return self.out_proj(self.inner_attn_ln(mixed.flatten(1)))


def attend_dilated(
    q: Float[Tensor, "l h e"],
    k: Float[Tensor, "l h e"],
    v: Float[Tensor, "l h e"],
    segment: int,
    ratio: int,
) -> tuple[Float[Tensor, "l h e"], Float[Tensor, "l h"]]:
    """Attention within segments, each group of heads among its own tokens.

    Returns:
        The result of every token and head, 0 where a head leaves the token out, and the logarithm
        of its softmax denominator, -inf there.
    """
    length, heads, _ = q.shape
    segment = min(segment, length)
    padded = -(-segment // ratio) * ratio
    q, k, v = (_cut(x, segment, padded) for x in (q, k, v))  # (S, padded, H, E)
    output = torch.zeros_like(q)
    total = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    group = heads // ratio
    for start in range(ratio):
        own = slice(start * group, (start + 1) * group)
        picked = (x[:, start::ratio, own].transpose(1, 2) for x in (q, k, v))  # (S, h, m, E)
        result, logs = attend(*picked)
        output[:, start::ratio, own] = result.transpose(1, 2)
        total[:, start::ratio, own] = logs.transpose(1, 2)
    return output[:, :segment].flatten(0, 1)[:length], total[:, :segment].flatten(0, 1)[:length]


def _cut(x: Float[Tensor, "l h e"], segment: int, padded: int) -> Float[Tensor, "s p h e"]:
    """Segments of a sequence, zeros where it ends, each filled up with zeros to `padded` tokens."""
    count = -(-len(x) // segment)
    whole = pad(x, (0, 0, 0, 0, 0, count * segment - len(x))).unflatten(0, (count, segment))
    return pad(whole, (0, 0, 0, 0, 0, padded - segment))


def attend(
    q: Float[Tensor, "s h m e"], k: Float[Tensor, "s h m e"], v: Float[Tensor, "s h m e"]
) -> tuple[Float[Tensor, "s h m e"], Float[Tensor, "s h m"]]:
    """Softmax attention and the logarithms of its denominators, a block of queries at a time."""
    keys = k.transpose(-1, -2)
    size = max(1, BLOCK // (keys.shape[0] * keys.shape[1] * keys.shape[3]))
    results, logs = [], []
    for part in q.split(size, dim=2):
        scores = (part * q.shape[-1] ** -0.5) @ keys
        scores = scores.float()
        logs.append(torch.logsumexp(scores, dim=-1))
        results.append((scores - logs[-1][..., None]).exp().to(v.dtype) @ v)
    return torch.cat(results, dim=2), torch.cat(logs, dim=2)


class LongNetFeedForward(nn.Module):
    """Two linear layers with a norm between them.

    Args:
        width: of a token.
        hidden: between the two.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden)

    def forward(self, x: Float[Tensor, "l w"]) -> Float[Tensor, "l w"]:
        """Token by token."""
        return self.fc2(self.ffn_layernorm(gelu(self.fc1(x))))


class LongNetLayer(nn.Module):
    """Attention and feed-forward network, each with a norm before it and around it a residual.

    Args:
        width, heads, segments, ratios: as DilatedAttention.
        hidden: of the feed-forward network.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        segments: Sequence[int],
        ratios: Sequence[int],
        hidden: int,
    ) -> None:
        super().__init__()
        self.self_attn = DilatedAttention(width, heads, segments, ratios)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.ffn = LongNetFeedForward(width, hidden)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "l w"]) -> Float[Tensor, "l w"]:
        """Tokens of one sequence."""
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.ffn(self.final_layer_norm(x))
