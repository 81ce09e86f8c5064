"""Boxes of YOLO (Redmon et al., CVPR 2016; the layout of darknet and ultralytics): one text file
per picture with `class cx cy width height`, fractions of the picture.

A row with an outline (`class x y x y x y ...`, three points or more) becomes the outline's box. A
picture without a file, or with an empty one, has no boxes. Names of the classes come from
`classes.txt` (one per line) or from the `names` of `data.yaml`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from detection_kd.box_sets.boxed_pictures import (
    Box,
    BoxedPicture,
    PictureFolder,
    measure_picture,
    read_lines,
)
from wsi_common.errors import UserError

NO_BOXES = {"classes.txt", "train.txt", "val.txt", "test.txt"}


def read_yolo(annotations: Path, images: Path, names: list[str]) -> list[BoxedPicture]:
    """All pictures with their boxes.

    Args:
        annotations: folder with the text files, in the folders of the pictures.
        images: folder of the pictures.
        names: of the classes, by number.

    Raises:
        UserError: a row that is no box, an unknown class, or a text file with no picture or two.
    """
    pictures = PictureFolder(images).files
    files = {
        path.relative_to(annotations).with_suffix("").as_posix(): path
        for path in sorted(annotations.rglob("*.txt"))
        if path.name not in NO_BOXES
    }
    if not files:
        raise UserError(f"{annotations}: expected YOLO's text files, found none")
    found = []
    owners: dict[str, str] = {}
    for name, path in pictures.items():
        picture, stem = measure_picture(name, path), Path(name).with_suffix("").as_posix()
        if stem in files:
            if stem in owners:
                raise UserError(
                    f"{files[stem]}: expected one picture of that name in images=, found "
                    f"{owners[stem]} and {name}; rename one of them"
                )
            owners[stem] = name
            _read_file(files[stem], picture, names)
        found.append(picture)
    without = files.keys() - owners.keys()
    if without:
        first = files[min(without)]
        raise UserError(f"{first}: expected a picture of that name in images=, found none")
    return found


def _read_file(file: Path, picture: BoxedPicture, names: list[str]) -> None:
    for line, text in enumerate(read_lines(file, "boxes of YOLO"), start=1):
        if not text.strip():
            continue
        where = f"{file} line {line}"
        try:
            label, values = int(text.split()[0]), [float(value) for value in text.split()[1:]]
        except ValueError:
            label, values = -1, []
        finite = all(math.isfinite(value) and -0.01 <= value <= 1.01 for value in values)
        if not finite or not (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)):
            raise UserError(
                f"{where}: expected a class and 4 fractions of the picture (or an outline), found "
                f"'{text[:60]}'"
            )
        if not 0 <= label < len(names):
            raise UserError(f"{where}: expected a class from 0 to {len(names) - 1}, found {label}")
        picture.add(_make_box(values, picture), names[label], where)


def _make_box(values: list[float], picture: BoxedPicture) -> Box:
    if len(values) == 4:
        x, y, width, height = values
        edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    else:
        edges = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    sides = (picture.width, picture.height, picture.width, picture.height)
    x0, y0, x1, y1 = (edge * side for edge, side in zip(edges, sides, strict=True))
    return x0, y0, x1, y1


def read_class_names(path: Path) -> list[str]:
    """Names of the classes by number.

    Args:
        path: `classes.txt`, or a YAML file with `names`, a list or a mapping from numbers.

    Raises:
        UserError: no names, or numbers that do not run from 0.
    """
    lines = read_lines(path, "names of classes")
    if path.suffix.lower() not in {".yaml", ".yml"}:
        names = [line.strip() for line in lines if line.strip()]
    else:
        try:
            content: Any = yaml.safe_load("\n".join(lines))
        except yaml.YAMLError as error:
            raise UserError(f"{path}: expected YAML, cannot be read: {error}") from None
        found = content.get("names") if isinstance(content, dict) else None
        if isinstance(found, dict):
            named = {str(number): name for number, name in found.items()}
            numbers = [str(number) for number in range(len(named))]
            if named.keys() != set(numbers):
                raise UserError(
                    f"{path}: expected names of the classes 0 to {len(named) - 1}, found those of "
                    f"{', '.join(named)}; number them from 0 without gaps"
                )
            found = [named[number] for number in numbers]
        names = [str(name) for name in found] if isinstance(found, list) else []
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: expected different names of classes, found {names}")
    return names
