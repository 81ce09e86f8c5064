"""What stands beside a picture of a slide: text that fits, and a scale bar of a round length."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

INK, QUIET = (30, 38, 46), (100, 110, 120)
TITLE, TEXT = 15, 12  # px of the first line and of all else
LONGEST = 110  # px of a scale bar beside text of TEXT px
ROUND = [digit * 10.0**power for power in range(-2, 7) for digit in (1, 2, 5)]  # um
Font = ImageFont.FreeTypeFont


@lru_cache
def load_caption_font(size: int | float) -> Font:
    """DejaVu Sans, which matplotlib brings: Pillow's own font has no µ, accents or Greek."""
    import matplotlib  # loads for a second

    return ImageFont.truetype(
        Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size
    )


def fit_text(text: str, font: Font, width: float) -> str:
    """The text, cut with dots where it is wider than `width` px."""
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def make_scale_bar(
    draw: ImageDraw.ImageDraw, font: Font, mpp: float | None, x: int, y: int
) -> None:
    """The longest round length of at most LONGEST px and how long it is, its right end at x; all in
    proportion to the text.

    Args:
        draw, font: of the picture.
        mpp: um per pixel of the picture; None or 0: unknown, which is said instead.
        x, y: right end and top of the bar, px.
    """
    if not mpp:
        draw.text((x, y + 2), "resolution unknown", fill=QUIET, font=font, anchor="rm")
        return
    size = font.size / TEXT
    length = choose_round_length(LONGEST * size * mpp)
    text = format_length(length)
    draw.text((x, y + 2 * size), text, fill=INK, font=font, anchor="rm")
    end = x - font.getlength(text) - 8 * size
    draw.rectangle((end - length / mpp, y, end, y + 4 * size), fill=INK)


def format_length(length: float) -> str:
    """A length in um for people."""
    return f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"


def choose_round_length(most: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is no more than `most` um."""
    return max((length for length in ROUND if length <= most), default=ROUND[0])
