"""The canvas of an H&E picture: how much haematoxylin and eosin lies at every pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from patch_encoder.demo.drawing.shapes import window

Point = tuple[float, float]
Angle = float
"""Radians, from the x axis towards the y axis."""


@dataclass(frozen=True)
class Canvas:
    """Amounts of both stains, (H, W) float32; 1 is that of a dense interphase nucleus."""

    haematoxylin: np.ndarray
    eosin: np.ndarray

    def cover(
        self, corner: tuple[int, int], share: np.ndarray, nuclear: np.ndarray | float, pink: float
    ) -> None:
        """Replace both stains under a body; what of it lies outside is cut off.

        Args:
            corner: (row, column) of the window on the canvas; may lie outside.
            share: (S, S), how much of each pixel the body covers, 0 to 1.
            nuclear: haematoxylin of the body, (S, S) or one number.
            pink: eosin of the body.
        """
        for plane, amount in ((self.haematoxylin, nuclear), (self.eosin, pink)):
            own, part = self._cut(corner, share.shape)
            shade = amount[part] if isinstance(amount, np.ndarray) else np.float32(amount)
            plane[own] += share[part] * (shade - plane[own])

    def scale(
        self, corner: tuple[int, int], share: np.ndarray, nuclear: float, pink: float
    ) -> None:
        """Multiply both stains by factors where `share` is 1, by less of them where it is less."""
        for plane, factor in ((self.haematoxylin, nuclear), (self.eosin, pink)):
            own, part = self._cut(corner, share.shape)
            plane[own] *= 1 + share[part] * np.float32(factor - 1)

    def _cut(
        self, corner: tuple[int, int], shape: tuple[int, ...]
    ) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        own, part = [], []
        for start, length, size in zip(corner, shape, self.eosin.shape, strict=True):
            low, high = max(start, 0), max(min(start + length, size), max(start, 0))
            own.append(slice(low, high))
            part.append(slice(low - start, high - start))
        return (own[0], own[1]), (part[0], part[1])


def turned_window(
    centre: Point, radius: float, angle: Angle
) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """A window around a centre, and the pixel offsets along and across a direction, each (S, S).

    Returns:
        (row, column) of the window's corner, offsets along, offsets across.
    """
    row, column, x, y = window(radius, centre)
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return (row, column), x * c + y * s, y * c - x * s
