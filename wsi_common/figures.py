"""How every figure looks and is written: one style, one palette, atomic files and data URIs.

Figures are drawn with matplotlib's object interface: no pyplot, no backend and no global state. The
style holds inside `styled()`, which is a `with` block or the decorator of a drawing function.
Loading matplotlib takes a second, so that it is imported where something is drawn. The palette is
that of Okabe and Ito (2008), which colour-blind readers can tell apart.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from wsi_common.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "v")
QUIET = "#bbbbbb"  # a reference line, or what belongs to no group
CHANCE = {"color": QUIET, "linewidth": 0.8, "linestyle": "--"}  # what knowing nothing gives
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "wsi",  # the same figure gives the same bytes
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "grid.color": "#eeeeee",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
}
# what matplotlib would otherwise write of the date and of its own version
METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}


@contextmanager
def styled() -> Iterator[None]:
    """Apply STYLE inside a `with` block, or inside a function decorated with `@styled()`."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        yield


def new_figure(width: float | int, height: float | int) -> Figure:
    """Make an empty figure of this size in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def palette_colour(index: int) -> str:
    """The colour of line, group or class number `index`; colours repeat after the last one."""
    return PALETTE[index % len(PALETTE)]


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of line number `index`: all colours first, then the same ones dashed."""
    return {
        "color": palette_colour(index),
        "linestyle": DASHES[index // len(PALETTE) % len(DASHES)],
    }


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure atomically, in the format of the path's suffix; returns the path."""
    file_format = path.suffix.removeprefix(".")
    metadata = METADATA[file_format]
    with styled(), atomic_path(path) as temporary:  # ticks are made while saving
        figure.savefig(temporary, format=file_format, dpi=150, metadata=metadata)
    return path


def svg_uri(figure: Figure) -> str:
    """`data:image/svg+xml;base64,...`; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata=METADATA["svg"])
    return data_uri(buffer.getvalue(), "svg+xml")


def jpeg_uri(pixels: np.ndarray, quality: int = 85) -> str:
    """uint8 (H, W, 3) as `data:image/jpeg;base64,...`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return data_uri(buffer.getvalue(), "jpeg")


def data_uri(content: bytes, kind: str) -> str:
    """An encoded image as the `src` of an HTML page that stands alone; kind: `png`, `jpeg`, ..."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
