"""The projection head of DINO, from a backbone's feature to logits over prototypes.

Caron et al. (ICCV 2021), section 3.1 and appendix C: three layers, a bottleneck on the unit sphere,
then prototypes of unit length, so that a logit is a cosine. The state dict has the keys of DINO's
files (`mlp.{0,2,4}`, `last_layer.weight_g`, `last_layer.weight_v`); the weight normalisation is
written out, since torch's parametrisation stores its parts under other names.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Prototypes(nn.Module):
    """A linear layer without bias whose rows have the length g: (B, d) -> (B, K).

    Args:
        width: d.
        count: K.
        frozen_length: g stays 1 (DINO's `norm_last_layer=true`); else it is learned.
    """

    def __init__(self, width: int, count: int, frozen_length: bool = True) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not frozen_length)
        self.weight_v = nn.Parameter(torch.empty(count, width))
        # as nn.Linear: the direction alone counts, but its length sets how fast it turns
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, unit: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        """Products with the prototypes."""
        length = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return nn.functional.linear(unit, self.weight_v * (self.weight_g / length))


class DINOHead(nn.Module):
    """(B, D) -> (B, K): D -> h -> h -> d with GELU, unit length, then K prototypes.

    Args:
        in_dim: D, width of the backbone.
        out_dim: K, number of prototypes.
        hidden_dim: h.
        bottleneck_dim: d.
        batch_norm: batch norm after both hidden layers, as DINO has it for ResNets on request; the
            layers are then numbered `mlp.{0,1,3,4,6}`.
        norm_last_layer: prototypes stay of length 1; false can score better and can diverge.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (in_dim, hidden_dim):
            layers.append(nn.Linear(width, hidden_dim))
            if batch_norm:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, norm_last_layer)

    def embed(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        """The bottleneck of features, of length 1."""
        bottleneck = self.mlp(features)
        # 1e-12 is zero in half precision
        epsilon = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12
        return nn.functional.normalize(bottleneck, dim=-1, eps=epsilon)

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Logits of features."""
        return self.last_layer(self.embed(features))
