"""The keys by which a user decides how slides are drawn, and their checks."""

from __future__ import annotations

from dataclasses import dataclass

from mil.heatmaps.drawing import COLOURS
from mil.heatmaps.scores import VALUES
from mil.tasks.base import Task
from patch_encoder.slides.base import Slide
from wsi_common.config import key
from wsi_common.errors import UserError

LARGEST = 20000  # px a side of a PNG


@dataclass
class Drawing:
    """How a slide is drawn."""

    value: str = key(
        "auto",
        "attention; probability (survival: risk, regression: value) of the tile alone; auto: "
        "attention unless all tiles share it",
        choices=VALUES,
    )
    of_class: str = key(
        "",
        "class, label or grade of value=probability; empty: the positive one of two, else the "
        "likeliest",
    )
    scale: str = key(
        "percentile",
        "percentile: rank within the slide; raw: the values",
        choices=("percentile", "raw"),
    )
    colours: str = key("viridis", "colour map, all perceptually uniform", choices=COLOURS)
    alpha: float = key(0.5, "share of the colour in a pixel, the rest is slide")
    max_side: int = key(1600, "longest side of the PNG in px, where neither level nor mpp is given")
    level: int | None = key(None, "pyramid level of the slide whose size the PNG has")
    mpp: float | None = key(None, "um per pixel of the PNG")
    top: int = key(12, "tiles with the highest value to show")
    low: int = key(6, "tiles with the lowest value to show")
    geojson: bool = key(
        True, "write geojson/<slide>.geojson: tiles with their values as QuPath measurements"
    )
    tiff: bool = key(
        False,
        "write tiff/<slide>.tiff: a pyramid with the heat blended in, for QuPath and OpenSlide",
    )
    tiff_max_side: int = key(16384, "longest side of the pyramid's first level in px")


def check_drawing(drawing: Drawing, task: Task) -> None:
    """Refuse what does not go together, before any slide is opened."""
    if drawing.value not in ("auto", "attention", task.alone):
        raise UserError(
            f"value={drawing.value}: expected attention or {task.alone} for a run of "
            f"task={task.kind}; set value={task.alone}"
        )
    if drawing.of_class and not task.names:
        raise UserError(
            f"of_class={drawing.of_class}: a run of task={task.kind} has a {task.alone} and no "
            "classes; leave it out"
        )
    if drawing.level is not None and drawing.mpp is not None:
        raise UserError(
            f"level={drawing.level}, mpp={drawing.mpp}: expected one of them, found both; leave "
            "one out"
        )
    if drawing.of_class and drawing.of_class not in task.names:
        raise UserError(f"of_class={drawing.of_class}: expected one of {', '.join(task.names)}")
    if not 0 < drawing.alpha <= 1:
        raise UserError(f"alpha={drawing.alpha}: expected a share, 0 < alpha <= 1")
    bounds = {"max_side": 64, "tiff_max_side": 256, "top": 1, "low": 0, "level": 0}
    for name, least in bounds.items():
        value = getattr(drawing, name)
        if value is not None and value < least:
            raise UserError(f"{name}={value}: expected at least {least}")
    if drawing.mpp is not None and drawing.mpp <= 0:
        raise UserError(f"mpp={drawing.mpp}: expected um per pixel, more than 0")


def choose_picture_side(
    drawing: Drawing, slide: Slide | None, extent: tuple[int, int], mpp: float
) -> int:
    """Choose the longest side of the PNG.

    Args:
        slide: the open slide, None without one.
        extent: (width, height) of level 0.
        mpp: of level 0, 0 when unknown.

    Raises:
        UserError: no such level, unknown resolution, more than LARGEST px.
    """
    side = drawing.max_side
    if drawing.level is not None:
        levels = len(slide.downsamples) if slide is not None else 1
        if drawing.level >= levels:
            raise UserError(
                f"level={drawing.level}: expected a level of the slide, which has 0 to "
                f"{levels - 1}; use max_side"
            )
        side = max(slide.level_sizes[drawing.level]) if slide is not None else max(extent)
    elif drawing.mpp is not None:
        if not mpp:
            raise UserError(
                f"mpp={drawing.mpp}: expected a slide with a known resolution, found none; use "
                "max_side"
            )
        side = round(max(extent) * mpp / drawing.mpp)
    if side > LARGEST:
        raise UserError(
            f"a PNG of {side} px a side: expected at most {LARGEST}; take a coarser level or mpp, "
            "or tiff=true"
        )
    return max(1, min(side, max(extent)))
