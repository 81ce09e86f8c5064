"""The one door to multi-scale deformable attention: every model calls this function, whatever
computes it.

The compiled op (`tools/build_ops.sh`) where it is built, else the PyTorch reference with one
warning that says why. DEFORM_ATTN_BACKEND=auto|compiled|reference chooses; `compiled` is an error
where it is not built.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from detection_kd.ops.compiled import OP, ms_deform_attn_compiled, unavailable
from detection_kd.ops.reference import ms_deform_attn_reference
from wsi_common.ops import compiled_op


def ms_deform_attn(
    value: Float[Tensor, "b s heads dim"],
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Float[Tensor, "b q heads levels points 2"]
    | Float[Tensor, "b q heads all_points 2"],
    attention_weights: Float[Tensor, "b q heads levels points"]
    | Float[Tensor, "b q heads all_points"],
    points: Sequence[int] | None = None,
) -> Float[Tensor, "b q heads*dim"]:
    """Weighted sum of bilinear samples: out[b, q, h] = sum over levels l and points p of A[b, q, h,
    l, p] * V_l(location).

    Source: Deformable DETR (Zhu et al., ICLR 2021), equation 3. Differentiable once in all three
    tensors; a second derivative and forward mode need the reference. The backward of the compiled
    op is deterministic on the CPU, and on CUDA under `torch.use_deterministic_algorithms(True)`.

    Args:
        value: cells of all levels one after the other, each level row by row; S = sum of H * W.
            float32, float64, bfloat16 or float16.
        spatial_shapes: (H, W) of each level, integers of the host; a level may be empty.
        sampling_locations: (x, y) as fractions of each level's width and height: cell (i, j) has
            its centre at ((j + 0.5) / W, (i + 0.5) / H). Outside of the map the value is 0; where
            not finite the result is NaN.
        attention_weights: used as they are; the caller has normalised them over levels and points.
        points: points of each level, when they differ; then locations are (B, Q, heads, sum of
            points, 2) and weights (B, Q, heads, sum of points), level by level.

    Returns:
        Heads side by side, in the dtype of `value`. Locations and weights are used in float32
        (float64 for float64 values) whatever the dtype of `value`: bfloat16 locations are off by up
        to half a cell on a map 134 cells wide.

    Raises:
        ValueError: the shapes do not add up to the number of values, or there is not one shape per
            level.
    """
    if points is None:
        points = (
            [sampling_locations.shape[4]] * sampling_locations.shape[3]
            if sampling_locations.ndim == 6
            else []
        )
        sampling_locations, attention_weights = (
            sampling_locations.flatten(3, 4),
            attention_weights.flatten(3, 4),
        )
    _check(value, spatial_shapes, points, sampling_locations)
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    locations, weights = sampling_locations.to(dtype), attention_weights.to(dtype)
    if takes_compiled(value.device.type):
        sizes = [size for shape in spatial_shapes for size in shape]
        return ms_deform_attn_compiled(value, sizes, list(points), locations, weights)
    return ms_deform_attn_reference(value, spatial_shapes, points, locations, weights)


def _check(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    points: Sequence[int],
    locations: Tensor,
) -> None:
    cells = sum(height * width for height, width in spatial_shapes)
    if (
        cells != value.shape[1]
        or len(spatial_shapes) != len(points)
        or sum(points) != locations.shape[3]
    ):
        raise ValueError(
            f"spatial_shapes {list(spatial_shapes)}: expected {len(points)} levels with "
            f"{value.shape[1]} cells and "
            f"{sum(points)} points in all, found {len(spatial_shapes)} with {cells} cells and "
            f"{locations.shape[3]} points"
        )


@compiled_op.constant
def takes_compiled(device_type: str) -> bool:
    """Whether `ms_deform_attn` goes to the compiled op on "cpu", "cuda", ...

    Raises:
        UserError: DEFORM_ATTN_BACKEND is unknown, or `compiled` and the op is not there.
    """
    return compiled_op.takes_compiled(
        None, OP.variable, device_type, unavailable, "deformable attention"
    )
