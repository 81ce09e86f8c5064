"""The one door to multi-scale deformable attention: every model calls this function, whatever computes it.

It goes to the PyTorch reference.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from detection_kd.ops.reference import ms_deform_attn_reference


def ms_deform_attn(
    value: Float[Tensor, "b s heads dim"],
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Float[Tensor, "b q heads levels points 2"],
    attention_weights: Float[Tensor, "b q heads levels points"],
) -> Float[Tensor, "b q heads*dim"]:
    """Multi-scale deformable attention; arguments and result as in `ops.reference.ms_deform_attn_reference`.

    Raises:
        ValueError: the shapes do not add up to the number of values, or there is not one shape per level.
    """
    cells = sum(height * width for height, width in spatial_shapes)
    if cells != value.shape[1] or len(spatial_shapes) != sampling_locations.shape[3]:
        raise ValueError(
            f"spatial_shapes {list(spatial_shapes)}: expected {sampling_locations.shape[3]} levels with "
            f"{value.shape[1]} cells in all, found {len(spatial_shapes)} with {cells}"
        )
    return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)
