"""Micrometres per pixel of a slide: from what its file says, checked, and where it came from.

OpenSlide's own keys come first, then the vendors' that it does not map in every version (names
after openslide.org's lists of properties), then the TIFF resolution, then the objective's power.
What lies outside what microscopes give is not believed: 72 dpi, which drawing programs write, would
be 353 um.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from wsi_common.errors import UserError

logger = logging.getLogger(__name__)

PLAUSIBLE_MPP = (0.05, 10.0)  # a 100x oil objective with a small pixel, and an overview at 1x
PLAUSIBLE_POWER = (1.0, 150.0)
SAME_XY = 1.01  # ratio of the two axes up to which they are one number
SQUARE_XY = 1.10  # ratio above which pixels are not square and no single number is right
POWER_RATIO = 1.6  # mpp * power / 10 outside [1 / this, this]: one of the two is wrong
REMEDY = "give it in the mpp column of labels.csv or as mpp=..."

# key of x, key of y, um per unit
KEYS = (
    ("openslide.mpp-x", "openslide.mpp-y", 1.0),
    ("ome.PhysicalSizeX", "ome.PhysicalSizeY", 1.0),
    ("aperio.MPP", "aperio.MPP", 1.0),
    ("ventana.ScanRes", "ventana.ScanRes", 1.0),
    ("sakura.ResolutionMmPerPix", "sakura.ResolutionMmPerPix", 1000.0),
    # DICOM gives the distance between rows (y) first
    (
        "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing[1]",
        "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing[0]",
        1000.0,
    ),
)
PHILIPS_KEY = "philips.DICOM_PIXEL_SPACING"  # '"<y>" "<x>"' in mm
HAMAMATSU_KEYS = ("hamamatsu.PhysicalWidth", "hamamatsu.PhysicalHeight")  # nm of the whole picture
MIRAX_SUFFIXES = ("MICROMETER_PER_PIXEL_X", "MICROMETER_PER_PIXEL_Y")
TIFF_KEYS = ("tiff.XResolution", "tiff.YResolution", "tiff.ResolutionUnit")  # pixels per unit
TIFF_UNITS = {"inch": 25400.0, "centimeter": 10000.0, "millimeter": 1000.0, "micrometer": 1.0}
POWER_KEYS = (
    "openslide.objective-power",
    "aperio.AppMag",
    "hamamatsu.SourceLens",
    "leica.objective",
    "mirax.GENERAL.OBJECTIVE_MAGNIFICATION",
    "ventana.Magnification",
    "sakura.NominalLensMagnification",
    "trestle.Objective Power",
    "dicom.OpticalPathSequence[0].ObjectiveLensPower",
)


@dataclass(frozen=True)
class Resolution:
    """What is known about a slide's resolution.

    Attributes:
        mpp: um per level-0 pixel, the mean of both axes; None when nothing believable is known.
        source: the key it came from, or `none: <why>`.
        power: the objective's magnification, None when the file does not say.
    """

    mpp: float | None
    source: str
    power: float | None = None


def is_plausible(mpp: float) -> bool:
    """Whether a microscope may have made it; NaN is not."""
    return PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]


def check_mpp(mpp: float, what: str) -> float:
    """The resolution a user gave.

    Raises:
        UserError: not a number a microscope gives.
    """
    if not is_plausible(mpp):
        low, high = PLAUSIBLE_MPP
        raise UserError(
            f"{what}: expected um per level-0 pixel, {low} to {high}, found {mpp:g}; 40x is about "
            "0.25, 20x 0.5"
        )
    return mpp


def read_resolution(
    properties: Mapping[str, str],
    slide_id: str,
    size: tuple[int, int] = (0, 0),
    given: float | None = None,
) -> Resolution:
    """The resolution by a slide's properties, announced once where it is doubtful.

    Args:
        properties: as OpenSlide gives them (tiff.* for other readers).
        slide_id: named in messages.
        size: level-0 (width, height) in pixels, for keys that give the whole picture's size.
        given: um per pixel from the user, which wins.
    """
    power = _read_power(properties)
    found, doubts = _read_keys(properties, size)
    if given is not None:
        if found is not None and found.mpp is not None and not _are_close(given, found.mpp, 1.05):
            announce_resolution(
                f"slide {slide_id}: mpp {given:g} as given; the file says {found.mpp:.4g} "
                f"({found.source})"
            )
        return Resolution(given, "given", power)
    if found is not None and found.mpp is not None:
        if power is not None and not _are_close(found.mpp * power, 10.0, POWER_RATIO):
            announce_resolution(
                f"slide {slide_id}: {found.source} says {found.mpp:.4g} um, but its objective is "
                f"{power:g}x; {REMEDY}"
            )
        for doubt in doubts:
            announce_resolution(f"slide {slide_id}: {doubt}; {found.source} is used")
        return Resolution(found.mpp, found.source, power)
    why = "; ".join(doubts) or "the file does not say"
    if power is None:
        return Resolution(None, f"none: {why}")
    # 40x is 0.25 um/px on the scanners in use; a convention, not a measurement
    announce_resolution(
        f"slide {slide_id}: no mpp ({why}), taken from objective power {power:g}x as "
        f"{10 / power:.3f}; else {REMEDY}"
    )
    return Resolution(10 / power, "objective power", power)


def _read_keys(
    properties: Mapping[str, str], size: tuple[int, int]
) -> tuple[Resolution | None, list[str]]:
    """The first believable pair of numbers, and what was said against those before it."""
    doubts: list[str] = []
    for source, x, y in _list_candidates(properties, size):
        numbers = [value for value in (x, y) if value is not None]
        wrong = [value for value in numbers if not is_plausible(value)]
        if wrong:
            doubts.append(
                f"{source} says {wrong[0]:g} um, outside {PLAUSIBLE_MPP[0]} to {PLAUSIBLE_MPP[1]}"
            )
        elif not _are_close(numbers[0], numbers[-1], SQUARE_XY):
            doubts.append(
                f"{source} says {numbers[0]:g} by {numbers[-1]:g} um, pixels that are not square"
            )
        else:
            if not _are_close(numbers[0], numbers[-1], SAME_XY):
                doubts.append(
                    f"{source} says {numbers[0]:g} by {numbers[-1]:g} um, taken as their mean"
                )
            return Resolution(sum(numbers) / len(numbers), source), doubts
    return None, doubts


def _list_candidates(
    properties: Mapping[str, str], size: tuple[int, int]
) -> Iterator[tuple[str, float | None, float | None]]:
    """(key, um of x, um of y), most trusted first; at least one of the two is a number."""
    for key_x, key_y, unit in KEYS:
        yield from _parse_pair(key_x, properties.get(key_x), properties.get(key_y), unit)
    spacing = re.findall(r"[\d.eE+-]+", properties.get(PHILIPS_KEY, ""))
    if len(spacing) >= 2:
        yield from _parse_pair(PHILIPS_KEY, spacing[1], spacing[0], 1000.0)
    lengths = [_parse_number(properties.get(key)) for key in HAMAMATSU_KEYS]
    if any(lengths) and all(size):
        values = [str(length / pixels) if length else None for length, pixels in zip(lengths, size)]
        yield from _parse_pair(HAMAMATSU_KEYS[0], values[0], values[1], 0.001)
    mirax = [
        next((v for k, v in properties.items() if k.endswith(suffix)), None)
        for suffix in MIRAX_SUFFIXES
    ]
    yield from _parse_pair(f"mirax {MIRAX_SUFFIXES[0]}", mirax[0], mirax[1], 1.0)
    unit = TIFF_UNITS.get(properties.get(TIFF_KEYS[2], "").lower())
    densities = [_parse_number(properties.get(key)) for key in TIFF_KEYS[:2]]
    if unit and any(densities):
        values = [str(1 / density) if density else None for density in densities]
        yield from _parse_pair(TIFF_KEYS[0], values[0], values[1], unit)


def _parse_pair(
    source: str, x: str | None, y: str | None, unit: float
) -> Iterator[tuple[str, float | None, float | None]]:
    values = [
        None if number is None else number * unit for number in (_parse_number(x), _parse_number(y))
    ]
    if values != [None, None]:
        yield source, values[0], values[1]


def _parse_number(text: str | None) -> float | None:
    """A positive number or NaN (to report it); None for anything else (0 is unknown)."""
    try:
        value = float(text) if text is not None else 0.0
    except ValueError:
        return None
    return value if value > 0 or math.isnan(value) else None


def _read_power(properties: Mapping[str, str]) -> float | None:
    for key in POWER_KEYS:
        value = _parse_number(properties.get(key))
        if value is not None and PLAUSIBLE_POWER[0] <= value <= PLAUSIBLE_POWER[1]:
            return value
    return None


def _are_close(a: float, b: float, ratio: float) -> bool:
    return max(a, b) <= ratio * min(a, b)


@lru_cache(maxsize=10_000)
def announce_resolution(message: str) -> None:
    """Warn once a process: a slide is opened many times."""
    logger.warning(message)
