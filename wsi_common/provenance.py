"""Reuse what is on disk, or refuse it: by the settings and inputs that it was made with.

Everything that a script writes records what it was made with. When the script is started again, it
reuses what is there with the same record and makes what is missing or damaged. What is there with
another record is an error that names both, unless the user asked to overwrite it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wsi_common.errors import DamagedFile, UserError

logger = logging.getLogger(__name__)


def can_reuse(
    path: Path,
    read: Callable[[], Mapping[str, Any]],
    wanted: Mapping[str, Any],
    what: str,
    *,
    overwrite: bool = False,
) -> bool:
    """Whether what is on disk is what would be made: True to reuse it, False to make it.

    Args:
        path: the file whose presence says that something was made.
        read: reads the settings and inputs that it was made with; not called when nothing is there
            or it is overwritten. Where it raises DamagedFile, the file is made anew.
        wanted: settings and inputs of this call.
        what: what it holds when they differ: "another run", "a bag of other inputs".
        overwrite: make it in any case.

    Raises:
        UserError: it was made with other settings or inputs; names them, found and wanted.
    """
    if overwrite or not path.exists():
        return False
    try:
        found, wanted = as_stored(read()), as_stored(wanted)
    except DamagedFile as error:
        logger.warning("%s; it is made anew", error)
        return False
    if found == wanted:
        return True
    raise UserError(
        f"{path}: holds {what}: {differences(found, wanted)}; choose another output or set "
        "overwrite=true"
    )


def unknown_origin(path: str | Path, found: str, record: str) -> UserError:
    """The error for something that is there without a record, which may be somebody's data.

    Args:
        path: the folder.
        found: what lies in it.
        record: name of the file that would tell what it was made with.
    """
    return UserError(
        f"{path}: holds {found} without {record}, so of unknown origin; choose another output"
    )


def as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON stores them: tuples are lists, NumPy numbers and arrays are Python's own."""
    return json.loads(json.dumps(settings, default=lambda value: value.tolist()))


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], limit: int = 4) -> str:
    """`key found -> wanted` for the entries of two nested dicts that differ, on one line."""
    flat_found, flat_wanted = _flat(found), _flat(wanted)
    changed = [
        f"{name} {flat_found.get(name, 'nothing')} -> {flat_wanted.get(name, 'nothing')}"
        for name in sorted(flat_found.keys() | flat_wanted.keys())
        if flat_found.get(name) != flat_wanted.get(name)
    ]
    more = f" and {len(changed) - limit} more" if len(changed) > limit else ""
    return ", ".join(changed[:limit]) + more


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names and values as text, so that None is something else than a missing entry."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = repr(value)
    return flat
