"""The folder of a cohort that a script makes: its settings stamp, and what is cleared before other
settings take it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json, write_json
from common.provenance import differences

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
    expected = json.loads(json.dumps({"maker": maker, "settings": settings}))
    if not stamp.is_file():
        present = [name for name in PARTS if (root / name).exists()]
        if present:
            raise UserError(
                f"{root}: expected an empty folder or a cohort of {maker}, found {present[0]} "
                f"without {STAMP}; "
                "choose another output"
            )
    elif overwrite:
        _clear(root)
    elif (found := read_json(stamp, "a cohort's settings")) != expected:
        raise UserError(
            f"{root}: holds a cohort of other settings: {differences(found, expected)}; "
            "choose another output or set overwrite=true"
        )
    write_json(stamp, expected)


def _clear(root: Path) -> None:
    for name in PARTS:
        part = root / name
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
