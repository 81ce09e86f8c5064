"""Compose a cohort of tile-folder slides from annotated pictures: real pixels where no open slides
of the kind exist.

A stand-in again: the tiles of a slide come from many fields, so that only what single tiles show
can be learned, and positives are made to have few lesion tiles. Slides of a split come from that
split's fields only, no tile is used twice, and no original is in two slides where the annotations
name originals (`label_fields` writes such). The detector's documents are the fields of train and
val themselves, copied byte for byte.

    python -m patch_encoder.demo.compose_cohort --config configs/quickstart/compose.yaml

Written: labels.csv, slides/<slide>/<row>_<col>.jpg (tiles encoded again, JPEG quality 95 without
colour subsampling), tiles.csv (where each tile comes from), detection/{train,val}.json,
detection/images/* and cohort.json.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from patch_encoder.demo.cohort_folder import LABEL_COLUMNS, claim_folder, make_coco_document
from patch_encoder.demo.composition.composed_slides import (
    SPLITS,
    ComposedSlide,
    Field,
    FieldTile,
    compose_slides,
    cut_tiles,
    read_fields,
    split_fields,
)
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, identity, key
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import atomic_path, sha256_file, write_csv, write_json
from wsi_common.progress import progress

TILE_COLUMNS = ("slide_id", "row", "column", "field", "x", "y", "lesion", "original")
JPEG_QUALITY = 95
logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of the script."""

    output: str = key(REQUIRED, "where the results are written; the cohort", runtime=True)
    images: str = key(REQUIRED, "folder of the images that the annotations name", path=True)
    annotations: str = key(REQUIRED, "COCO JSON file with the annotated boxes", path=True)
    lists: str = key(
        REQUIRED,
        "folder with train.txt, val.txt and test.txt, one image name per line, with or "
        "without suffix",
        path=True,
    )
    lesion_category: str = key("WBC", "category whose boxes are the lesions of the slides")
    detection_categories: list[str] = key(
        [], "categories of the detector's documents; empty = all of them"
    )
    tile: int = key(128, "side of a tile, px")
    tiles_per_slide: int = key(40, "tiles per slide")
    columns: int = key(8, "tiles in a row of a slide")
    mpp: float = key(
        0.25,
        "micrometres per pixel at level 0; written into labels.csv; nominal, when the "
        "pictures do not say",
    )
    train_slides: int = key(50, "slides of split train, half of them positive")
    val_slides: int = key(22, "slides of split val, half of them positive")
    test_slides: int = key(18, "slides of split test, half of them positive")
    seed: int = key(0, "seed of everything that is drawn at random")
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def main(config: Config) -> int:
    """Plan all slides, then write what is missing and the tables."""
    check(config)
    root, source = Path(config.output), Path(config.images)
    fields, categories, empty = read_fields(Path(config.annotations))
    wanted = config.detection_categories or categories
    for name in (config.lesion_category, *wanted):
        if name not in categories:
            raise UserError(
                f"category '{name}': expected one that {config.annotations} has; "
                f"{did_you_mean(name, categories)}"
            )
    if empty:
        logger.info("%s: %d boxes without area left out", config.annotations, empty)
    chosen = split_fields(fields, Path(config.lists), source)
    slides = []
    for number, split in enumerate(SPLITS):
        tiles = [
            tile
            for field in chosen[split]
            for tile in cut_tiles(field, config.tile, config.lesion_category)
        ]
        slides += compose_slides(
            split,
            tiles,
            getattr(config, f"{split}_slides"),
            config.tiles_per_slide,
            (config.seed, number),
        )
    inputs = {split: sha256_file(Path(config.lists) / f"{split}.txt") for split in SPLITS}
    inputs["annotations"] = sha256_file(config.annotations)
    claim_folder(root, "compose_cohort", {**identity(config), "inputs": inputs}, config.overwrite)
    for slide in progress(slides, "slides", len(slides), "slide"):
        places = [
            (place // config.columns, place % config.columns) for place in range(len(slide.tiles))
        ]
        write_tile_folder(
            root / "slides" / slide.slide_id, slide.tiles, places, source, config.tile
        )
    write_tables(root, slides, config.columns, config.mpp)
    for split in ("train", "val"):
        write_detection(root / "detection", split, chosen[split], wanted, source)
    logger.info(
        "%s: %d slides, %d positive", root, len(slides), sum(slide.positive for slide in slides)
    )
    return 0


def check(config: Config) -> None:
    """Raise UserError on a number that makes no cohort."""
    lowest = {
        "tile": 16,
        "tiles_per_slide": 1,
        "columns": 1,
        "seed": 0,
        "train_slides": 0,
        "val_slides": 0,
        "test_slides": 0,
    }
    for name, low in lowest.items():
        if getattr(config, name) < low:
            raise UserError(f"key '{name}': expected {low} or more, found {getattr(config, name)}")
    if not 0 < config.mpp < 1000:
        raise UserError(f"key 'mpp': expected more than 0 and less than 1000, found {config.mpp:g}")


def write_tables(root: Path, slides: list[ComposedSlide], columns: int, mpp: float) -> None:
    """labels.csv (each slide a case of its own) and tiles.csv."""
    places = [
        {
            "slide_id": slide.slide_id,
            "row": place // columns,
            "column": place % columns,
            "field": tile.file_name,
            "x": tile.x,
            "y": tile.y,
            "lesion": int(tile.lesion),
            "original": tile.original,
        }
        for slide in slides
        for place, tile in enumerate(slide.tiles)
    ]
    write_csv(root / "tiles.csv", TILE_COLUMNS, places)
    rows = [
        {
            "case_id": slide.slide_id,
            "slide_id": slide.slide_id,
            "label": slide.label,
            "split": slide.split,
            "mpp": mpp,
        }
        for slide in slides
    ]
    write_csv(root / "labels.csv", LABEL_COLUMNS, rows)


def write_detection(
    folder: Path, split: str, fields: list[Field], categories: list[str], source: Path
) -> None:
    """`<split>.json` with the boxes of the wanted categories, and the pictures."""
    for field in progress(fields, f"{split} fields", len(fields), "field"):
        target = folder / "images" / field.file_name
        if not target.is_file():
            with atomic_path(target) as temporary:
                shutil.copyfile(source / field.file_name, temporary)
    boxes = [
        [(category, box) for category, box in field.boxes if category in categories]
        for field in fields
    ]
    images = [(field.file_name, field.width, field.height) for field in fields]
    write_json(folder / f"{split}.json", make_coco_document(images, boxes, categories))


def write_tile_folder(
    folder: Path,
    tiles: Sequence[FieldTile],
    places: Sequence[tuple[int, int]],
    source: Path,
    side: int,
) -> None:
    """Write each tile at its (row, column); a folder that is there is kept, because it appears only
    when complete.

    Raises:
        UserError: a picture cannot be read or is smaller than its annotations say.
    """
    if folder.is_dir():
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for tile, (row, column) in zip(tiles, places, strict=True):
        picture = read_picture(source / tile.file_name)
        if tile.x + side > picture.width or tile.y + side > picture.height:
            raise UserError(
                f"{source / tile.file_name}: expected the size in its annotations, found "
                f"{picture.width} x {picture.height}; "
                "correct the annotations"
            )
        with (temporary / f"{row}_{column}.jpg").open("wb") as stream:
            part = picture.crop((tile.x, tile.y, tile.x + side, tile.y + side))
            part.save(stream, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
            stream.flush()
            os.fsync(stream.fileno())
    os.replace(temporary, folder)


@lru_cache(maxsize=256)
def read_picture(path: Path) -> Image.Image:
    """An RGB picture; the last ones stay in memory, because a field gives tiles to many slides."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: expected a picture, found {error}") from None


if __name__ == "__main__":
    launch(main, Config)
