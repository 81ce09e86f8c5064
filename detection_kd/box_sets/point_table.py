"""Boxes around points of a plain table: `file,x,y,class`, one point per row.

`file` is a picture below the folder of pictures, x and y are px. A row without x and y names a
picture on which nothing was found; pictures without any row are left out.
"""

from __future__ import annotations

from pathlib import Path

from detection_kd.box_sets.boxed_pictures import BoxedPicture, PictureFolder, measure_picture
from patch_encoder.cohort.labels import read_rows
from wsi_common.errors import UserError


def read_point_table(
    annotations: Path, images: Path, point_side: float, first_index: int = 0
) -> list[BoxedPicture]:
    """Pictures of a table.

    Args:
        annotations: the table.
        images: folder of the pictures.
        point_side: side of the box around a point, px.
        first_index: index of an image's first pixel, 0 or 1.

    Raises:
        UserError: a missing column, a cell that is no number, a point outside its picture.
    """
    pictures = PictureFolder(images)
    found: dict[str, BoxedPicture] = {}
    for line, row in read_rows(annotations, ("file", "x", "y", "class")):
        where = f"{annotations} line {line}"
        name = pictures.find(row["file"], where)
        if name not in found:
            found[name] = measure_picture(name, pictures.files[name])
        if not (row["x"] or row["y"]):
            continue
        try:
            x, y = float(row["x"]) - first_index, float(row["y"]) - first_index
        except ValueError:
            raise UserError(
                f"{where}: expected numbers x and y, found '{row['x']}' and '{row['y']}'"
            ) from None
        picture = found[name]
        if not (0 <= x <= picture.width and 0 <= y <= picture.height and row["class"]):
            raise UserError(
                f"{where}: expected a class and a point inside {picture.width} x {picture.height} "
                f"px, found '{row['class']}' at ({x:g}, {y:g})"
            )
        half = point_side / 2
        picture.add((x - half, y - half, x + half, y + half), row["class"], where)
    return list(found.values())
