"""FEATHER: an ABMIL network that was pre-trained on 108 diagnoses, in plain PyTorch.

Source: Shao et al., ICML 2025 (arXiv 2506.09022); mahmoodlab/MIL-Lab, src/models/abmil.py
(`forward_features`). Tiles are embedded by Linear and ReLU and weighed by gated attention; the
slide's vector is the weighted mean of the embedded tiles, of several heads side by side. To go on
training the network, give the same file as `init=` to mil's training script.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patch_encoder.slide_encoders.gated_attention import GatedAttention
from patch_encoder.slide_encoders.places import PlacedTiles
from patch_encoder.slide_encoders.published_file import State, get_shape, load_published

PREFIX = "model."  # of the authors' wrapper for the hub
UNUSED = ("classifier.",)


class Feather(nn.Module):
    """Embed the tiles, weigh them, add them up.

    Args:
        dim: width D of the tile features.
        hidden: width of the embedded tiles.
        attention: width of the attention's branches.
        heads: number of attention maps.
    """

    def __init__(self, dim: int, hidden: int, attention: int, heads: int) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU())
        self.global_attn = GatedAttention(hidden, attention, heads)

    def forward(
        self, features: Float[Tensor, "n d"], places: PlacedTiles | None
    ) -> Float[Tensor, " w"]:
        """The slide's vector (heads * hidden,)."""
        h = self.patch_embed(features)
        return (torch.softmax(self.global_attn(h), dim=0).T @ h).flatten()


def load_feather(state: State, source: str) -> Feather:
    """FEATHER from the state dict of model.safetensors, whose sizes are read off its shapes.

    Raises:
        UserError: a file of another layout.
    """
    hidden, dim = get_shape(state, "patch_embed.0.weight", source)
    heads, attention = get_shape(state, "global_attn.attention_c.weight", source)
    module = Feather(dim, hidden, attention, heads)
    load_published(module, state, UNUSED, source)
    return module
