"""Multi-scale deformable attention by index arithmetic and four gathers of rows: the form that is
exported to ONNX, where the compiled op does not exist.

Source: Deformable DETR (Zhu et al., ICLR 2021, arXiv:2010.04159), equation 3. Differences from
`reference.py`: no level is cut out of the values, one gather per corner serves all levels; the
bilinear weights are written out, with 0 outside of a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def ms_deform_attn_gather(
    value: Float[Tensor, "b s heads dim"],
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Float[Tensor, "b q heads levels points 2"],
    attention_weights: Float[Tensor, "b q heads levels points"],
) -> Float[Tensor, "b q heads*dim"]:
    """The function that `ops.ms_deform_attn.ms_deform_attn` describes, for finite locations.

    Args:
        value: cells of all levels one after the other, each level row by row; S = sum of H * W.
        spatial_shapes: (H, W) of each level; none is empty.
        sampling_locations: (x, y) as fractions of the level.
        attention_weights: used as they are.

    Returns:
        Heads side by side, in the dtype of `value`.
    """
    batch, cells, heads, dim = value.shape
    rows = value.reshape(batch * cells * heads, dim)
    options = {"dtype": sampling_locations.dtype, "device": value.device}
    extent = torch.tensor([(width, height) for height, width in spatial_shapes], **options)
    counts = torch.tensor([height * width for height, width in spatial_shapes], **options)
    first = (counts.cumsum(0) - counts)[:, None].long()  # (levels, 1), of each level's cells
    images = torch.arange(batch, device=value.device).view(-1, 1, 1, 1, 1) * cells
    head = torch.arange(heads, device=value.device).view(-1, 1, 1)
    position = sampling_locations * extent[:, None] - 0.5  # in cells, (B, Q, heads, levels, p, 2)
    corner = position.floor()
    out = sampling_locations.new_zeros(1)
    for step in ((0, 0), (1, 0), (0, 1), (1, 1)):
        place = corner + torch.tensor(step, **options)
        inside = ((place >= 0) & (place < extent[:, None])).all(-1)
        share = (1 - (position - place).abs()).prod(-1) * inside * attention_weights
        column, row = torch.minimum(place.clamp(min=0), extent[:, None] - 1).long().unbind(-1)
        cell = first + row * extent[:, :1].long() + column  # (B, Q, heads, levels, points)
        taken = rows[(images + cell) * heads + head]
        out = out + (taken * share[..., None]).sum((3, 4))  # (B, Q, heads, dim)
    return out.flatten(2).to(value.dtype)
