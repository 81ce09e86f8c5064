"""What a tile is worth: sharpness, ink, empty glass, stain; measured on its pixels, kept beside its
coordinates, cut later.

Sharpness is the variance of the Laplacian (Pech-Pacheco et al., ICPR 2000) at the tile's target
resolution: it depends on stain and resolution, so a threshold is found from a cohort's own
histogram (cohort_report) and not from a paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Int64, UInt8

from patch_encoder.slides.base import RegionError, Slide
from patch_encoder.tiles.coordinates import (
    Coordinates,
    TileGeometry,
    coordinate_attributes,
    read_coordinates,
    store_coordinates,
)
from patch_encoder.tiles.grid import read_tile
from patch_encoder.tissue.artefacts import find_ink_pixels
from patch_encoder.tissue.settings import INKS
from wsi_common.config import key
from wsi_common.errors import UserError
from wsi_common.hdf5 import find_dataset, open_hdf5, write_small_hdf5

MEASURES = {
    "blur": "variance of the Laplacian of grey values at the target resolution; higher is sharper",
    "pen": "share with the colour of ink",
    "background": "share of pixels that are bright and without colour",
    "saturation": "mean HSV saturation, 0..1",
    "darkness": "mean optical density over pixels and channels",
}
# neighbouring tiles that one thread measures one after another: they share what a reader keeps
# decoded
RUN = 32
SMALL = 64  # px a side that colours are measured at
BRIGHT = 200  # darkest channel of background is above this
PALE = 20  # channels of background are no further apart


@dataclass
class Cuts:
    """Which tiles are dropped; None: none for this reason. Scripts inherit these keys."""

    min_blur: float | None = key(
        None, "drop tiles whose Laplacian has less variance than this; null: none"
    )
    max_pen: float | None = key(None, "drop tiles with a larger share of ink; null: none")
    max_background: float | None = key(
        None, "drop tiles with a larger share of empty glass; null: none"
    )
    min_saturation: float | None = key(None, "drop tiles of less mean saturation, 0..1; null: none")
    max_darkness: float | None = key(None, "drop tiles of more mean optical density; null: none")

    def limits(self) -> dict[str, float]:
        """The cuts that are set, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(Cuts)}
        return {name: value for name, value in values.items() if value is not None}


SHARES = ("min_tissue", "max_unreadable", "max_pen", "max_background", "min_saturation")


def check_shares(values: Mapping[str, float]) -> None:
    """Refuse shares outside 0 to 1, which would drop every tile or none; other keys may be there.

    Raises:
        UserError: such a share.
    """
    for name in SHARES:
        if not 0 <= values.get(name, 0.0) <= 1:
            raise UserError(f"{name}={values[name]:g}: expected a share, 0 to 1")


def measure_tile(
    tile: UInt8[np.ndarray, "side side 3"], least_od: float = 0.3
) -> tuple[float, ...]:
    """The MEASURES of one tile, in their order."""
    grey = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)
    _, deviation = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))
    side = min(SMALL, tile.shape[0])
    small = np.asarray(cv2.resize(tile, (side, side), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    high, low = small.max(-1), small.min(-1)
    # single dark nuclei are no ink: colours of a sixteenth of the tile's side
    pen = find_ink_pixels(
        np.asarray(cv2.resize(tile, (16, 16), interpolation=cv2.INTER_AREA)), INKS, least_od
    ).mean()
    background = ((low > BRIGHT) & (high - low < PALE)).mean()
    saturation = ((high - low) / np.maximum(high, 1)).mean()
    return (
        float(deviation[0, 0] ** 2),
        float(pen),
        float(background),
        float(saturation),
        float(_OD[small].mean()),
    )


_OD = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)


def measure_tiles(
    slide: Slide,
    geometry: TileGeometry,
    corners: Int64[np.ndarray, "N 2"],
    least_od: float = 0.3,
    wanted: Bool[np.ndarray, " N"] | None = None,
) -> dict[str, np.ndarray]:
    """MEASURES of tiles, float32 (N,) each, NaN for tiles that cannot be decoded or are not wanted.

    `slide.threads` tiles are in memory at a time; the numbers do not depend on how many.
    """
    table = np.full((len(corners), len(MEASURES)), np.nan, dtype=np.float32)

    def measure(first: int) -> None:
        for row in range(first, min(first + RUN, len(corners))):
            if wanted is not None and not wanted[row]:
                continue
            x, y = corners[row].tolist()
            try:
                table[row] = measure_tile(read_tile(slide, geometry, x, y), least_od)
            except RegionError:
                continue

    with ThreadPoolExecutor(max(1, slide.threads)) as pool:
        for _ in pool.map(measure, range(0, len(corners), RUN)):
            pass
    return {name: table[:, column] for column, name in enumerate(MEASURES)}


def list_drop_reasons(quality: Mapping[str, np.ndarray], cuts: Cuts, count: int) -> np.ndarray:
    """Why each tile is dropped, '' when it is kept: text (N,). Ink counts before background,
    background before blur.

    Raises:
        UserError: a cut whose measure is not there.
    """
    found = np.full(count, "", dtype="<U10")
    for name, low, high in (
        ("blur", cuts.min_blur, None),
        ("saturation", cuts.min_saturation, None),
        ("darkness", None, cuts.max_darkness),
        ("background", None, cuts.max_background),
        ("pen", None, cuts.max_pen),
    ):
        if low is None and high is None:
            continue
        if name not in quality:
            raise UserError(
                f"expected '{name}' of every tile, found {sorted(quality)}; tile with "
                "quality=true first"
            )
        values = quality[name]
        found[(values < low) if low is not None else (values > high)] = name
    return found


def write_tiles(
    path: str | Path,
    coordinates: Coordinates,
    extra: Mapping[str, str | int],
    quality: Mapping[str, np.ndarray],
) -> None:
    """Write coordinates with one dataset per measure, atomically; others see `coords` alone."""
    with write_small_hdf5(path) as file:
        store_coordinates(file, coordinates, extra)
        for name, values in quality.items():
            file.create_dataset(name, data=values.astype(np.float32)).attrs["meaning"] = (
                MEASURES.get(name, name)
            )


def read_quality(path: str | Path) -> dict[str, np.ndarray]:
    """The measures beside the coordinates, {} when the tiles were not measured."""
    with open_hdf5(path, "a coordinates file", "tile the slide again") as file:
        found = {name: find_dataset(file, name) for name in (*MEASURES, "tissue")}
        return {name: item[()] for name, item in found.items() if item is not None}


def filter_coordinates(source: str | Path, target: str | Path, cuts: Cuts) -> dict[str, int]:
    """Write the tiles of `source` that pass the cuts to `target`; returns how many were dropped for
    which reason.

    Raises:
        UserError: no coordinates file, or its tiles were not measured.
    """
    coordinates, quality = read_coordinates(source), read_quality(source)
    try:
        why = list_drop_reasons(quality, cuts, len(coordinates.coords))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    keep = why == ""
    own = set(asdict(coordinates.geometry))
    extra = {
        name: value for name, value in coordinate_attributes(source).items() if name not in own
    }
    extra["cuts"] = ", ".join(f"{name}={value:g}" for name, value in cuts.limits().items())
    kept = replace(coordinates, coords=coordinates.coords[keep])
    write_tiles(target, kept, extra, {name: values[keep] for name, values in quality.items()})
    return count_reasons(why)


def count_reasons(why: np.ndarray) -> dict[str, int]:
    """Reason -> number of tiles, without the kept ones."""
    names, counts = np.unique(why[why != ""], return_counts=True)
    return {str(name): int(count) for name, count in zip(names, counts)}
