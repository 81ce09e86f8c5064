"""Corners of tiles that know the grid of their whole slide, so that a draw of some tiles lies on
the grid of all.

A bag's coords (N, 2) stay a tensor of level-0 pixels, which every model takes; one that lays tiles
on a grid asks for `grid`. What picks rows, copies or moves keeps it; what computes gives a plain
tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from mil.ops.grid_step import agree, fitting_step, infer_step

logger = logging.getLogger(__name__)
KEEPING = {
    Tensor.__getitem__,
    Tensor.to,
    Tensor.cpu,
    Tensor.cuda,
    Tensor.pin_memory,
    Tensor.clone,
    Tensor.detach,
}


class SlideGrid:
    """Step and origin of a slide's grid, found when first asked for.

    Args:
        coords: level-0 corners (x, y) of all tiles of the slide.
        stated: step that the bag file states, which counts; coords only refine it by less than 1 %,
            for steps that are no whole number of pixels. 0: the step is found from coords.
        side: of a tile, the step of tiles that show none; 0: unknown.
    """

    def __init__(
        self, coords: Int[Tensor, "n 2"], stated: int | float = 0, side: int | float = 0
    ) -> None:
        self.coords, self.stated, self.side = (
            coords.numpy(force=True).astype(np.int64, copy=False),
            float(stated),
            float(side),
        )

    @cached_property
    def step(self) -> float:
        """Level-0 pixels from one cell to the next."""
        step = infer_step(self.coords, self.side)
        if self.stated and not agree(step, self.stated):
            step = self.stated
        fitting = fitting_step(self.coords, step)
        if fitting != step:
            corners = self.coords.min(0).tolist(), self.coords.max(0).tolist()
            logger.warning(
                "coords: tiles from %s to %s %g px apart; cells are %g px", *corners, step, fitting
            )
        return fitting

    @cached_property
    def origin(self) -> Int64[np.ndarray, " 2"]:
        """Where cells count from: x of the leftmost tile, y of the uppermost."""
        return self.coords.min(0, initial=2**62)


class SlideCoords(Tensor):
    """Level-0 corners (N, 2) of some tiles of a slide, and the slide's grid; `on_slide` makes
    them.
    """

    grid: SlideGrid

    def __deepcopy__(self, memo: dict[int, Any]) -> SlideCoords:
        """The grid never changes: copies share it."""
        return self.clone()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Corners stay corners where rows are picked, copied or moved."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if (
            func in KEEPING
            and isinstance(args[0], cls)
            and isinstance(result, Tensor)
            and result.shape[1:] == (2,)
        ):
            return _with_grid(result, args[0].grid)
        return result


def on_slide(
    coords: Int[Tensor, "n 2"], stated: int | float = 0, side: int | float = 0
) -> SlideCoords:
    """The corners of all tiles of a slide with its grid, see `SlideGrid`; as they are where they
    have one.
    """
    return (
        coords
        if isinstance(coords, SlideCoords)
        else _with_grid(coords, SlideGrid(coords, stated, side))
    )


def _with_grid(coords: Tensor, grid: SlideGrid) -> SlideCoords:
    coords = coords.as_subclass(SlideCoords)
    coords.grid = grid
    return coords
