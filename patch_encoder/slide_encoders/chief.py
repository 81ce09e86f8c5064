"""CHIEF's slide encoder, in plain PyTorch.

Source: Wang et al., Nature 2024; hms-dbmi/CHIEF, models/CHIEF.py (`size_arg="small"`) and
Get_CHIEF_WSI_level_feature.py. Tiles (CTransPath, 768) are embedded by Linear 768->512 and ReLU and
weighed by gated attention of width 256; the slide's vector, `WSI_feature`, is the weighted mean of
the features themselves, as TRIDENT and STAMP take it. With an organ it is the anatomy-aware vector
(`WSI_feature_anatomical`, 512): the weighted mean of the embedded tiles plus the projected CLIP
embedding of the organ's name, which the file holds. Differences: the classifiers are left out; no
second file is read for the organs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patch_encoder.slide_encoders.gated_attention import GatedAttention
from patch_encoder.slide_encoders.places import PlacedTiles
from patch_encoder.slide_encoders.published_file import State, get_shape, load_published
from wsi_common.errors import UserError, did_you_mean

# configs/anatomic_mapping.yaml of the authors, in its order
ORGANS = (
    *("brain", "breast", "bladder", "kidney", "prostate", "testis", "lung", "pancreas", "liver"),
    *("skin", "ovary", "cervix", "uterus", "colon", "esophagus", "stomach", "thyroid"),
    *("adrenal gland", "soft tissue"),
)
ORGAN_KEYS = ("organ_embedding", "text_to_vision.")
UNUSED = ("classifiers.", "instance_classifiers.", "att_head.")


class Chief(nn.Module):
    """Attention-weighted mean of a slide's tiles, or its anatomy-aware form.

    Args:
        dim: width D of the tile features.
        hidden: width of the embedded tiles.
        attention: width of the attention's branches.
        text: width of the organs' embeddings.
        organ: one of ORGANS; empty: the vector that knows no organ.
    """

    organ_embedding: Tensor

    def __init__(self, dim: int, hidden: int, attention: int, text: int, organ: str = "") -> None:
        super().__init__()
        gated = GatedAttention(hidden, attention)
        # the third module is the authors' dropout, which has a number in the names of the keys
        self.attention_net = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Identity(), gated)
        self.organ = ORGANS.index(organ) if organ else None
        if organ:
            self.text_to_vision = nn.Sequential(nn.Linear(text, hidden), nn.ReLU())
            self.register_buffer("organ_embedding", torch.zeros(len(ORGANS), text))

    def forward(
        self, features: Float[Tensor, "n d"], places: PlacedTiles | None
    ) -> Float[Tensor, " w"]:
        """The slide's vector: (D,), with an organ (hidden,)."""
        embed, relu, _, gated = self.attention_net
        h = relu(embed(features))
        weights = torch.softmax(gated(h)[:, 0], dim=0)  # (N,)
        if self.organ is None:
            return weights @ features
        return weights @ h + self.text_to_vision(self.organ_embedding[self.organ])


def load_chief(state: State, source: str, organ: str = "") -> Chief:
    """CHIEF from the state dict of CHIEF_pretraining.pth.

    Raises:
        UserError: an unknown organ, or a file of another layout.
    """
    if organ and organ not in ORGANS:
        raise UserError(f"organ={organ}: {did_you_mean(organ, ORGANS)}")
    hidden, dim = get_shape(state, "attention_net.0.weight", source)
    attention = get_shape(state, "attention_net.3.attention_a.0.weight", source)[0]
    text = get_shape(state, "organ_embedding", source)[1] if organ else 0
    module = Chief(dim, hidden, attention, text, organ)
    load_published(module, state, UNUSED if organ else (*UNUSED, *ORGAN_KEYS), source)
    return module
