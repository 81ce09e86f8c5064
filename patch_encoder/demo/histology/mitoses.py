"""Mitotic figures in their phases: dark condensed chromatin with a hairy outline and no membrane.

Lengths are pixels at 0.5 um: a metaphase plate is about 7 um long and 2.5 um wide. The mitotic cell
is rounded, and most often paler than its neighbours. Shapes follow the criteria of Donovan et al.
("Mitotic figures: normal, atypical, and mimics", Vet Pathol 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from patch_encoder.demo.drawing.shapes import blob, noise, smoothstep, warp
from patch_encoder.demo.histology.canvas import Canvas, Point, turned_window

DEPTH = (1.3, 1.95)
"""Haematoxylin of condensed chromatin; look-alikes have nearly the same."""
REACH = 24.0
"""Half a side of the window that holds a mitotic cell, px."""
Phase = Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]


def draw_mitosis(canvas: Canvas, rng: np.random.Generator, centre: Point) -> None:
    """Draw a mitotic cell of a random phase; `centre` is what is annotated."""
    phases, shares = list(PHASES), np.array(list(PHASES.values()))
    phase = phases[int(rng.choice(len(phases), p=shares / shares.sum()))]
    corner, along, across = turned_window(centre, REACH, rng.uniform(0, 2 * math.pi))
    if rng.random() < 0.8:
        _clear_cytoplasm(canvas, rng, corner, along, across)
    hairy = warp(rng, along, across, rng.uniform(1.0, 2.2), 4)
    distance = phase(rng, *hairy)
    matter = smoothstep(distance, 0.9, -0.9)
    grain = 1 + np.float32(0.22) * noise(rng, matter.shape, 4)
    depth = np.float32(rng.uniform(*DEPTH)) * grain
    canvas.cover(corner, matter, depth, 0.12)


def _clear_cytoplasm(
    canvas: Canvas,
    rng: np.random.Generator,
    corner: tuple[int, int],
    along: np.ndarray,
    across: np.ndarray,
) -> None:
    """The rounded, paler body of the cell, with a faint border."""
    along, across = warp(rng, along, across, 2.0, 16)
    distance = blob(rng, along * np.float32(0.9), across, rng.uniform(11.0, 15.5), 0.06)
    body = smoothstep(distance, 1.5, -1.5)
    share = body * np.float32(rng.uniform(0.3, 0.9))
    canvas.cover(corner, share, rng.uniform(0.04, 0.12), rng.uniform(0.15, 0.34))
    mottle = body * noise(rng, body.shape, 4)
    canvas.scale(corner, mottle, 1.15, 1.2)
    canvas.scale(corner, smoothstep(np.abs(distance), 1.6, 0.0), 1.2, 1.5)


def _bar(
    along: np.ndarray, across: np.ndarray, length: float, width: float, bend: float
) -> np.ndarray:
    """Distance to a bent bar with round ends, `length` and `width` from its middle."""
    across = across - np.float32(bend) * along * along
    beyond = np.maximum(np.abs(along) - np.float32(length - width), np.float32(0))
    return np.sqrt(beyond * beyond + across * across) - np.float32(width)


def late_prophase(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Condensed threads in a round body without a membrane."""
    body = blob(rng, along, across, rng.uniform(6.5, 9.0), 0.1)
    threads = noise(rng, body.shape, 4) + np.float32(0.5) * noise(rng, body.shape, 8)
    return np.maximum(body, threads * np.float32(3.2) - np.float32(rng.uniform(0.3, 0.9)))


def prometaphase(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """An irregular clump with projections."""
    squeeze = np.float32(rng.uniform(0.65, 0.95))
    return blob(rng, along, across / squeeze, rng.uniform(4.8, 7.0), 0.3) * squeeze


def metaphase(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """A plate seen from the side."""
    return _bar(
        along, across, rng.uniform(5.5, 9.0), rng.uniform(1.7, 3.0), rng.uniform(-0.025, 0.025)
    )


def metaphase_ring(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """A plate seen from its pole: a ring, open or nearly closed in the middle."""
    squeeze = np.float32(rng.uniform(0.75, 1.0))
    ring = blob(rng, along, across / squeeze, rng.uniform(4.0, 5.4), 0.1)
    return np.abs(ring) - np.float32(rng.uniform(1.7, 2.6))


def anaphase(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Two parallel bars that part."""
    return _pair(rng, along, across, rng.uniform(3.4, 6.0), rng.uniform(4.8, 7.5))


def telophase(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Two short bars far apart, at the poles of a cell that divides."""
    return _pair(rng, along, across, rng.uniform(6.8, 9.5), rng.uniform(4.0, 6.0))


def _pair(
    rng: np.random.Generator, along: np.ndarray, across: np.ndarray, apart: float, length: float
) -> np.ndarray:
    width, bend = rng.uniform(1.4, 2.3), rng.uniform(-0.01, 0.035)
    bars = [
        _bar(along - np.float32(rng.uniform(-0.8, 0.8)), side * across - apart, length, width, bend)
        for side in (-1, 1)
    ]
    return np.minimum(bars[0], bars[1])


def atypical(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """A plate or a pair with chromosomes that were left behind."""
    whole = (metaphase, anaphase)[int(rng.integers(2))](rng, along, across)
    for _ in range(int(rng.integers(1, 4))):
        a, b = rng.uniform(-8, 8, 2)
        spot = np.hypot(along - np.float32(a), across - np.float32(b))
        whole = np.minimum(whole, spot - np.float32(rng.uniform(1.0, 1.8)))
    return whole


PHASES: dict[Phase, float] = {
    late_prophase: 0.12,
    prometaphase: 0.2,
    metaphase: 0.28,
    metaphase_ring: 0.12,
    anaphase: 0.12,
    telophase: 0.06,
    atypical: 0.1,
}
"""Phases and how frequent they are."""
