"""Pictures with named boxes, from whatever layout they were read, and written as COCO JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from patch_encoder.slides.names import PICTURE_SUFFIXES, suffix_of
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import write_json

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

    def add(self, box: Box, label: str, *, crowd: bool = False) -> None:
        """Enter a box."""
        self.boxes.append(box)
        self.labels.append(label)
        self.crowd.append(crowd)


def list_pictures(folder: Path) -> dict[str, Path]:
    """Path below the folder -> file, of all pictures at any depth.

    Raises:
        UserError: none there.
    """
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if suffix_of(path) in PICTURE_SUFFIXES and path.is_file()
    }
    if not found:
        raise UserError(f"images={folder}: expected pictures, found none")
    return found


def find_picture(pictures: Iterable[str], name: str, source: str) -> str:
    """The picture that a name means: its path, its file name, or either without the ending.

    Raises:
        UserError: none, or several.
    """
    wanted = name.replace("\\", "/")
    pictures = list(pictures)
    if wanted in pictures:
        return wanted
    stem = str(Path(wanted).with_suffix(""))
    for found in (
        [p for p in pictures if str(Path(p).with_suffix("")) == stem],
        [p for p in pictures if Path(p).name == Path(wanted).name],
        [p for p in pictures if Path(p).stem == Path(wanted).stem],
    ):
        if len(found) > 1:
            raise UserError(f"{source}: picture '{name}' may be {found[0]} or {found[1]}")
        if found:
            return found[0]
    raise UserError(f"{source}: no picture '{name}' in images=; {did_you_mean(name, pictures)}")


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
