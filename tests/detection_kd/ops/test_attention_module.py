"""Multi-scale deformable attention: the reference against an independent loop, its gradients and
its edge cases.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detection_kd.models.deformable_layers import MSDeformAttn
from detection_kd.ops.ms_deform_attn import ms_deform_attn
from wsi_common.errors import UserError

SHAPES = [(3, 5), (2, 1), (1, 4)]


def make_inputs(
    shapes: list[tuple[int, int]], queries: int = 3, heads: int = 2, dim: int = 3, points: int = 2
) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    size = (2, queries, heads, len(shapes), points)
    value = torch.randn(2, sum(h * w for h, w in shapes), heads, dim, dtype=torch.float64)
    locations = (
        torch.rand(*size, 2, dtype=torch.float64) * 2 - 0.5
    )  # a good part of them outside of the map
    weights = torch.rand(size, dtype=torch.float64)
    return value, locations, weights


def loop(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """One sample, query, head, level, point and corner after the other (equation 3, written with
    Python floats).
    """
    batch, queries, heads, levels, points = weights.shape
    out = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(levels)]
    for b, q, m, level, p in torch.cartesian_prod(
        *map(torch.arange, (batch, queries, heads, levels, points))
    ).tolist():
        height, width = shapes[level]
        x, y = (locations[b, q, m, level, p] * torch.tensor([width, height]) - 0.5).tolist()
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[b, q, m, level, p]
                    out[b, q, m] += share * value[b, starts[level] + row * width + column, m]
    return out.flatten(2)


def test_forward_equals_the_loop() -> None:
    value, locations, weights = make_inputs(SHAPES)
    expected = loop(value, SHAPES, locations, weights)
    assert expected.abs().min() > 0
    torch.testing.assert_close(
        ms_deform_attn(value, SHAPES, locations, weights), expected, rtol=1e-10, atol=1e-12
    )


def test_gradients_of_all_three_inputs() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(SHAPES, queries=2, heads=1, dim=2)]
    assert torch.autograd.gradcheck(lambda v, x, a: ms_deform_attn(v, SHAPES, x, a), inputs)
    ms_deform_attn(inputs[0], SHAPES, *inputs[1:]).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 1e-3 for tensor in inputs)


def test_cell_centres_read_their_cell() -> None:
    value = torch.arange(6.0).view(1, 6, 1, 1)  # 2 x 3 map
    y, x = torch.meshgrid(
        torch.tensor([0.25, 0.75]), torch.tensor([1 / 6, 0.5, 5 / 6]), indexing="ij"
    )
    locations = torch.stack((x, y), -1).view(1, 6, 1, 1, 1, 2)
    out = ms_deform_attn(value, [(2, 3)], locations, torch.ones(1, 6, 1, 1, 1))
    torch.testing.assert_close(out.flatten(), torch.arange(6.0), atol=1e-5, rtol=0)


def test_level_without_cells_counts_as_zero() -> None:
    value, locations, weights = make_inputs([(3, 5), (0, 4), (1, 4)])
    kept = [0, 2]
    expected = ms_deform_attn(
        value, [(3, 5), (1, 4)], locations[:, :, :, kept], weights[:, :, :, kept]
    )
    torch.testing.assert_close(
        ms_deform_attn(value, [(3, 5), (0, 4), (1, 4)], locations, weights), expected
    )


@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
def test_empty_inputs_give_empty_outputs_and_gradients(batch: int, queries: int) -> None:
    value = torch.randn(batch, 15, 2, 3, requires_grad=True)
    out = ms_deform_attn(
        value, [(3, 5)], torch.rand(batch, queries, 2, 1, 2, 2), torch.rand(batch, queries, 2, 1, 2)
    )
    assert out.shape == (batch, queries, 6)
    out.sum().backward()
    assert not value.grad.any()


def test_shapes_that_do_not_add_up_are_refused() -> None:
    value, locations, weights = make_inputs(SHAPES)
    with pytest.raises(ValueError, match=r"expected 3 levels with 21 cells"):
        ms_deform_attn(value, [(3, 5), (2, 1), (1, 5)], locations, weights)


def test_low_precision_values_are_sampled_at_exact_locations() -> None:
    torch.manual_seed(0)
    value = torch.linspace(0, 1, 256).view(
        1, 256, 1, 1
    )  # a ramp: an error of location is an error of value
    locations = torch.rand(1, 50, 1, 1, 1, 2)
    weights = torch.ones(1, 50, 1, 1, 1)
    exact = ms_deform_attn(value, [(1, 256)], locations, weights)
    low = ms_deform_attn(value.bfloat16(), [(1, 256)], locations, weights)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(
        low.float(), exact, atol=4e-3, rtol=0
    )  # bfloat16 of 0..1; locations alone would cost 0.3


def test_autocast_keeps_sampling_locations_in_float32() -> None:
    layer = MSDeformAttn(16, 2, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        locations = layer.sampling_locations(
            torch.randn(1, 5, 16), torch.rand(1, 5, 1, 2), [(4, 4)]
        )
    assert locations.dtype == torch.float32


def test_offsets_start_on_rays_and_count_in_cells() -> None:
    layer = MSDeformAttn(16, 4, 2, 3)
    shapes = [(10, 20), (5, 10)]
    locations = layer.sampling_locations(
        torch.randn(1, 1, 16), torch.full((1, 1, 2, 2), 0.5), shapes
    )
    rays = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for level, (height, width) in enumerate(shapes):
        cells = (locations[0, 0, :, level] - 0.5) * torch.tensor(
            [width, height]
        )  # (heads, points, 2)
        torch.testing.assert_close(
            cells, rays[:, None] * torch.tensor([1.0, 2.0, 3.0])[:, None], atol=1e-5, rtol=0
        )


def test_offsets_of_a_box_count_in_half_boxes() -> None:
    layer = MSDeformAttn(16, 4, 1, 2)
    box = torch.tensor([0.5, 0.4, 0.2, 0.1]).view(1, 1, 1, 4)
    locations = layer.sampling_locations(torch.randn(1, 1, 16), box, [(10, 20)])
    torch.testing.assert_close(
        locations[0, 0, 0, 0], torch.tensor([[0.55, 0.4], [0.6, 0.4]])
    )  # heads point right, down, ...
    torch.testing.assert_close(locations[0, 0, 1, 0], torch.tensor([[0.5, 0.425], [0.5, 0.45]]))


def test_channels_that_the_heads_cannot_share_are_refused() -> None:
    with pytest.raises(UserError, match=r"^width=30: expected a multiple of heads=8$"):
        MSDeformAttn(30, 8, 1, 2)
