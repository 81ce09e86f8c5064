"""A picture per slide that shows what was taken for tissue and which tiles were cut."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from patch_encoder.coordinates import Coordinates
from patch_encoder.slides.base import Slide

OUTLINE = (0, 150, 60)
TILE = (30, 80, 220)


def mask_overlay(slide: Slide, mask: np.ndarray, coordinates: Coordinates, max_side: int = 768) -> Image.Image:
    """The slide's overview with tissue outlines (green) and tiles (blue)."""
    overview = slide.thumbnail(max_side)
    height, width = overview.shape[:2]
    resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    scaled = np.asarray(resized).astype(bool)
    thickness = max(1, max(height, width) // 500)
    edge = ndimage.binary_dilation(scaled, iterations=thickness) ^ scaled
    pixels = overview.copy()
    pixels[edge] = OUTLINE
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    scale = width / slide.width
    side = coordinates.geometry.patch_size_level0 * scale
    for x, y in coordinates.coords * scale:
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline=TILE)
    return image
