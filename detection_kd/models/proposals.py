"""Two-stage queries: every encoder cell proposes a box, the best proposals become the decoder's
references.

Source: Deformable DETR (arXiv:2010.04159), appendix A.4 (two-stage Deformable DETR); mixed query
selection of DINO (arXiv:2203.03605, section 3.4): positions from the proposals, contents learned.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detection_kd.models.deformable_layers import Pyramid, make_cell_grid
from detection_kd.models.position_encoding import encode_sine

BASE_SIZE = (
    0.05  # side of a proposal on the finest level, fraction of the image; doubles with each level
)


class ProposalHead(nn.Module):
    """Scores of the encoder's cells, and queries made from the positions of the best ones.

    Args:
        dim: channels.
        queries: proposals to keep; fewer cells than that give fewer queries.
        mixed: give positions only, because contents are learned.
    """

    def __init__(self, dim: int, queries: int, mixed: bool = False) -> None:
        super().__init__()
        self.queries, self.dim = queries, dim
        self.enc_output = nn.Linear(dim, dim)
        self.enc_output_norm = nn.LayerNorm(dim)
        width = dim if mixed else 2 * dim
        self.pos_trans = nn.Linear(2 * dim, width)
        self.pos_trans_norm = nn.LayerNorm(width)

    def score(
        self,
        memory: Float[Tensor, "b s d"],
        pyramid: Pyramid,
        class_head: nn.Module,
        box_head: nn.Module,
    ) -> tuple[Float[Tensor, "b s classes"], Float[Tensor, "b s 4"]]:
        """Class and box logits of every cell; a padded or border cell has the box logit +inf."""
        proposals, usable = make_base_proposals(pyramid)
        cells = self.enc_output_norm(self.enc_output(memory.masked_fill(~usable, 0.0)))
        return class_head(cells), box_head(cells).to(proposals.dtype) + proposals

    def select(
        self, logits: Float[Tensor, "b s classes"], box_logits: Float[Tensor, "b s 4"]
    ) -> Float[Tensor, "b q 4"]:
        """References: the boxes of the cells with the best first logit.

        The first class alone ranks: in the first stage it stands for "any object".
        """
        best = logits[..., 0].topk(min(self.queries, logits.shape[1]), dim=1).indices  # (B, Q)
        return box_logits.gather(1, best[..., None].expand(-1, -1, 4)).detach().sigmoid()

    def encode(self, reference: Float[Tensor, "b q 4"]) -> Float[Tensor, "b q _width"]:
        """Positional encodings (B, Q, D) of boxes, beside contents (B, Q, 2 D) unless learned."""
        encoded = encode_sine(reference * 2 * math.pi, self.dim // 2).flatten(-2)  # (B, Q, 2 D)
        return self.pos_trans_norm(self.pos_trans(encoded))


def make_base_proposals(pyramid: Pyramid) -> tuple[Float[Tensor, "b s 4"], Bool[Tensor, "b s 1"]]:
    """A box around every cell as logits of (cx, cy, w, h), +inf where unusable; and which cells are
    usable.

    Usable: not padding, and all four numbers within 0.01..0.99.
    """
    boxes = []
    for level, shape in enumerate(pyramid.shapes):
        centres = (
            make_cell_grid(*shape, pyramid.valid_ratios) / pyramid.valid_ratios[:, level, None]
        )  # (B, H*W, 2)
        boxes.append(torch.cat((centres, torch.full_like(centres, BASE_SIZE * 2**level)), -1))
    proposals = torch.cat(boxes, 1)  # (B, S, 4)
    usable = ((proposals > 0.01) & (proposals < 0.99)).all(-1, keepdim=True) & ~pyramid.padding[
        ..., None
    ]
    return torch.logit(proposals).masked_fill(~usable, float("inf")), usable
