"""Multi-scale deformable attention in plain PyTorch: the specification and the fallback of the compiled op.

Source: Deformable DETR (Zhu et al., ICLR 2021, arXiv:2010.04159), equation 3, in the form that samples every level with
`grid_sample`. Differences from the authors' `ms_deform_attn_core_pytorch`:
- spatial shapes are Python integers, so that no layer waits for the device;
- a level without cells contributes 0, and empty batches or query sets give empty results;
- values of lower precision are sampled in the precision of the locations, because bfloat16 locations are off by up to
  half a cell on a map 134 cells wide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def ms_deform_attn_reference(
    value: Float[Tensor, "b s heads dim"],
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Float[Tensor, "b q heads levels points 2"],
    attention_weights: Float[Tensor, "b q heads levels points"],
) -> Float[Tensor, "b q heads*dim"]:
    """Weighted sum of bilinear samples: out[b, q, h] = sum over levels l and points p of A[b, q, h, l, p] * V_l(location).

    Args:
        value: cells of all levels one after the other, each level row by row; S = sum of H * W.
        spatial_shapes: (H, W) of each level.
        sampling_locations: (x, y) as fractions of each level's width and height: cell (i, j) has its centre at
            ((j + 0.5) / W, (i + 0.5) / H). Outside of the map the value is 0.
        attention_weights: used as they are; the caller has normalised them over levels and points.

    Returns:
        Heads side by side, in the dtype of `value`.
    """
    batch, _, heads, dim = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    out = sampling_locations.new_zeros(batch * heads, dim, queries)
    grids = 2 * sampling_locations - 1  # grid_sample counts from -1 to 1 between the outer edges
    starts = [0]
    for level, (height, width) in enumerate(spatial_shapes):
        starts.append(starts[-1] + height * width)
        if height * width == 0:
            continue
        cells = value[:, starts[-2] : starts[-1]].to(grids.dtype)  # (B, H*W, heads, D)
        cells = cells.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B*heads, Q, points, 2)
        sampled = F.grid_sample(cells, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weights = attention_weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        out = out + (sampled * weights).sum(-1)  # (B*heads, D, Q, points) -> (B*heads, D, Q)
    return out.view(batch, heads * dim, queries).transpose(1, 2).contiguous().to(value.dtype)
