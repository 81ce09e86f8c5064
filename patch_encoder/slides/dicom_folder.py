"""A folder of DICOM files as one slide: OpenSlide opens any file of a series and finds the others
beside it.
"""

from __future__ import annotations

from pathlib import Path

from patch_encoder.slides.base import SlideError
from patch_encoder.slides.names import DICOM_SUFFIX
from patch_encoder.slides.openslide_file import OpenSlideFile, UnsupportedError

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
            return OpenSlideFile(file, mpp, slide_id=folder.name)
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
