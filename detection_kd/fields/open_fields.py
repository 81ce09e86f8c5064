"""The fields that a process keeps open: those that it read last, within a bound on memory.

A picture is decoded whole by its first read, and a TIFF keeps the segments that it decoded, so
that open fields are counted by what they may hold and not by their number.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence

from detection_kd.mitosis_sets.point_set import AnnotatedField
from patch_encoder.slides import Slide, open_slide
from patch_encoder.slides.openslide_file import OpenSlideFile
from patch_encoder.slides.tiff_file import CACHED_BYTES

MOST_BYTES, MOST_FILES = 256 * 2**20, 32  # of a process
OPENSLIDE_BYTES = 32 * 2**20  # the most that OpenSlide's own cache of a slide holds
DECODED_BYTES = 8  # of a px in that cache: four, of all levels, with the rims of tiles


class OpenFields:
    """Open files of fields; the one that was not used for longest makes room.

    It may be copied to a worker, by a fork or by pickle: every process opens files of its own,
    since processes that share an open file also share the place at which it is read.
    """

    def __init__(self, fields: Sequence[AnnotatedField]) -> None:
        self._fields = fields
        self._open: OrderedDict[int, Slide] = OrderedDict()
        self._process = os.getpid()

    def get(self, number: int) -> Slide:
        """The open file of a field.

        Raises:
            SlideError: it is not there, or cannot be opened.
        """
        if self._process != os.getpid():
            self._open, self._process = OrderedDict(), os.getpid()
        if number not in self._open:
            field = self._fields[number]
            self._open[number] = open_slide(field.path, field.mpp)
            while len(self._open) > 1 and self._is_full():
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]

    def _is_full(self) -> bool:
        held = sum(estimate_bytes(slide) for slide in self._open.values())
        return held > MOST_BYTES or len(self._open) > MOST_FILES

    def close(self) -> None:
        """Close all files; the next read opens them anew."""
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}


def estimate_bytes(slide: Slide) -> int:
    """The most that an open file keeps in memory."""
    if isinstance(slide, OpenSlideFile):
        return min(DECODED_BYTES * slide.width * slide.height, OPENSLIDE_BYTES)
    return min(3 * slide.width * slide.height, CACHED_BYTES)
