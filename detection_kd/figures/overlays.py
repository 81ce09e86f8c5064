"""An image's annotated boxes beside its detections: hits, false positives and misses in colours
that everyone can tell apart.

Colours: Okabe and Ito (2008), safe for colour-blind readers; each line has a white rim, so that it
shows on any stain, and a missed box is dashed besides. A label that finds no free place beside its
box is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from detection_kd.datasets.detection import read_image
from detection_kd.evaluation.froc import FALSE, HIT
from detection_kd.evaluation.operating_point import JudgedImage
from patch_encoder.viz.captions import load_caption_font
from wsi_common.files import atomic_path, safe_id

HIT_COLOUR = (0, 128, 94)
FALSE_COLOUR = (204, 78, 0)
MISS_COLOUR = (0, 94, 168)
NEITHER_COLOUR = (110, 110, 110)
INK, PAPER = (40, 40, 40), (255, 255, 255)
SIDES = (800, 1000)  # least and most px of a panel's long side
LEAST_WIDTH = 420  # px of a panel, so that its heading fits
GAP, BAND = 16, 34  # px between panels, and of the lines of text above and below
FONT, SMALL = 15, 13  # px of text
Box = tuple[float, float, float, float]


def write_overlays(
    folder: Path, judged: Sequence[JudgedImage], categories: list[str], score: float
) -> None:
    """Write `<image id>.jpg` for each image."""
    for image in judged:
        with atomic_path(folder / f"{safe_id(str(image.record.id), 'image id')}.jpg") as temporary:
            draw_overlay(image, categories, score).save(
                temporary, "JPEG", quality=92, subsampling=0
            )


def draw_overlay(judged: JudgedImage, categories: list[str], score: float) -> Image.Image:
    """Annotation on the left, detections on the right, the meaning of the colours below."""
    pixels = read_image(judged.record)
    scale = float(np.clip(max(pixels.size), *SIDES)) / max(pixels.size)
    size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
    pixels = pixels.resize(size, Image.Resampling.LANCZOS)
    column = max(size[0], LEAST_WIDTH)
    sheet = Image.new("RGB", (2 * column + 3 * GAP, size[1] + 2 * BAND), PAPER)
    draw = ImageDraw.Draw(sheet)
    panels = (
        _draw_annotation(judged, pixels, scale, categories),
        _draw_detections(judged, pixels, scale, categories),
    )
    for number, (panel, heading) in enumerate(
        zip(panels, _write_headings(judged, score), strict=True)
    ):
        left = GAP + number * (column + GAP)
        draw.text((left, BAND / 2), heading, INK, load_caption_font(FONT), anchor="lm")
        sheet.paste(panel, (left, BAND))
    _draw_legend(draw, sheet.size, judged.record.path.name)
    return sheet


def _write_headings(judged: JudgedImage, score: float) -> tuple[str, str]:
    found, missed = int(judged.found.sum()), int(judged.missed.sum())
    hits, wrong = (int((judged.kinds == kind).sum()) for kind in (HIT, FALSE))
    return (
        f"annotation: found {found}, missed {missed}",
        f"score {score:.2f} and above: hits {hits}, false positives {wrong}",
    )


def _draw_annotation(
    judged: JudgedImage, pixels: Image.Image, scale: float, categories: list[str]
) -> Image.Image:
    """The image with its annotated boxes."""
    record = judged.record
    colours = np.where(judged.found[:, None], HIT_COLOUR, MISS_COLOUR)
    colours[record.crowd] = NEITHER_COLOUR
    texts = [_shorten(categories[label]) if len(categories) > 1 else "" for label in record.labels]
    return _draw_boxes(pixels, record.boxes * scale, colours, texts, judged.missed)


def _draw_detections(
    judged: JudgedImage, pixels: Image.Image, scale: float, categories: list[str]
) -> Image.Image:
    """The image with its detections."""
    found = judged.prediction
    colours = np.array(
        [
            {HIT: HIT_COLOUR, FALSE: FALSE_COLOUR}.get(kind, NEITHER_COLOUR)
            for kind in judged.kinds.tolist()
        ]
    )
    names = [
        _shorten(categories[label]) + " " if len(categories) > 1 else "" for label in found.labels
    ]
    texts = [f"{name}{value:.2f}" for name, value in zip(names, found.scores, strict=True)]
    return _draw_boxes(pixels, found.boxes * scale, colours, texts, np.zeros(len(texts), bool))


def _shorten(name: str, most: int = 14) -> str:
    return name if len(name) <= most else name[: most - 2].rstrip() + ".."


def _draw_boxes(
    pixels: Image.Image,
    boxes: Float[np.ndarray, "n 4"],
    colours: np.ndarray,
    texts: list[str],
    dashed: np.ndarray,
) -> Image.Image:
    """Draw boxes (px of the panel) on a copy of it, the first on top, labels above all boxes."""
    panel = pixels.copy()
    draw = ImageDraw.Draw(panel)
    items = [
        (tuple(box), tuple(colour))
        for box, colour in zip(boxes.tolist(), colours.tolist(), strict=True)
    ]
    for (box, colour), dash in reversed(list(zip(items, dashed.tolist(), strict=True))):
        x0, y0, x1, y1 = box
        draw.rectangle((x0 - 1, y0 - 1, max(x0, x1) + 1, max(y0, y1) + 1), outline=PAPER, width=4)
        _draw_outline(draw, box, colour, dash)
    placed: list[Box] = []
    for (box, colour), text in zip(items, texts, strict=True):
        place = (
            _find_free_place(
                box, load_caption_font(SMALL).getbbox(text, anchor="lt")[2:], panel.size, placed
            )
            if text
            else None
        )
        if place is not None:
            placed.append(place)
            draw.rectangle(place, fill=colour)
            draw.text(
                ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2),
                text,
                PAPER,
                load_caption_font(SMALL),
                anchor="mm",
            )
    return panel


def _draw_outline(
    draw: ImageDraw.ImageDraw, box: Box, colour: tuple[int, ...], dashed: bool, dash: int = 6
) -> None:
    """A frame of 2 px, whole or in dashes."""
    x0, y0, x1, y1 = box
    if not dashed:
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=2)
        return
    for start in np.arange(x0, x1, 2 * dash):
        for y in (y0, y1 - 1):
            draw.rectangle((start, y, min(start + dash, x1), y + 1), fill=colour)
    for start in np.arange(y0, y1, 2 * dash):
        for x in (x0, x1 - 1):
            draw.rectangle((x, start, x + 1, min(start + dash, y1)), fill=colour)


def _find_free_place(
    box: Box, text: tuple[float | int, float | int], panel: tuple[int, int], taken: list[Box]
) -> Box | None:
    """Where a label fits at its box, touching no other: above, below, inside; else None."""
    (x0, y0, x1, y1), width, height = box, text[0] + 6.0, text[1] + 6.0
    corners = [(x, y) for y in (y0 - height, y1 + 1, y0, y1 - height) for x in (x0, x1 - width)]
    for x, y in corners:
        x = min(max(x, 0.0), panel[0] - 1 - width)
        place = (x, y, x + width, y + height)
        if y >= 0 and y + height < panel[1] and not any(_touch(place, other) for other in taken):
            return place
    return None


def _touch(a: Box, b: Box) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _draw_legend(draw: ImageDraw.ImageDraw, sheet: tuple[int, int], name: str) -> None:
    """Write the colours' meaning at the bottom right, the file's name at the bottom left."""
    x, y = sheet[0] - GAP, sheet[1] - BAND / 2
    entries = [
        ("second hit or crowd", NEITHER_COLOUR),
        ("missed", MISS_COLOUR),
        ("false positive", FALSE_COLOUR),
        ("hit", HIT_COLOUR),
    ]
    for text, colour in entries:
        x -= draw.textlength(text, load_caption_font(SMALL))
        draw.text((x, y), text, INK, load_caption_font(SMALL), anchor="lm")
        x -= 28
        _draw_outline(draw, (x, y - 7, x + 20, y + 6), colour, colour == MISS_COLOUR, dash=4)
        x -= 20
    while draw.textlength(name, load_caption_font(SMALL)) > x - 2 * GAP:
        name = name.removesuffix("...")[:-1] + "..."
    draw.text((GAP, y), name, INK, load_caption_font(SMALL), anchor="lm")
