"""The folder of a cohort that a script makes: its settings stamp, and what is cleared before other
settings take it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from common.files import read_json, write_json
from common.provenance import can_reuse, unknown_origin

LABEL_COLUMNS = ("case_id", "slide_id", "label", "split", "mpp")
STAMP = "cohort.json"
PARTS = ("labels.csv", "annotations.json", "tiles.csv", "slides", "detection")


def claim_folder(root: Path, maker: str, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the folder and stamp it with its maker and settings; the same ones again go on with what
    is there.

    With `overwrite` the cohort that is there is removed (the parts named in PARTS, nothing else).

    Raises:
        UserError: the folder holds a cohort of other settings, or one without a stamp, which may be
            somebody's data.
    """
    stamp = root / STAMP
    wanted = {"maker": maker, "settings": settings}
    present = [name for name in PARTS if (root / name).exists()]
    if present and not stamp.is_file():
        raise unknown_origin(root, present[0], STAMP)
    if not can_reuse(
        stamp,
        lambda: read_json(stamp, "a cohort's settings"),
        wanted,
        "a cohort of other settings",
        overwrite=overwrite,
    ):
        _clear(root)
    write_json(stamp, wanted)


def _clear(root: Path) -> None:
    for name in PARTS:
        part = root / name
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
