"""Boxes of Pascal VOC (Everingham et al., IJCV 2010): one XML file per picture.

`difficult` objects become crowd regions: VOC's evaluation passes over them, too. The published sets
count pixels from 1 and name the last pixel of a box; labelImg and most exporters count from 0 and
name its edge.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from detection_kd.box_sets.boxed_pictures import BoxedPicture, PictureFolder, measure_picture
from wsi_common.errors import UserError

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(annotations: Path, images: Path, first_index: int = 0) -> list[BoxedPicture]:
    """Pictures that have an XML file, by the files' names.

    Args:
        annotations: folder with the XML files, at any depth.
        images: folder of the pictures.
        first_index: index of an image's first pixel, 0 or 1.

    Raises:
        UserError: no files, broken XML, a box without numbers, or a picture that is missing.
    """
    files = sorted(annotations.rglob("*.xml")) if annotations.is_dir() else [annotations]
    if not files:
        raise UserError(f"{annotations}: expected Pascal VOC files *.xml, found none")
    pictures = PictureFolder(images)
    return [_read_file(file, pictures, first_index) for file in files]


def _read_file(file: Path, pictures: PictureFolder, first_index: int) -> BoxedPicture:
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise UserError(f"{file}: expected XML of Pascal VOC, cannot be read: {error}") from None
    named = (root.findtext("filename") or "").strip()
    # tools that rename files leave the old name inside
    wanted = named if pictures.has_stem(Path(named).stem) else file.stem
    name = pictures.find(wanted, str(file))
    picture = measure_picture(name, pictures.files[name])
    for number, entry in enumerate(root.iter("object")):
        where = f"{file}: object {number}"
        label = (entry.findtext("name") or "").strip()
        try:
            x0, y0, x1, y1 = (float(entry.findtext(f"bndbox/{side}") or "") for side in CORNERS)
        except ValueError:
            raise UserError(f"{where}: expected a bndbox with {', '.join(CORNERS)}") from None
        if not label:
            raise UserError(f"{where}: expected a name, found none")
        box = (x0 - first_index, y0 - first_index, x1, y1)
        difficult = (entry.findtext("difficult") or "0").strip() == "1"
        picture.add(box, label, where, crowd=difficult)
    return picture
