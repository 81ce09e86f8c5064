"""The file by which a filter tells a student what to train on: `kept.csv`, one row per training
tile, and beside it `kept.json`, which says of which tiles and of which teachers it is.

The table is readable and complete: score, decision and reason of every tile. It is refused where
the tiles, a teacher or the table itself are no longer those that the filter saw.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from detection_kd.evaluation.hard_samples import Filtering
from detection_kd.fields.field_tiles import FieldTiles
from wsi_common.errors import UserError
from wsi_common.files import read_json, sha256_bytes, sha256_file, write_csv, write_json
from wsi_common.provenance import as_stored, differences
from wsi_common.shared_weights import digest_weights_file

COLUMNS = ("sample", "label", "score", "keep", "weight", "new_label", "reason")
REMEDY = "run filter_samples again, with overwrite=true"


def describe_tiles(tiles: FieldTiles) -> dict[str, Any]:
    """What tiles and their annotations are, in a few words and a digest."""
    digest = sha256_bytes(
        "\n".join(tiles.sample_ids).encode(),
        tiles.labels.tobytes(),
        *(tiles.points(tile).tobytes() for tile in np.flatnonzero(tiles.labels).tolist()),
    )
    counts = {"tiles": len(tiles), "positive": int((tiles.labels == 1).sum())}
    return {**counts, "side": tiles.side, "mpp": tiles.mpp, "digest": digest}


def write_kept(
    folder: Path,
    tiles: FieldTiles,
    scores: Float[np.ndarray, " n"],
    filtering: Filtering,
    provenance: Mapping[str, Any],
) -> None:
    """Write `kept.csv`, then `kept.json`, whose presence says that both are whole.

    Args:
        folder: where.
        tiles: with their annotated labels.
        scores: of the teacher.
        filtering: what becomes of each tile.
        provenance: `data` of `describe_tiles`, `teachers` (path -> digest) and settings.
    """
    rows = zip(
        tiles.sample_ids,
        tiles.labels.tolist(),
        scores.tolist(),
        filtering.keep.astype(int).tolist(),
        filtering.weights.tolist(),
        filtering.labels.tolist(),
        filtering.reasons,
        strict=True,
    )
    table = folder / "kept.csv"
    write_csv(table, COLUMNS, (dict(zip(COLUMNS, row, strict=True)) for row in rows))
    write_json(folder / "kept.json", {**provenance, "table": sha256_file(table)})


def read_kept(path: Path, tiles: FieldTiles) -> FieldTiles:
    """The tiles that a filter kept, with the labels and weights that it gave them.

    Args:
        path: `kept.csv`.
        tiles: all training tiles, as the filter saw them.

    Raises:
        UserError: the table is damaged, or of other tiles or teachers than those that are there.
    """
    record = read_json(path.with_name("kept.json"), "the record of a filter")
    if sha256_file(path) != record.get("table"):
        raise UserError(
            f"{path}: expected the table that kept.json describes, found another; {REMEDY}"
        )
    check_teachers(path, record.get("teachers", {}))
    found, wanted = record.get("data", {}), as_stored(describe_tiles(tiles))
    if found != wanted:
        raise UserError(
            f"{path}: made for other training tiles: {differences(found, wanted)}; {REMEDY}, or "
            "give the data, tile_size, target_mpp and overlap that it was made with"
        )
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    keep = np.array([row["keep"] == "1" for row in rows])
    labels = np.array([int(row["new_label"]) for row in rows], np.int64)
    weights = np.array([float(row["weight"]) for row in rows], np.float32)
    return tiles.select(keep, labels[keep], weights[keep])


def check_teachers(path: Path, teachers: Mapping[str, str]) -> None:
    """Refuse a table whose teacher was trained again since; one that was moved is not missed."""
    for teacher, digest in teachers.items():
        if Path(teacher).exists() and digest_weights_file(teacher) != digest:
            raise UserError(
                f"{path}: the teacher {teacher} has changed since this table was made; {REMEDY}"
            )


def digest_teachers(teachers: Sequence[str]) -> dict[str, str]:
    """Path -> digest of the checkpoints that score tiles."""
    return {str(Path(teacher).resolve()): digest_weights_file(teacher) for teacher in teachers}
