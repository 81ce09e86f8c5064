"""Pictures with named boxes, from whatever layout they were read, and written as COCO JSON."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from patch_encoder.slides.names import PICTURE_SUFFIXES, suffix_of
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import write_json

logger = logging.getLogger(__name__)
Box = tuple[float, float, float, float]


@dataclass
class BoxedPicture:
    """One picture and what is annotated on it.

    Attributes:
        file_name: path below the folder of pictures.
        width, height: px.
        boxes: xyxy px.
        labels: class name of each box.
        crowd: whether a box counts neither as found nor as missed.
    """

    file_name: str
    width: int
    height: int
    boxes: list[Box] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)

    def add(self, box: Box, label: str, where: str, *, crowd: bool = False) -> None:
        """Enter a box; one without an area inside the picture is left out with a warning, since
        published sets hold some.

        Raises:
            UserError: numbers that are none; `where` names the place.
        """
        if not all(math.isfinite(edge) for edge in box):
            raise UserError(
                f"{where}: expected a box of finite numbers, found {list(box)}; correct it or take "
                "it out"
            )
        x0, y0, x1, y1 = box
        inside = min(x1, self.width) > max(x0, 0) and min(y1, self.height) > max(y0, 0)
        if not inside:
            logger.warning(
                "%s: '%s' at %s has no area inside its picture of %d x %d px and is left out",
                where, label, [round(edge, 2) for edge in box], self.width, self.height,
            )  # fmt: skip
            return
        self.boxes.append(box)
        self.labels.append(label)
        self.crowd.append(crowd)


class PictureFolder:
    """The pictures below a folder, at any depth, and what they may be called.

    Attributes:
        files: path below the folder -> file.

    Raises:
        UserError: there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if suffix_of(path) in PICTURE_SUFFIXES and path.is_file()
        }
        if not self.files:
            raise UserError(f"images={folder}: expected pictures, found none")
        # by path without ending, by file name, by file name without ending
        self._names: list[dict[str, list[str]]] = [{}, {}, {}]
        for name in self.files:
            for names, short in zip(self._names, _shorten(name), strict=True):
                names.setdefault(short, []).append(name)

    def has_stem(self, stem: str) -> bool:
        """Whether a picture has this file name without its ending."""
        return stem in self._names[2]

    def find(self, name: str, source: str) -> str:
        """The picture that a name means: its path, its file name, or either without the ending.

        Raises:
            UserError: none, or several.
        """
        wanted = name.replace("\\", "/")
        if wanted in self.files:
            return wanted
        for names, short in zip(self._names, _shorten(wanted), strict=True):
            found = names.get(short, [])
            if len(found) > 1:
                raise UserError(f"{source}: picture '{name}' may be {found[0]} or {found[1]}")
            if found:
                return found[0]
        raise UserError(
            f"{source}: no picture '{name}' in images=; {did_you_mean(name, self.files)}"
        )


def _shorten(name: str) -> tuple[str, str, str]:
    path = PurePosixPath(name)
    return str(path.parent / path.stem), path.name, path.stem


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file in UTF-8.

    Raises:
        UserError: another encoding, or a file that cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: expected {what} in UTF-8, cannot be read: {error}") from None


def measure_picture(file_name: str, path: Path) -> BoxedPicture:
    """A picture without boxes yet; its size is read from its header.

    Raises:
        UserError: no picture.
    """
    try:
        with Image.open(path) as picture:
            return BoxedPicture(file_name, *picture.size)
    except OSError as error:
        raise UserError(f"{path}: expected a picture, cannot be read: {error}") from None


def write_boxes(path: Path, pictures: Sequence[BoxedPicture], classes: Sequence[str] = ()) -> None:
    """Write pictures as a COCO document.

    Args:
        path: file to write.
        pictures: what it holds.
        classes: class names in the order of their category ids, from 1 on; empty: by the alphabet.

    Raises:
        UserError: no box at all.
    """
    names = list(classes) or sorted({label for picture in pictures for label in picture.labels})
    if not any(picture.boxes for picture in pictures):
        raise UserError(f"expected annotated boxes, found none in {len(pictures)} pictures")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures, start=1):
        size = {"width": picture.width, "height": picture.height}
        images.append({"id": number, "file_name": picture.file_name, **size})
        for (x0, y0, x1, y1), label, crowd in zip(
            picture.boxes, picture.labels, picture.crowd, strict=True
        ):
            box = [round(value, 4) for value in (x0, y0, x1 - x0, y1 - y0)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": names.index(label) + 1,
                    "bbox": box,
                    "area": round(box[2] * box[3], 4),
                    "iscrowd": int(crowd),
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(names, start=1)]
    write_json(path, {"images": images, "categories": categories, "annotations": annotations})
