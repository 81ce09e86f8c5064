"""Whatever a file stores -> RGB bytes: transparency on white, grey three times."""

from __future__ import annotations

import os
import struct
import tempfile

import numpy as np
import tifffile
from jaxtyping import UInt8

from wsi_common.errors import UserError

# of tifffile: a damaged file shows in any step of parsing it
READ_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    MemoryError,
    struct.error,
    tifffile.TiffFileError,
)
KEPT_BYTES = 512 * 2**20  # larger pictures are kept in a file, so that memory can let go of them


def blend_on_white(rgba: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 3"]:
    """RGBA (alpha 0 where the scanner took no picture) composed on white, as glass looks."""
    alpha = rgba[..., 3:]
    if alpha.size == 0 or alpha.min() == 255:
        return rgba[..., :3]
    mixed = rgba[..., :3].astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16))
    return (mixed // 255).astype(np.uint8)


def convert_to_rgb(pixels: np.ndarray, has_alpha: bool = True) -> UInt8[np.ndarray, "h w 3"]:
    """Grey, grey + alpha, RGB or RGBA bytes (h, w[, 1..4]) as RGB, without other channels."""
    assert pixels.dtype == np.uint8, pixels.dtype
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    channels = pixels.shape[2]
    if channels <= 2:
        grey = np.repeat(pixels[..., :1], 3, axis=2)
        pixels = np.concatenate([grey, pixels[..., 1:]], axis=2)
    return blend_on_white(pixels) if pixels.shape[2] == 4 and has_alpha else pixels[..., :3]


def keep(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """The same pixels, in a nameless memory-mapped file when they are many.

    Raises:
        UserError: no room for them. It is taken first: a disk that fills under a memory-mapped file
            ends the process.
    """
    if pixels.nbytes <= KEPT_BYTES:
        return np.ascontiguousarray(pixels)
    with tempfile.TemporaryFile() as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, pixels.nbytes)
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: expected {pixels.nbytes / 1e9:.1f} GB for the pixels of "
                f"a slide, found {error.strerror}; set TMPDIR to a folder with more room"
            ) from None
        mapped = np.memmap(stream, dtype=np.uint8, mode="w+", shape=pixels.shape)
    mapped[:] = pixels
    return mapped
