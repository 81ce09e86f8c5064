"""A small vision transformer over a grid of tile features, with a mask: the region encoder.

The network is VisionTransformer4K of HIPT (Chen et al., CVPR 2022), which SLPD trains:
a linear layer with GELU per tile, a class token, learned positions, and pre-norm blocks. It loads
the files of HIPT's `vit4k_xs`. Differences: any width of features, grid, width and depth; and tiles
without tissue are masked from attention, where the original encodes glass.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_common.errors import UserError


class RegionViT(nn.Module):
    """(B, D + 1, g, g) -> (B, W): D feature channels of g x g tiles, then one that is 1 where a
    tile is valid and 0 elsewhere (`pack_regions`).

    A region without a valid tile gets the embedding of the class token alone.

    Args:
        in_dim: D.
        width: W, also available as `num_features`.
        depth: number of blocks.
        heads: attention heads per block.
        grid: side of the grid that positions are learned for, in tiles; other grids interpolate.
        drop_path: stochastic depth, rising linearly to this rate at the last block.
    """

    def __init__(
        self,
        in_dim: int = 384,
        width: int = 192,
        depth: int = 6,
        heads: int = 6,
        grid: int = 14,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block  # a while to load

        if width % heads:
            raise UserError(
                f"width={width}: expected a multiple of the {heads} heads; change either of them"
            )
        self.num_features, self.grid = width, grid
        self.phi = nn.Sequential(nn.Linear(in_dim, width), nn.GELU())
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                qkv_bias=True,
                drop_path=rate,
                norm_layer=nn.LayerNorm,  # type: ignore[arg-type]
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Float[Tensor, "b c g g"]) -> Float[Tensor, "b w"]:
        """The class token after the last norm."""
        count, channels, side, _ = x.shape
        # tiles as rows: no copy where the batch is stored with channels last
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        tokens = self.phi(rows[:, :-1]).view(count, side * side, -1)
        tokens = torch.cat([self.cls_token.expand(count, -1, -1).to(tokens.dtype), tokens], dim=1)
        tokens = tokens + self.interpolate_positions(side)
        valid = F.pad(rows[:, -1].view(count, -1) > 0.5, (1, 0), value=True)
        for block in self.blocks:
            tokens = block(tokens, attn_mask=valid[:, None, None, :])
        return self.norm(tokens[:, 0])

    def interpolate_positions(self, side: int) -> Float[Tensor, "1 n w"]:
        """Positions of the class token and of side x side tiles, (1, 1 + side^2, W).

        Bicubic as in HIPT and DINO, whose scale is a tenth of a tile too large, so that rounding
        never loses a row; files of HIPT therefore give HIPT's embeddings on other grids, too.
        """
        if side == self.grid:
            return self.pos_embed
        first, places = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        places = places.mT.unflatten(2, (self.grid, self.grid)).float()
        scale = (side + 0.1) / self.grid
        places = F.interpolate(places, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([first, places.flatten(2).mT.to(first.dtype)], dim=1)
