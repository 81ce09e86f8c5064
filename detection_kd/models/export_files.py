"""The folder of an export: files that appear together with a record of what they are."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wsi_common import __version__
from wsi_common.errors import UserError
from wsi_common.files import atomic_path, read_json, sha256_file, write_json
from wsi_common.provenance import can_reuse


def is_exported(record: Path, wanted: Mapping[str, Any], script: str, overwrite: bool) -> bool:
    """Whether this very export is there, whole.

    Args:
        record: its JSON file.
        wanted: what decides the files.
        script: that writes them, for messages.
        overwrite: whether another export may be replaced.

    Raises:
        UserError: one of other settings is there, or a file is not what the record says.
    """

    def read_record() -> dict[str, Any]:
        return read_json(record, f"the record of {script}")

    def read_identity() -> dict[str, Any]:
        return {name: value for name, value in read_record().items() if name in wanted}

    if not can_reuse(record, read_identity, wanted, "another export", overwrite=overwrite):
        return False
    for name, digest in read_record()["files"].items():
        path = record.with_name(name)
        if not path.is_file() or sha256_file(path) != digest:
            raise UserError(
                f"{path}: missing or damaged, its digest is not that of {record.name}; set "
                "overwrite=true"
            )
    return True


def publish_export(
    made: Path, record: Path, names: Collection[str], old: Collection[str], content: Mapping
) -> None:
    """Move finished files beside their record, and write it last.

    Args:
        made: folder with the files.
        record: the record's file.
        names: of the files.
        old: names of files of earlier exports, which go.
        content: the record but for `files` (digests) and `versions`.
    """
    for name in (record.name, *old):
        record.with_name(name).unlink(missing_ok=True)
    digests = {}
    for name in names:
        with atomic_path(record.with_name(name)) as temporary:
            os.replace(made / name, temporary)
        digests[name] = sha256_file(record.with_name(name))
    versions = {name: version(name) for name in ("torch", "onnx", "onnxruntime")}
    versions["software"] = __version__
    write_json(record, {**content, "files": digests, "versions": versions})
