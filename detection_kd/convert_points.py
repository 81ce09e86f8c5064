"""Convert annotated mitotic figures of any known set to a plain table, COCO or GeoJSON, and count
them.

    python -m detection_kd.convert_points data.annotations=TUPAC_AL data.format=tupac16
    data.images=tupac16/images to=geojson output=runs/tupac16

Writes `points.csv`, `points.json` (COCO, boxes of 50 px) or `points/<field>.geojson`, which QuPath
opens, below `output`, all of which the scripts of mitosis localisation read as well, and
`counts.csv` with the fields, mitotic figures and look-alikes of each case and scanner.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from detection_kd.mitosis_sets.coco_points import find_root, write_coco_points
from detection_kd.mitosis_sets.csv_points import write_csv_points
from detection_kd.mitosis_sets.geojson_points import write_geojson_points
from detection_kd.mitosis_sets.keys import MitosisSetKeys, read_point_set
from detection_kd.mitosis_sets.point_set import LOOK_ALIKE, MITOSIS, PointSet
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, group, key
from wsi_common.errors import UserError
from wsi_common.files import write_csv

logger = logging.getLogger(__name__)
WRITERS: dict[str, tuple[str, Callable[[Path, PointSet], None]]] = {
    "csv": ("points.csv", write_csv_points),
    "coco": ("points.json", write_coco_points),
    "geojson": ("points", write_geojson_points),
}
"""File or folder, and its writer, of every layout."""
COUNTS = ("case", "scanner", "fields", "not_annotated", "mitotic_figures", "look_alikes")


@dataclass
class Config:
    """Keys of the conversion."""

    output: str = key(REQUIRED, "where the results are written; points and counts", runtime=True)
    to: str = key("csv", "layout to write", choices=tuple(WRITERS))
    data: MitosisSetKeys = group(MitosisSetKeys, "the annotated data; fields")
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def main(config: Config) -> int:
    """Read, write and count."""
    name, write = WRITERS[config.to]
    target = Path(config.output, name)
    if target.exists() and not config.overwrite:
        raise UserError(
            f"{target}: expected no file there, found one; choose another output= or set "
            "overwrite=true"
        )
    fields = read_point_set(config.data)
    for old in target.glob("*.geojson"):
        old.unlink()  # it may be of a field that is no longer there
    write(target, fields)
    rows = count_points(fields)
    write_csv(target.with_name("counts.csv"), COUNTS, rows)
    for row in add_up(rows):
        logger.info(
            "%s: %s fields of %s cases, %s not annotated, %s mitotic figures, %s look-alikes",
            row["scanner"] or "unknown scanner",
            *(row[name] for name in ("fields", "cases", *COUNTS[3:])),
        )
    logger.info(
        "wrote %s; read it back with data.format=%s data.images=%s",
        target,
        config.to,
        find_root(fields),
    )
    return 0


def count_points(fields: PointSet) -> list[dict[str, object]]:
    """A row for every case and scanner."""
    pairs = sorted({(field.case, field.scanner) for field in fields.fields})
    rows: list[dict[str, object]] = []
    for case, scanner in pairs:
        part = fields.select(
            lambda field, pair=(case, scanner): (field.case, field.scanner) == pair
        )
        blank = sum(not field.annotated for field in part.fields)
        counts = (len(part.fields), blank, part.count(MITOSIS), part.count(LOOK_ALIKE))
        rows.append(dict(zip(COUNTS, (case, scanner, *counts), strict=True)))
    return rows


def add_up(rows: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    """The rows of every scanner added up, with the number of its cases."""
    sums: dict[object, dict[str, object]] = {}
    for row in rows:
        empty = dict.fromkeys(("cases", *COUNTS[2:]), 0)
        total = sums.setdefault(row["scanner"], {"scanner": row["scanner"], **empty})
        total["cases"] += 1
        for name in COUNTS[2:]:
            total[name] += row[name]
    return list(sums.values())


if __name__ == "__main__":
    launch(main, Config)
