"""Prov-GigaPath's slide encoder: LongNet over the tiles of a slide, in plain PyTorch.

Source: Xu et al., Nature 2024; prov-gigapath/prov-gigapath, gigapath/slide_encoder.py
(`gigapath_slide_enc12l768d`). Tiles (GigaPath, 1536) are projected, get sine and cosine positions
of their cell on the slide's grid, and with a class token before them go through 12 LongNet layers.
The slide's vector is the class token, as the model card has it; pool=mean is the mean of the tiles
(the authors' `global_pool`). Differences: positions are computed for the tiles that are there, not
looked up in a table of 1000 x 1000; a slide beyond that table is refused. TRIDENT takes the mean
after layer 11 of 12, without the last norm of the transformer.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patch_encoder.slide_encoders.longnet import LongNetLayer
from patch_encoder.slide_encoders.places import PlacedTiles
from patch_encoder.slide_encoders.published_file import State, get_shape, load_published
from wsi_common.errors import UserError

HEADS = 16
GRID = 1000  # cells a side of the authors' table of positions
RATIOS = (1, 2, 4, 8, 16)
# 2 to the power of 10, 12.5, 15, 17.5, 20, for slides of up to 262,144 px of 256 px tiles
SEGMENTS = (1024, 5792, 32768, 185363, 1048576)
LAYER = "encoder.layers."
UNUSED = ("decoder", "mask_token", "pos_embed")
POOLS = ("published", "mean")


class GigaPathEncoder(nn.Module):
    """The layers, and the norm after the last one where the file has it.

    Args:
        width: of a token.
        hidden: of the feed-forward networks.
        depth: number of layers.
        norm: whether there is a norm after them.
    """

    def __init__(self, width: int, hidden: int, depth: int, norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            LongNetLayer(width, HEADS, SEGMENTS, RATIOS, hidden) for _ in range(depth)
        )
        self.layer_norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, x: Float[Tensor, "l w"]) -> Float[Tensor, "l w"]:
        """Tokens of one slide."""
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


class GigaPathSlide(nn.Module):
    """Tiles and their places to one vector.

    Args:
        dim: width D of the tile features.
        width: of a token and of the slide's vector.
        hidden, depth, norm: as GigaPathEncoder.
        pool: `published`, the class token, or `mean`, the mean of the tiles.
    """

    def __init__(
        self, dim: int, width: int, hidden: int, depth: int, norm: bool, pool: str
    ) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(dim, width)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = GigaPathEncoder(width, hidden, depth, norm)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pool = pool

    def forward(self, features: Float[Tensor, "n d"], places: PlacedTiles) -> Float[Tensor, " w"]:
        """The slide's vector.

        Raises:
            UserError: the slide is larger than the authors' table of positions.
        """
        cells = places.cells
        if int(cells.max()) >= GRID or int(cells.min()) < 0:
            raise UserError(
                f"gigapath: expected a slide of at most {GRID} x {GRID} tiles, found a tile in "
                f"column or row {int(cells.max())}; encode larger tiles"
            )
        x = self.patch_embed["proj"](features)
        x = x + make_positions(cells, x.shape[1]).to(x)
        x = self.encoder(torch.cat([self.cls_token[0].to(x.dtype), x]))
        return self.norm(x[0] if self.pool == "published" else x[1:].mean(0))


def make_positions(cells: Int[Tensor, "n 2"], width: int) -> Float[Tensor, "n w"]:
    """Sine and cosine positions of cells (column, row): the first half is of the row, as the
    authors number their cells column by column.
    """
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = cells.cpu().double().flip(1)[..., None] * rates  # (N, 2, W / 4), row first
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1).float()


def load_gigapath(state: State, source: str, pool: str = "published") -> GigaPathSlide:
    """The slide encoder from the state dict of slide_encoder.pth; sizes are read off its shapes.

    Raises:
        UserError: a file of another layout, or another pool.
    """
    if pool not in POOLS:
        raise UserError(f"pool={pool}: gigapath expected one of {', '.join(POOLS)}")
    width, dim = get_shape(state, "patch_embed.proj.weight", source)
    hidden = get_shape(state, f"{LAYER}0.ffn.fc1.weight", source)[0]
    depth = len({name.split(".")[2] for name in state if name.startswith(LAYER)})
    norm = "encoder.layer_norm.weight" in state
    module = GigaPathSlide(dim, width, hidden, depth, norm, pool)
    load_published(module, state, UNUSED, source)
    return module
