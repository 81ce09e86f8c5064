"""Sets that were annotated with SlideRunner: CCMCT, CMC and others, as database or as JSON.

Source: Aubreville et al., "SlideRunner" (BVM 2018); Bertram et al., "A large-scale dataset for
mitotic figure assessment on whole slide images of canine cutaneous mast cell tumor" (Scientific
Data 2019). Classes are known by name, not by number, since their numbers differ between sets; other
cells are left out. An annotation's point is the middle of its coordinates: a spot has one, a box or
circle two corners, a polygon its outline. The JSON looks like COCO, with corners instead of sizes.
"""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from detection_kd.mitosis_sets.checked_fields import (
    find_class,
    find_image,
    make_field,
    make_field_id,
)
from detection_kd.mitosis_sets.coco_points import log_other_cells, read_document
from detection_kd.mitosis_sets.midog import keep_box
from detection_kd.mitosis_sets.point_set import LOOK_ALIKE, AnnotatedField
from wsi_common.errors import UserError
from wsi_common.files import read_json

HEADER = b"SQLite format 3\0"
SLIDES = "SELECT uid, filename, width, height FROM Slides"
MIDDLES = """
SELECT a.slide, c.name, (MIN(p.coordinateX) + MAX(p.coordinateX)) / 2.0,
    (MIN(p.coordinateY) + MAX(p.coordinateY)) / 2.0
FROM Annotations a JOIN Annotations_coordinates p ON p.annoId = a.uid
LEFT JOIN Classes c ON c.uid = a.agreedClass
{kept} GROUP BY a.uid ORDER BY a.uid
"""
NO_CLASS = "without agreed class"
REACH = 25.0
"""Half the side of the boxes that these sets are published with, px."""


def read_slide_runner(
    annotations: Path, images: Path | None, first_index: int
) -> list[AnnotatedField]:
    """One field per slide; one without any annotation is not annotated.

    Raises:
        UserError: neither a database of SlideRunner nor its JSON, an annotation of no slide, or a
            point outside its slide.
    """
    if not annotations.is_file():
        raise UserError(f"{annotations}: expected a SlideRunner database or its JSON, found none")
    with annotations.open("rb") as stream:
        is_database = stream.read(len(HEADER)) == HEADER
    if not is_database:
        document = read_json(annotations, "a SlideRunner database or its JSON")
        return read_document(
            document,
            annotations,
            images,
            first_index,
            keep_box,
            empty_is_annotated=False,
            other_cells=True,
        )
    slides, rows = _read_database(annotations)
    points, labels, others = defaultdict(list), defaultdict(list), Counter()
    touched = {row[0] for row in rows}
    if lost := touched - {slide[0] for slide in slides}:
        raise UserError(f"{annotations}: expected annotations of listed slides, found slide {lost}")
    for slide, name, x, y in rows:
        label = find_class(name or "")
        if label is None:
            others[name or NO_CLASS] += 1
            continue
        points[slide].append((x - first_index, y - first_index))
        labels[slide].append(label)
    log_other_cells(annotations, others)
    has_look_alikes = any(LOOK_ALIKE in found for found in labels.values())
    return [
        make_field(
            str(annotations),
            make_field_id(filename),
            find_image(images, filename),
            points[slide],
            labels[slide],
            annotated=slide in touched,
            look_alikes=has_look_alikes and slide in touched,
            size=(width or np.inf, height or np.inf),
            reach=REACH,
        )
        for slide, filename, width, height in slides
    ]


def _read_database(path: Path) -> tuple[list[Any], list[Any]]:
    """Its slides (uid, file name, width, height), and the annotations that are not deleted (slide,
    class name, x, y).
    """
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            columns = {row[1] for row in database.execute("PRAGMA table_info(Annotations)")}
            # databases of early versions have no mark for what was deleted
            kept = "WHERE COALESCE(a.deleted, 0) = 0" if "deleted" in columns else ""
            return (
                database.execute(SLIDES).fetchall(),
                database.execute(MIDDLES.format(kept=kept)).fetchall(),
            )
    except sqlite3.Error as error:
        raise UserError(f"{path}: expected a SlideRunner database, found {error}") from None
