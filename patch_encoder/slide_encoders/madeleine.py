"""MADELEINE's slide encoder of H&E slides, in plain PyTorch.

Source: Jaume et al., ECCV 2024; mahmoodlab/MADELEINE, core/models/Model.py (`encode_he`). Tiles
(CONCH, 512) go through three layers; the channels of the last one are dealt out to the heads in
turn, each head weighs its own by gated attention, and a linear layer joins them. Differences: one
slide at a time; the token projector, which only the training uses, and models with stain encodings
are left out.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patch_encoder.slide_encoders.gated_attention import GatedAttention
from patch_encoder.slide_encoders.places import PlacedTiles
from patch_encoder.slide_encoders.published_file import State, get_shape, load_published

PRE = "wsi_embedders.pre_attn."
UNUSED = ("token_projector.",)


class MadeleineEmbedder(nn.Module):
    """Embedded tiles, and one gated attention per head.

    Args:
        dim: width D of the tile features.
        hidden: width F of the embedded tiles, of each head.
        attention: width of the attention's branches.
        heads: number K of heads.
    """

    def __init__(self, dim: int, hidden: int, attention: int, heads: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((dim, hidden), (hidden, hidden), (hidden, hidden * heads)):
            # the last one is the authors' dropout, which has a number in the names of the keys
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.GELU(), nn.Identity()]
        self.pre_attn = nn.Sequential(*layers)
        self.attn = nn.ModuleList(GatedAttention(hidden, attention) for _ in range(heads))

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "f k"]:
        """The weighted mean of each head."""
        h = self.pre_attn(features).unflatten(1, (-1, len(self.attn)))  # (N, F, K)
        scores = [attend(h[..., k]) for k, attend in enumerate(self.attn)]
        weights = torch.softmax(torch.cat(scores, dim=1), dim=0)  # (N, K)
        return torch.einsum("nfk,nk->fk", h, weights)


class Madeleine(nn.Module):
    """The heads of the embedder, joined.

    Args:
        dim, hidden, attention, heads: as MadeleineEmbedder.
        width: of the slide's vector.
    """

    def __init__(self, dim: int, hidden: int, attention: int, heads: int, width: int) -> None:
        super().__init__()
        self.wsi_embedders = MadeleineEmbedder(dim, hidden, attention, heads)
        self.projector = nn.Linear(hidden * heads, width)

    def forward(
        self, features: Float[Tensor, "n d"], places: PlacedTiles | None
    ) -> Float[Tensor, " w"]:
        """The slide's vector."""
        return self.projector(self.wsi_embedders(features).flatten())


def load_madeleine(state: State, source: str) -> Madeleine:
    """MADELEINE from the state dict of model.pt, whose sizes are read off its shapes.

    Raises:
        UserError: a file of another layout.
    """
    hidden, dim = get_shape(state, f"{PRE}0.weight", source)
    attention = get_shape(state, "wsi_embedders.attn.0.attention_a.0.weight", source)[0]
    width, joined = get_shape(state, "projector.weight", source)
    module = Madeleine(dim, hidden, attention, joined // hidden, width)
    load_published(module, state, UNUSED, source)
    return module
