"""The value of one region in Redis: a header, the features in half precision, the packed mask.

The header has 16 bytes, little-endian: magic `SLPD`, version, type of the features, one byte of 0,
the number of the region in its set, and a CRC-32 of all other bytes of the value. Nothing is
unpickled: whoever can write to the server can spoil a region, but not run code here.
"""

from __future__ import annotations

import struct

import numpy as np
from jaxtyping import Bool, Float16, UInt8

try:  # the same numbers, an order of magnitude faster
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

MAGIC, VERSION, FLOAT16 = b"SLPD", 1, 1
FIELDS = struct.Struct("<4sHBxI")  # what stands before the CRC
CHECKSUM = struct.Struct("<I")
HEADER_BYTES = FIELDS.size + CHECKSUM.size


def mask_bytes(region_tiles: int) -> int:
    """Length of a packed mask."""
    return -(-(region_tiles**2) // 8)


def value_bytes(region_tiles: int, width: int) -> int:
    """Length of a value."""
    return HEADER_BYTES + 2 * width * region_tiles**2 + mask_bytes(region_tiles)


def pack_value(
    number: int, features: Float16[np.ndarray, "g g d"], valid: Bool[np.ndarray, "g g"]
) -> bytes:
    """The value of the region `number`."""
    body, mask = features.astype("<f2").tobytes(), np.packbits(valid).tobytes()
    fields = FIELDS.pack(MAGIC, VERSION, FLOAT16, number)
    return b"".join((fields, CHECKSUM.pack(_checksum(fields, body, mask)), body, mask))


def find_damage(
    number: int,
    header: UInt8[np.ndarray, " 16"],
    features: UInt8[np.ndarray, " n"],
    mask: UInt8[np.ndarray, " m"],
    valid: Bool[np.ndarray, "g g"],
) -> str:
    """What is wrong with a value of the right length, as it was received; empty where nothing is.

    Args:
        number: region that was asked for.
        header: 16 bytes.
        features: bytes of the features.
        mask: the packed mask.
        valid: the mask that the region has.
    """
    fields = header[: FIELDS.size].tobytes()
    magic, version, kind, found = FIELDS.unpack(fields)
    if magic != MAGIC:
        return "holds a value that is no region"
    if (version, kind) != (VERSION, FLOAT16):
        return f"has the version {version}.{kind}, expected {VERSION}.{FLOAT16}"
    if found != number:
        return f"holds the region {found} of a set"
    if _checksum(fields, features, mask) != CHECKSUM.unpack(header[FIELDS.size :].tobytes())[0]:
        return "is damaged: its checksum is another"
    if mask.tobytes() != np.packbits(valid).tobytes():
        return "has the tiles of another region"
    return ""


def _checksum(*parts: bytes | np.ndarray) -> int:
    value = 0
    for part in parts:
        value = crc32(part, value)
    return value
