"""Seeded cases of sparse deformable attention, and a dense oracle of the renormalised form, for the
tests of the op.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.sparse_attention import dense
from mil.ops.grid import SparseMaps, build_grid
from mil.ops.sparse_deform_attn import sparse_deform_attn

POINTS = [3, 5, 1]


@dataclass(frozen=True)
class Case:
    """One call: three bags of different size (one of a single tile) on three levels, points that
    differ by level.
    """

    value: Tensor
    index: SparseMaps
    locations: Tensor
    weights: Tensor
    renormalise: bool
    points: list[int]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.locations, self.weights

    def doubled(self) -> Case:
        """The very same numbers in float64, on the CPU."""
        exact = [tensor.detach().cpu().double().requires_grad_() for tensor in self.leaves]
        return replace(
            self, value=exact[0], locations=exact[1], weights=exact[2], index=on(self.index, "cpu")
        )


def on(index: SparseMaps, device: str) -> SparseMaps:
    return index._replace(maps=index.maps.to(device))


def make_index(queries: int, levels: int = 3, bags: int = 3) -> SparseMaps:
    """Bags with holes and one of a single tile, their queries shared out unevenly."""
    generator = torch.Generator().manual_seed(5)
    coords = [torch.tensor([[40, 80]])]
    for width, height in ((9, 6), (5, 11)):
        taken = (torch.rand(height, width, generator=generator) < 0.6).nonzero()
        coords.append(taken.flip(1) * 100)
    index = build_grid(coords[:bags], levels, step=100).index
    few = queries // 5
    return index._replace(bags=torch.tensor([few, queries - (bags - 1) * few, few][:bags]))


def make_case(
    dim: int,
    queries: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    renormalise: bool = False,
    levels: int = 3,
    bags: int = 3,
) -> Case:
    """Locations from 1.5 cells outside of the map to 1.5 beyond it, away from the lines where the
    gradient jumps.
    """
    generator = torch.Generator().manual_seed(dim)
    index, points = make_index(queries, levels, bags), POINTS[:levels]
    size = (queries, 3, sum(points))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    rows = int(index.maps.max()) + 1
    value = torch.randn(
        rows + 2, 3, dim, generator=generator, dtype=torch.float64
    )  # two rows that no map names
    extent = (
        index.shapes.flip(2).double().repeat_interleave(torch.tensor(points), 1)
    )  # (B, P, 2), (W, H)
    extent = extent.repeat_interleave(index.bags, 0)[:, None]
    locations = torch.rand(*size, 2, generator=generator, dtype=torch.float64) * (extent + 2) - 1.5
    near = (locations - locations.round()).abs() < 0.01
    locations = torch.where(near, locations + 0.02, locations)
    weights = torch.rand(size, generator=generator, dtype=torch.float64)
    tensors = [value.to(device, dtype), locations.to(device, real), weights.to(device, real)]
    value, locations, weights = (tensor.requires_grad_() for tensor in tensors)
    return Case(value, on(index, device), locations, weights, renormalise, points)


def run(case: Case, backend: str | None = None) -> Tensor:
    return sparse_deform_attn(
        case.value,
        case.index,
        case.locations,
        case.weights,
        case.points,
        renormalise=case.renormalise,
        backend=backend,
    )


def with_gradients(case: Case, out: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of all three tensors under a weighting that is exact in every dtype."""
    weighting = (torch.arange(out.numel(), device=out.device) % 7 - 3).view(out.shape).to(out)
    return out, *torch.autograd.grad(out, case.leaves, weighting)


def oracle(case: Case) -> Tensor:
    """Dense maps and `grid_sample`; renormalised: every point's sample over that of a map of ones,
    where that is not 0.
    """
    if not case.renormalise:
        return dense(case.value, case.index, case.points, case.locations, case.weights)
    ones = torch.ones_like(case.value[..., :1])
    total = torch.zeros(
        len(case.locations), case.value.shape[1], case.value.shape[2], dtype=case.value.dtype
    )
    for point in range(sum(case.points)):
        level = next(level for level in range(3) if point < sum(case.points[: level + 1]))
        counts = [int(level == other) for other in range(len(case.points))]
        at, alone = case.locations[:, :, point : point + 1], torch.ones_like(case.weights[:, :, :1])
        sample = dense(case.value, case.index, counts, at, alone).unflatten(
            1, (case.value.shape[1], -1)
        )
        share = dense(ones, case.index, counts, at, alone)[..., None]
        total = total + case.weights[:, :, point, None] * torch.where(
            share > 0, sample / share.clamp(min=1e-30), 0.0
        )
    return total.flatten(1)
