"""Overviews of cytology glass at 4 um per pixel with known truth: cells, coverslip edges, bubbles,
ink, dust, bad light.
"""

from __future__ import annotations

import cv2
import numpy as np

MPP = 4.0
CELLS = (
    (170, 205, 205),
    (225, 185, 205),
    (225, 195, 165),
    (190, 200, 215),
)  # thin Papanicolaou cytoplasm
NUCLEUS = (95, 80, 130)


def draw_cells(side: int, coverage: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 (side, side, 3) on glass of 240 with uneven light and noise, bool truth of cells)."""
    rng = np.random.default_rng(seed)
    light = 240 - 14 * np.hypot(*np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j])[..., None]
    # drawn with a margin, so that cells lie on the border, too
    transmission = np.ones((side + 24, side + 24, 3), dtype=np.float32)
    truth = np.zeros((side + 24, side + 24), dtype=np.uint8)
    inner = slice(12, side + 12)
    while truth[inner, inner].mean() < coverage:
        for x, y in rng.integers(
            12, side + 12, (max(1, int(30 * coverage * (side / 512) ** 2)), 2)
        ):
            axes = tuple(int(v) for v in rng.integers(4, 8, 2))  # 32 to 56 um across
            body = np.zeros((25, 25), dtype=np.uint8)
            cv2.ellipse(body, (12, 12), axes, float(rng.integers(180)), 0, 360, 1, -1)
            part = transmission[y - 12 : y + 13, x - 12 : x + 13]
            part[body > 0] = np.minimum(
                part[body > 0], np.array(CELLS[rng.integers(len(CELLS))]) / 240
            )
            part[11:14, 11:14] = np.minimum(part[11:14, 11:14], np.array(NUCLEUS) / 240)
            truth[y - 12 : y + 13, x - 12 : x + 13] |= body
    picture = light * transmission[inner, inner] + rng.normal(0, 1.5, (side, side, 3))
    return np.clip(picture, 0, 255).astype(np.uint8), truth[inner, inner].astype(bool)


def add_line(
    picture: np.ndarray, start: tuple[int, int], end: tuple[int, int], width: int = 3
) -> np.ndarray:
    """A dark coverslip edge; returns where it is."""
    mark = np.zeros(picture.shape[:2], dtype=np.uint8)
    cv2.line(mark, start, end, 1, width)
    picture[mark > 0] = (picture[mark > 0] * 0.55).astype(np.uint8)
    return mark.astype(bool)


def add_bubble(picture: np.ndarray, centre: tuple[int, int], radius: int) -> np.ndarray:
    """A thin dark ring; returns where it is."""
    mark = np.zeros(picture.shape[:2], dtype=np.uint8)
    cv2.circle(mark, centre, radius, 1, 3)
    picture[mark > 0] = (picture[mark > 0] * 0.5).astype(np.uint8)
    return mark.astype(bool)


def add_ink(
    picture: np.ndarray, start: tuple[int, int], end: tuple[int, int], colour: tuple[int, int, int]
) -> np.ndarray:
    """A pen stroke of 400 um; returns where it is."""
    mark = np.zeros(picture.shape[:2], dtype=np.uint8)
    cv2.line(mark, start, end, 1, round(400 / MPP))
    picture[mark > 0] = (picture[mark > 0] / 240.0 * colour).astype(np.uint8)
    return mark.astype(bool)


def add_dust(picture: np.ndarray, count: int, seed: int = 1) -> np.ndarray:
    """Grey specks of 12 to 40 um; returns where they are."""
    rng, mark = np.random.default_rng(seed), np.zeros(picture.shape[:2], dtype=np.uint8)
    for x, y in rng.integers(0, len(picture), (count, 2)):
        cv2.circle(mark, (int(x), int(y)), int(rng.integers(1, 6)), 1, -1)
    picture[mark > 0] = (picture[mark > 0] * 0.4).astype(np.uint8)
    return mark.astype(bool)


def add_mount(picture: np.ndarray, width: int) -> np.ndarray:
    """Beyond the mounting medium the glass is darker; returns where that is."""
    mark = np.zeros(picture.shape[:2], dtype=bool)
    mark[:, -width:] = True
    picture[mark] = (picture[mark] * 0.82).astype(np.uint8)
    return mark
