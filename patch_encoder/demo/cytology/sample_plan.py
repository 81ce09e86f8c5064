"""Which slides and fields the embedded cohort has (ids, cases, labels, splits and the seed of each
picture), and the drawing of each into its file, unless it is there and whole.

Both classes come from the same distribution of everything except the abnormal cells. Some patients
have two slides (same label, same split), so that a split by slide instead of by patient is a leak
that can be noticed. Fields for the detector are pictures of their own, never cut from a slide.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from patch_encoder.demo.cytology.smear import Box, Smear, draw_smear, lesion_boxes, plan_smear
from patch_encoder.demo.cytology.tissue_map import TissueMap, draw_tissue_map
from patch_encoder.demo.pyramid import holds_pyramid, write_pyramid
from wsi_common.files import atomic_path

NEGATIVE, POSITIVE = "negative", "positive"
CELLS = (40.0, 75.0)
"""Fewest and most cells in a million pixels (a quarter of a square millimetre at 0.5 um)."""
FIELD_CELLS = (55.0, 120.0)
ABNORMAL = (0.08, 0.18)
"""Smallest and largest share of abnormal cells on a positive slide."""
MARKED_SHARE = 0.2
JPEG_QUALITY = 95
_SLIDES, _FIELDS, _COHORT = 1, 2, 3  # one branch of the seed for each purpose


@dataclass(frozen=True)
class PlannedSlide:
    """One slide of the cohort: a row of labels.csv and how to draw it."""

    case_id: str
    slide_id: str
    label: str
    split: str
    side: int
    seed: tuple[int, ...]
    zoned: bool = False

    def tissue(self) -> TissueMap | None:
        """Its zones; None where cells lie uniformly."""
        return draw_tissue_map(_make_generator((*self.seed, 4)), self.side) if self.zoned else None

    def smear(self) -> Smear:
        """What lies on it."""
        rng = _make_generator((*self.seed, 3))
        share = ABNORMAL[0] + (ABNORMAL[1] - ABNORMAL[0]) * float(rng.random())
        marked = rng.random() < MARKED_SHARE
        return plan_smear(
            self.seed,
            self.side,
            CELLS,
            share if self.label == POSITIVE else 0.0,
            bool(marked),
            self.tissue(),
        )


@dataclass(frozen=True)
class PlannedField:
    """One field for the detector."""

    name: str
    subset: str
    side: int
    seed: tuple[int, ...]

    def smear(self) -> Smear:
        """What lies on it; a fifth of the fields is drawn without abnormal cells."""
        rng = _make_generator((*self.seed, 3))
        share = 0.12 + 0.2 * float(rng.random()) if rng.random() < 0.8 else 0.0
        return plan_smear(self.seed, self.side, FIELD_CELLS, share)


def _make_generator(seed: tuple[int, ...]) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))


def plan_slides(
    seed: int, side: int, counts: dict[str, int], double_share: float, zoned: bool = False
) -> list[PlannedSlide]:
    """Slides of all splits, balanced, ids S0001, S0002, ... in an order that says nothing about the
    class.

    Args:
        seed: the cohort's seed.
        side: px of level 0.
        counts: slides by split name; half of each (rounded down) is positive.
        double_share: share of the patients that have two slides.
        zoned: whether each slide has a tissue map.
    """
    rng = _make_generator((seed, _COHORT))
    cases: list[tuple[str, str, int]] = []
    for split, count in counts.items():
        own: list[tuple[str, str, int]] = []
        for label, left in ((POSITIVE, count // 2), (NEGATIVE, count - count // 2)):
            doubles = round(double_share * left / (1 + double_share))
            own += [(split, label, 2)] * doubles + [(split, label, 1)] * (left - 2 * doubles)
        cases += [own[int(place)] for place in rng.permutation(len(own))]
    slides: list[PlannedSlide] = []
    for number, (split, label, count) in enumerate(cases, 1):
        for _ in range(count):
            index = len(slides) + 1
            slides.append(
                PlannedSlide(
                    f"C{number:04d}",
                    f"S{index:04d}",
                    label,
                    split,
                    side,
                    (seed, _SLIDES, index),
                    zoned,
                )
            )
    return slides


def plan_fields(seed: int, side: int, counts: dict[str, int]) -> list[PlannedField]:
    """Fields of all subsets (train, val), in order."""
    fields: list[PlannedField] = []
    for subset, count in counts.items():
        for number in range(1, count + 1):
            index = len(fields) + 1
            fields.append(
                PlannedField(f"{subset}_{number:04d}.jpg", subset, side, (seed, _FIELDS, index))
            )
    return fields


def render_slide(slide: PlannedSlide, folder: Path, mpp: float, comment: str) -> list[Box]:
    """Write `<folder>/<slide_id>.tiff` with its comment; boxes (x0, y0, x1, y1) in level-0 px."""
    path, smear = folder / f"{slide.slide_id}.tiff", slide.smear()
    if holds_pyramid(path, slide.side, comment):
        return lesion_boxes(smear)
    picture, boxes = draw_smear(smear)
    write_pyramid(path, picture, mpp, comment)
    return boxes


def render_field(field: PlannedField, folder: Path) -> list[Box]:
    """Write `<folder>/<name>`, a JPEG; boxes (x0, y0, x1, y1) in px."""
    path, smear = folder / field.name, field.smear()
    if _holds_image(path, field.side):
        return lesion_boxes(smear)
    picture, boxes = draw_smear(smear)
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return boxes


def _holds_image(path: Path, side: int) -> bool:
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            image.load()
            return image.size == (side, side)
    except (UnidentifiedImageError, OSError):
        return False  # cut short: it is written anew
