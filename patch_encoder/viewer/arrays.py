"""Numbers for a page: little-endian arrays in base64, which a browser reads without parsing."""

from __future__ import annotations

import base64

import numpy as np

KINDS = {"float32": "<f4", "uint16": "<u2", "uint32": "<u4", "int32": "<i4"}


def pack_array(values: object, kind: str) -> dict[str, str]:
    """An array of one of KINDS, flattened; float32 keeps NaN, which JSON does not have."""
    array = np.ascontiguousarray(np.asarray(values), dtype=KINDS[kind])
    return {"kind": kind, "bytes": base64.b64encode(array.tobytes()).decode()}
