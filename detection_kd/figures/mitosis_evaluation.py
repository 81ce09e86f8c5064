"""Figures of how well mitoses are found: precision over recall, FROC, and fields with errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from detection_kd.evaluation.froc import RATES
from detection_kd.evaluation.point_matching import match_points
from detection_kd.evaluation.point_metrics import (
    ScoredField,
    compute_curve,
    count_fields,
    tabulate_detections,
)
from detection_kd.figures.overlays import FALSE_COLOUR, HIT_COLOUR, MISS_COLOUR
from patch_encoder.slides import open_slide
from patch_encoder.slides.overview import read_overview
from wsi_common.figures import new_figure, palette_colour, save_figure, styled
from wsi_common.files import atomic_path, safe_id

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 1600  # most px of a field's picture
RING_UM = 12.0
ALL = "all fields"


def write_mitosis_figures(
    folder: Path,
    fields: Sequence[ScoredField],
    images: Mapping[str, Path],
    threshold: float,
    radius: float,
    overlays: int,
) -> None:
    """Write `curves.png`, and `overlays/<field id>.jpg` of the fields with most errors.

    Args:
        folder: where to.
        fields: with detections of every score.
        images: field id -> picture, where it is there.
        threshold: least score of a mitosis.
        radius: um within which a detection hits.
        overlays: fields that are drawn.
    """
    save_figure(draw_curves(fields, threshold, radius), folder / "curves.png")
    for old in (folder / "overlays").glob("*.jpg"):
        old.unlink()
    errors = count_fields(fields, threshold, radius=radius)[:, 1:].sum(1)
    for index in np.argsort(-errors, kind="stable")[:overlays].tolist():
        field = fields[index]
        if field.field_id in images:
            picture = draw_field(images[field.field_id], field.above(threshold), radius)
            name = f"{safe_id(field.field_id, 'field id')}.jpg"
            with atomic_path(folder / "overlays" / name) as temporary:
                Image.fromarray(picture).save(temporary, "JPEG", quality=88)


@styled()
def draw_curves(fields: Sequence[ScoredField], threshold: float, radius: float) -> Figure:
    """Precision over recall, and recall over false positives per mm2: all fields and each scanner;
    a dot at the threshold.
    """
    scanners = sorted({field.scanner for field in fields})
    groups = {ALL: list(fields)}
    if len(scanners) > 1:
        groups |= {name: [f for f in fields if f.scanner == name] for name in scanners}
    figure = new_figure(8.6, 3.8)
    left, right = figure.subplots(1, 2)
    for number, (name, group) in enumerate(groups.items()):
        table = tabulate_detections(group, radius)
        curve = compute_curve(group, table)
        cuts = np.unique(table.scores)[::-1]
        chosen = int((cuts >= threshold).sum())
        hits, false = curve.hits[0], curve.false[0]
        recall = hits / max(1.0, curve.truth[0, 0])
        precision = hits / np.maximum(hits + false, 1)
        style = {"color": palette_colour(number), "linewidth": 2.2 if name == ALL else 1.3}
        value = curve.average_precision()[0]
        left.plot(recall[1:], precision[1:], label=f"{name} (AP {value:.3f})", **style)
        left.plot(recall[chosen], precision[chosen], "o", color=style["color"], markersize=5)
        if np.isfinite(curve.area).all():
            rate = false / curve.area[0, 0]
            right.plot(np.maximum(rate, RATES[0] / 8), recall, drawstyle="steps-post", **style)
            right.plot(max(rate[chosen], RATES[0] / 8), recall[chosen], "o", color=style["color"])
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01))
    right.set(xlabel="false positives per mm2", ylabel="recall", xscale="log", ylim=(0, 1.01))
    right.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    right.set_xlim(RATES[0] / 2, 8 * RATES[-1])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(True)
    left.legend(loc="lower left")
    return figure


def draw_field(path: Path, field: ScoredField, radius: float) -> UInt8[np.ndarray, "h w 3"]:
    """A field with a ring around hits (green), false positives (orange) and misses (blue)."""
    with open_slide(path) as slide:
        picture = read_overview(slide, SIDE).pixels.copy()
        um_per_px = np.sqrt(field.area_mm2 * 1e6 / (slide.width * slide.height))
        um_per_px *= slide.width / picture.shape[1]
    pairs = match_points(field.found, field.truth, radius)
    missed = np.setdiff1d(np.arange(len(field.truth)), pairs[:, 1])
    false = np.setdiff1d(np.arange(len(field.found)), pairs[:, 0])
    groups = (
        (field.truth[missed], MISS_COLOUR),
        (field.found[false], FALSE_COLOUR),
        (field.found[pairs[:, 0]], HIT_COLOUR),
    )
    ring = max(8, round(RING_UM / um_per_px))
    for points, colour in groups:
        for x, y in (points / um_per_px).round().astype(int).tolist():
            cv2.circle(picture, (x, y), ring, (255, 255, 255), 4, cv2.LINE_AA)
            cv2.circle(picture, (x, y), ring, colour, 2, cv2.LINE_AA)
    return _write_legend(picture, [len(points) for points, _ in groups])


def _write_legend(picture: np.ndarray, counts: list[int]) -> UInt8[np.ndarray, "h w 3"]:
    """The meaning of the colours in a band below."""
    band = np.full((30, picture.shape[1], 3), 255, np.uint8)
    texts = [f"{name}: {count}" for name, count in zip(("missed", "false", "hits"), counts)]
    for number, (text, colour) in enumerate(
        zip(texts, (MISS_COLOUR, FALSE_COLOUR, HIT_COLOUR), strict=True)
    ):
        place = (12 + 110 * number, 20)
        cv2.putText(band, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.48, colour, 1, cv2.LINE_AA)
    return np.concatenate([picture, band])
