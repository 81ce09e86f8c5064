"""Slides in any format that OpenSlide reads (SVS, NDPI, MRXS, DICOM, tiled TIFF, ...)."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from patch_encoder.slides.base import RegionError, Slide, SlideError
from patch_encoder.slides.names import DICOM_SUFFIX, slide_id_of
from patch_encoder.slides.pixels import blend_on_white
from patch_encoder.slides.resolution import read_resolution

PLAIN_TIFF = ("generic-tiff", "aperio")  # vendors whose tiles stand on one lattice without overlap
OVERVIEW_PIXELS = 2**24  # a lowest level up to this size is looked at as a whole


class UnsupportedError(SlideError):
    """No format of OpenSlide's; another reader may take the file."""


class OpenSlideFile(Slide):
    """An OpenSlide handle, shared by threads.

    A failed read poisons OpenSlide's handle for good, for reads that are under way in other
    threads, too: a failed read is done again on a handle of its own, and the shared one is replaced
    before an error is raised.
    """

    def __init__(self, path: Path, mpp: float | None = None, slide_id: str = "") -> None:
        self.slide_id, self.path = slide_id or slide_id_of(path), path
        self._handle, self._lock = self._open(), threading.Lock()
        try:
            self.width, self.height = self._handle.dimensions
            self.downsamples = tuple(float(d) for d in self._handle.level_downsamples)
            self.level_sizes = tuple(self._handle.level_dimensions)
            self.properties = dict(self._handle.properties)
        except openslide.OpenSlideError as error:
            raise SlideError(f"slide {path}: OpenSlide cannot open it: {error}") from None
        if self.properties.get(openslide.PROPERTY_NAME_VENDOR) in PLAIN_TIFF:
            self.tiff_path = path
        self.format = f"openslide {self.properties.get(openslide.PROPERTY_NAME_VENDOR, 'unknown')}"
        self.associated = _read_associated_sizes(self.properties)
        self.resolution = read_resolution(
            self.properties, self.slide_id, (self.width, self.height), mpp
        )

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(str(self.path))
        except openslide.OpenSlideUnsupportedFormatError:
            raise UnsupportedError(
                f"slide {self.path}: expected a format that OpenSlide reads, found another or a "
                "truncated file"
            ) from None
        except openslide.OpenSlideError as error:
            raise SlideError(f"slide {self.path}: OpenSlide cannot open it: {error}") from None

    def read(self, x: int, y: int, size: int, level: int = 0) -> np.ndarray:
        try:
            region = self._handle.read_region((int(x), int(y)), level, (size, size))
        except openslide.OpenSlideError:
            region = self._read_alone(x, y, size, level)
        return blend_on_white(np.asarray(region))

    def _read_alone(self, x: int, y: int, size: int, level: int) -> Image.Image:
        with self._lock:
            self._handle = self._open()
            try:
                with self._open() as own:
                    return own.read_region((int(x), int(y)), level, (size, size))
            except openslide.OpenSlideError as error:
                place = f"pixels at ({x}, {y}) level {level}"
                raise RegionError(
                    f"slide {self.slide_id}: {place} cannot be decoded: {error}"
                ) from None

    def file_tile(self, level: int) -> tuple[int, int] | None:
        names = [f"openslide.level[{level}].tile-{axis}" for axis in ("width", "height")]
        sides = [int(self.properties.get(name, 0)) for name in names]
        return (sides[0], sides[1]) if all(sides) else None

    def transparent_share(self) -> float | None:
        level = len(self.level_sizes) - 1
        width, height = self.level_sizes[level]
        if width * height > OVERVIEW_PIXELS:
            return None
        try:
            alpha = np.asarray(self._handle.read_region((0, 0), level, (width, height)))[..., 3]
        except openslide.OpenSlideError:
            self.reopen()
            return None
        return float((alpha < 255).mean())

    def reopen(self) -> None:
        # the handle before is closed once no thread reads from it any more
        self._handle = self._open()

    def close(self) -> None:
        self._handle.close()


def _read_associated_sizes(properties: dict[str, str]) -> dict[str, tuple[int, int]]:
    # from the properties: asking for the pictures would decode them
    prefix, suffix = "openslide.associated.", ".width"
    names = [
        key[len(prefix) : -len(suffix)]
        for key in properties
        if key.startswith(prefix) and key.endswith(suffix)
    ]
    return {
        name: (int(properties[f"{prefix}{name}.width"]), int(properties[f"{prefix}{name}.height"]))
        for name in names
    }


# tag (0020,000E), explicit VR "UI", little endian: the series' UID stands in a file's first
# kilobytes
SERIES_TAG = b"\x20\x00\x0e\x00UI"
HEADER_BYTES = 1 << 18


def find_dicom_files(folder: Path) -> list[Path]:
    """The DICOM files that lie directly in a folder, sorted."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() == DICOM_SUFFIX and not file.name.startswith(".")
    )


def open_dicom_folder(folder: Path, mpp: float | None = None) -> OpenSlideFile:
    """Open the folder's series; its name is the slide id.

    Raises:
        SlideError: several series, or no file that OpenSlide opens.
    """
    files = find_dicom_files(folder)
    series = {uid for uid in map(read_series_uid, files) if uid}
    if len(series) > 1:
        raise SlideError(
            f"slide {folder}: expected one DICOM series a folder, found {len(series)}; give each "
            "a folder of its own"
        )
    for file in files:
        try:
            return OpenSlideFile(file, mpp, slide_id=slide_id_of(folder))
        except UnsupportedError:
            continue  # an overview or a report of the same series
    raise SlideError(
        f"slide {folder}: expected a DICOM whole-slide series, OpenSlide opens none of its "
        f"{len(files)} files"
    )


def read_series_uid(file: Path) -> str:
    """SeriesInstanceUID, empty when the header has none in explicit little endian."""
    with file.open("rb") as stream:
        header = stream.read(HEADER_BYTES)
    place = header.find(SERIES_TAG)
    if place < 0:
        return ""
    length = int.from_bytes(header[place + 6 : place + 8], "little")
    return header[place + 8 : place + 8 + length].decode("ascii", "replace").strip(" \0")
