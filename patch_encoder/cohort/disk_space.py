"""Room for the features of a run: estimated at the start, one line when it runs out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from patch_encoder.bags.writer import BAG_OVERHEAD
from patch_encoder.tiles.coordinates import SlideJob
from wsi_common.errors import FullDisk, UserError

REMEDY = "free some, choose output= on another disk, or store dtype=float16"


def estimate_bag_bytes(tiles: int, dim: int, dtype: str, pt: bool) -> int:
    """Bytes of one slide on the disk: N x (D x bytes + 16 of coordinates), the features again with
    `pt`, a fixed part each.
    """
    features = tiles * dim * np.dtype(dtype).itemsize
    return features + 16 * tiles + BAG_OVERHEAD + (features + BAG_OVERHEAD if pt else 0)


def check_room(folder: Path, jobs: Sequence[SlideJob], dim: int, dtype: str, pt: bool) -> None:
    """Compare what these slides will take with what is free.

    Raises:
        UserError: they do not fit.
    """
    needed = sum(estimate_bag_bytes(len(job.coordinates.coords), dim, dtype, pt) for job in jobs)
    free = shutil.disk_usage(_find_existing(folder)).free
    if needed > free:
        raise UserError(
            f"{folder}: expected {_format_size(needed)} free for the features of {len(jobs)} "
            f"slides, found {_format_size(free)}; {REMEDY}"
        )


@contextmanager
def explain_full_disk(folder: Path, remedy: str = REMEDY) -> Iterator[None]:
    """A full disk on the way is one line; slides that are finished stay."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(_find_existing(folder)).free
        raise FullDisk(
            f"{folder}: the disk is full or the quota used up ({_format_size(free)} free); "
            f"finished slides are kept: {remedy}, and start again"
        ) from None


def _find_existing(folder: Path) -> Path:
    folder = folder.absolute()
    return folder if folder.exists() else _find_existing(folder.parent)


def _format_size(size: int) -> str:
    power = min(4, max(0, (size.bit_length() - 1) // 10))
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
