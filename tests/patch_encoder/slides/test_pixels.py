"""Large pictures that are kept in a file: the same pixels, and one line where the disk is full."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from patch_encoder.slides import pixels
from wsi_common.errors import UserError


def test_kept_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)
    assert not isinstance(pixels.keep(picture), np.memmap)
    monkeypatch.setattr(pixels, "KEPT_BYTES", 100)
    kept = pixels.keep(picture)
    assert isinstance(kept, np.memmap) and np.array_equal(kept, picture)


def test_a_full_disk_is_one_line_and_no_dead_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing to a memory-mapped file beyond what the disk has is a SIGBUS."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pixels, "KEPT_BYTES", 100)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="0.0 GB for the pixels .* No space left .* set TMPDIR"):
        pixels.keep(np.zeros((40, 50, 3), np.uint8))
