"""The bytes of the attention op against hand-counted cases."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cuda_timing import (
    Traffic,
    backward_traffic,
    corners_inside,
    forward_traffic,
    rooflines,
)

WIDTH, HEIGHT = 4, 3


def corners(*cells: tuple[float, float]) -> int:
    """Corners of points given in cells (x, y) of one map, cell centres at whole numbers."""
    located = torch.tensor(
        [((x + 0.5) / WIDTH, (y + 0.5) / HEIGHT) for x, y in cells], dtype=torch.float64
    )
    return corners_inside(located.view(1, 1, 1, -1, 2), [(HEIGHT, WIDTH)], [len(cells)])


@pytest.mark.parametrize(
    ("cell", "count"),
    [
        ((1.5, 0.5), 4),  # between four centres
        ((1.0, 1.0), 4),  # on a centre: the other three have no weight but are read
        ((-0.5, 1.5), 2),  # left border
        ((3.0, 0.5), 2),  # on the last column
        ((1.5, 2.5), 2),  # lower border
        ((-0.5, -0.5), 1),
        ((3.5, 2.5), 1),
        ((4.0, 1.5), 0),  # a whole cell outside
        ((-1.0, 1.5), 0),
        ((1.5, 300.0), 0),
        ((float("nan"), 1.5), 0),
    ],
)
def test_corners_of_one_point(cell: tuple[float, float], count: int) -> None:
    assert corners(cell) == count


def test_corners_add_up_over_points_and_levels() -> None:
    assert corners((1.5, 0.5), (-0.5, 1.5), (9.0, 9.0)) == 6
    middle = torch.full((2, 3, 2, 3, 2), 0.5)
    assert corners_inside(middle, [(2, 2), (0, 3), (1, 1)], [1, 1, 1]) == 12 * (4 + 0 + 1)


def test_bytes_of_a_small_case() -> None:
    # 1 sample, 6 cells, 2 heads, 8 channels; 3 queries, 5 points
    value, locations = torch.zeros(1, 6, 2, 8), torch.zeros(1, 3, 2, 5, 2)
    values, out, points = 6 * 2 * 8, 3 * 2 * 8, 3 * 2 * 5
    forward = forward_traffic(value, locations, corners=100)
    assert forward == Traffic(4 * values + 4 * out + 12 * points, 100 * 8 * 4)
    backward = backward_traffic(value, locations, corners=100)
    assert backward == Traffic(8 * values + 4 * out + 24 * points, 100 * 8 * 8)
    low = value.bfloat16()
    assert forward_traffic(low, locations, 100) == Traffic(
        2 * values + 2 * out + 12 * points, 100 * 8 * 2
    )
    assert backward_traffic(low, locations, 100, sum_bytes=8) == Traffic(
        4 * values + 2 * out + 24 * points, 100 * 8 * 10
    )


def test_shares_of_the_measured_bandwidths() -> None:
    found = rooflines(0.5, Traffic(1_000_000_000, 3_000_000_000), dram=4000, l2=8000)
    assert found == {"dram_gbs": 2000, "dram_share": 0.5, "l2_gbs": 6000, "l2_share": 0.75}
