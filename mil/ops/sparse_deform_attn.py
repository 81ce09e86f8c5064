"""The one door to deformable attention over a sparse bag: every model calls this function, whatever
computes it.

The compiled op (`tools/build_ops.sh`) where it is built, else the PyTorch reference with one
warning that says why. `backend`, or SPARSE_ATTN_BACKEND=auto|compiled|reference, chooses;
`compiled` is an error where it is not built.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mil.ops.compiled import OP, sparse_deform_attn_compiled, unavailable
from mil.ops.grid import SparseMaps
from mil.ops.reference import sparse_deform_attn_reference
from wsi_common.ops import compiled_op


def sparse_deform_attn(
    value: Float[Tensor, "t heads dim"],
    index: SparseMaps,
    sampling_locations: Float[Tensor, "q heads levels points 2"]
    | Float[Tensor, "q heads all_points 2"],
    attention_weights: Float[Tensor, "q heads levels points"] | Float[Tensor, "q heads all_points"],
    points: Sequence[int] | None = None,
    *,
    renormalise: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "q heads*dim"]:
    """Weighted sum of bilinear samples: out[q, h] = sum over levels l and points p of A[q, h, l, p]
    * V_l(location).

    V_l(location) is the bilinear mixture of the rows that the map of the query's bag and level l
    names for the four cells around the location; a cell without a tile counts as 0, or not at all
    with `renormalise`.

    Source: Deformable DETR (Zhu et al., ICLR 2021), equation 3. Differentiable once in all three
    tensors (a second derivative and forward mode need the reference); nothing that a map does not
    name gets a gradient. The backward of the compiled op is deterministic on the CPU, and on CUDA
    under `torch.use_deterministic_algorithms(True)`.

    Args:
        value: rows of all bags and levels, in the order that the maps say. float32, float64,
            bfloat16 or float16.
        index: the maps of B bags on L levels and the number of queries of each bag;
            `grid.build_grid` makes it. Queries are those of the first bag, then those of the
            second, ...
        sampling_locations: (x, y) in cells of the level; a cell's centre lies at integers, (0, 0)
            is the first one's. Outside of the map the value is 0; where not finite the result is
            NaN. Steps in float32 are 1/512 cell at 2^14 cells.
        attention_weights: used as they are; the caller has normalised them over levels and points.
        points: points of each level, when they differ; then locations are (Q, heads, sum of points,
            2) and weights (Q, heads, sum of points), level by level.
        renormalise: divide each sample by the bilinear weights of its corners that have a tile (0
            where none has).
        backend: auto, compiled or reference; None: what SPARSE_ATTN_BACKEND says, else auto.

    Returns:
        Heads side by side, in the dtype of `value`. Locations and weights are used in float32
        (float64 for float64 values) whatever the dtype of `value`.

    Raises:
        ValueError: points, bags or maps do not add up.
        UserError: `backend` is unknown, or `compiled` and the op is not there.
    """
    if points is None:
        points = (
            [sampling_locations.shape[3]] * sampling_locations.shape[2]
            if sampling_locations.ndim == 5
            else []
        )
        sampling_locations, attention_weights = (
            sampling_locations.flatten(2, 3),
            attention_weights.flatten(2, 3),
        )
    if len(points) != index.shapes.shape[1] or sum(points) != sampling_locations.shape[2]:
        raise ValueError(
            f"points {list(points)}: expected {index.shapes.shape[1]} levels with "
            f"{sampling_locations.shape[2]} points in all"
        )
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    locations, weights = sampling_locations.to(dtype), attention_weights.to(dtype)
    if takes_compiled(value.device.type, backend):
        return sparse_deform_attn_compiled(
            value, index, list(points), locations, weights, renormalise
        )
    return sparse_deform_attn_reference(value, index, points, locations, weights, renormalise)


@compiled_op.constant
def takes_compiled(device_type: str, backend: str | None = None) -> bool:
    """Whether `sparse_deform_attn` goes to the compiled op on "cpu", "cuda", ...

    Raises:
        UserError: the backend is unknown, or `compiled` and the op is not there.
    """
    return compiled_op.takes_compiled(
        backend, OP.variable, device_type, unavailable, "sparse deformable attention"
    )
