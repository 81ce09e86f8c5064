"""One slide of a cohort with the tiles that are to be encoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from patch_encoder.tiles.coordinates import Coordinates


@dataclass(frozen=True)
class SlideJob:
    """One slide to be encoded: where it lies, its tiles, its resolution if the user gave one."""

    slide_id: str
    path: Path
    coordinates: Coordinates
    mpp: float | None
