"""Nystrom self-attention: softmax(Q K') from m landmarks, memory linear in N (Xiong et al., AAAI
2021, arXiv 2102.03902).

Attention is softmax(Q K~') pinv(softmax(Q~ K~')) softmax(Q~ K'), landmarks Q~, K~ the means of m
runs of neighbours, pinv by 6 iterations; plus a depthwise convolution (33) of the values. Layer
names are those of the PyPI package nystrom-attention, whose weights fit. As there, zeros are put in
front until the length is a multiple of m, and they take part. Differences: one sequence at a time;
the factors are multiplied from the right, so that no N x m x m product is made; the attention of
one token can be had without the others'.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from mil.models.dropout import Dropout

CONVOLUTION = 33


class NystromAttention(nn.Module):
    """Multi-head self-attention of one sequence.

    Args:
        dim: width F of the tokens.
        heads: number of heads of width F / heads.
        landmarks: number m of landmarks.
        iterations: of the pseudo-inverse.
        dropout: probability of dropping an output unit.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        landmarks: int = 256,
        iterations: int = 6,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.heads, self.landmarks, self.iterations = heads, landmarks, iterations
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), Dropout(dropout))
        kernel = (CONVOLUTION, 1)
        self.res_conv = nn.Conv2d(
            heads, heads, kernel, padding=(CONVOLUTION // 2, 0), groups=heads, bias=False
        )

    def forward(self, x: Float[Tensor, "n f"]) -> tuple[Float[Tensor, "n f"], Float[Tensor, "h n"]]:
        """Attended tokens (N, F), and each head's attention of the first token to all of them
        (without gradient).
        """
        n, m = len(x), self.landmarks
        front = -n % m
        q, k, v = (
            self._split(part) for part in self.to_qkv(pad(x, (0, 0, front, 0))).chunk(3, dim=-1)
        )  # (H, N', F/H)
        q = q * q.shape[-1] ** -0.5
        q_marks, k_marks = (part.unflatten(1, (m, -1)).mean(2) for part in (q, k))  # (H, m, F/H)
        first = (q @ k_marks.transpose(1, 2)).softmax(-1)  # (H, N', m)
        middle = pseudo_inverse(
            (q_marks @ k_marks.transpose(1, 2)).softmax(-1), self.iterations
        )  # (H, m, m)
        last = (q_marks @ k.transpose(1, 2)).softmax(-1)  # (H, m, N')
        out = first @ (middle @ (last @ v)) + self.res_conv(v[None])[0]
        out = self.to_out(out.transpose(0, 1).flatten(1)[front:])
        with torch.no_grad():
            row = (first[:, front, None] @ middle @ last)[:, 0, front:]
        return out, row

    def _split(self, x: Float[Tensor, "n f"]) -> Float[Tensor, "h n e"]:
        return x.unflatten(1, (self.heads, -1)).transpose(0, 1)


def pseudo_inverse(x: Float[Tensor, "h m m"], iterations: int) -> Float[Tensor, "h m m"]:
    """Moore-Penrose inverse by an iteration of third order, scaled by the largest norms over all
    heads.
    """
    size = x.abs()
    z = x.transpose(1, 2) / (size.sum(-1).max() * size.sum(-2).max())
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        xz = x @ z
        z = 0.25 * z @ (13 * eye - xz @ (15 * eye - xz @ (7 * eye - xz)))
    return z
