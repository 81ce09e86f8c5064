"""What the page's figures have in common: pictures on a dark ground, and figures as JPEG."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from wsi_common.figures import jpeg_uri, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "inferno"
DPI = 130


def figure_uri(figure: Figure) -> str:
    """A figure full of photographs as a JPEG for a page; as SVG it would be ten times as large."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with styled():
        figure.set_dpi(DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return jpeg_uri(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def colour_map(
    values: Float[np.ndarray, "h w"], low: float, high: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Values as colours from dark (`low`) to bright (`high`)."""
    from matplotlib import colormaps

    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return (colormaps[COLOURS](scaled)[..., :3] * 255).round().astype(np.uint8)
