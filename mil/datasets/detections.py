"""What a detector found on slides, as `detect_slide` writes it: `<folder>/coco/<slide_id>.json`,
COCO JSON with scores.

Boxes are (x, y, width, height) in level-0 px. A slide's vector is made of pooled confidences and
counts: mean of the k highest, counts above thresholds, and per category the highest confidence and
the count. Counts are log(1 + n), since slides differ in area. A slide on which nothing was found is
a vector of zeros.

Feature bags get two more columns from them: per tile the highest confidence and the number of the
detections whose centre lies in it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from mil.datasets.splits import list_names
from patch_encoder.bags.bag import open_bag, read_bag
from patch_encoder.bags.writer import write_bag
from patch_encoder.tiles.coordinates import TileGeometry
from wsi_common import __version__
from wsi_common.errors import UserError
from wsi_common.files import read_json, safe_id, sha256_file
from wsi_common.provenance import can_reuse

logger = logging.getLogger(__name__)
CHANNELS = "detection_max,detection_count"  # of a bag


@dataclass(frozen=True)
class SlideDetections:
    """A slide's n detections.

    Attributes:
        boxes: (n, 4) x, y, width, height in level-0 px.
        scores: (n,) in 0..1.
        labels: (n,) index into the categories.
        categories: names, in the order of the file.
    """

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    categories: tuple[str, ...]


def find_detections(folder: str | Path, slide_ids: Sequence[str]) -> dict[str, Path]:
    """File of every slide, in `<folder>/coco` or `<folder>`.

    Raises:
        UserError: slides without a file, all of them in one line.
    """
    folder = Path(folder)
    folder = folder / "coco" if (folder / "coco").is_dir() else folder
    files = {slide: folder / f"{safe_id(slide)}.json" for slide in slide_ids}
    missing = [slide for slide, path in files.items() if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder}: expected <slide_id>.json of detect_slide, {len(missing)} of {len(files)} "
            f"slides have none: {list_names(missing, 10)}; "
            "run tools/detect_slide.sh on them (a slide without lesions has a file too)"
        )
    return files


def read_detections(path: str | Path) -> SlideDetections:
    """Read and check one slide's file.

    Raises:
        UserError: no COCO document, a box, score or category that is none.
    """
    document = read_json(path, "detections of a slide (COCO JSON)")
    try:
        categories = {int(entry["id"]): str(entry["name"]) for entry in document["categories"]}
        images, rows = document["images"], document["annotations"]
        boxes = np.array([row["bbox"] for row in rows], np.float32).reshape(len(rows), 4)
        scores = np.array([row["score"] for row in rows], np.float32).reshape(len(rows))
        numbers = [int(row["category_id"]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: expected COCO JSON with images, categories, annotations (bbox, score, "
            "category_id), "
            f"found {type(error).__name__}: {error}"
        ) from None
    if len(images) != 1:
        raise UserError(
            f"{path}: expected one image, the slide, found {len(images)}; use the files of "
            "detect_slide"
        )
    unknown = sorted(set(numbers) - set(categories))
    if unknown:
        raise UserError(
            f"{path}: expected the file's categories {sorted(categories)}, found category_id "
            f"{unknown[0]}"
        )
    if not (np.isfinite(boxes).all() and ((scores >= 0) & (scores <= 1)).all()):
        raise UserError(
            f"{path}: expected finite boxes and scores in 0..1, found others; run detect_slide "
            "again"
        )
    order = list(categories)
    labels = np.array([order.index(number) for number in numbers], np.int64)
    return SlideDetections(boxes, scores, labels, tuple(categories.values()))


def read_all(files: Mapping[str, Path]) -> dict[str, SlideDetections]:
    """Every slide's detections, of one detector.

    Raises:
        UserError: a file that `read_detections` refuses, or one with other categories than the
            first.
    """
    found: dict[str, SlideDetections] = {}
    for slide, path in files.items():
        found[slide] = read_detections(path)
        first = next(iter(found))
        if found[slide].categories != found[first].categories:
            raise UserError(
                f"{path}: expected categories {list(found[first].categories)} as on slide "
                f"{first}, found "
                f"{list(found[slide].categories)}; use one detector for the cohort"
            )
    empty = [slide for slide, detections in found.items() if len(detections.scores) == 0]
    if empty:
        line = "%d of %d slides have no detection, their features are 0: %s"
        logger.info(line, len(empty), len(found), list_names(empty, 10))
    return found


def make_slide_vector(
    found: SlideDetections, top_k: int, thresholds: Sequence[float]
) -> dict[str, float]:
    """Name -> value of a slide's features; `top` is the first.

    Args:
        found: the slide's detections.
        top_k: confidences that are pooled; where there are fewer, zeros stand for the rest.
        thresholds: confidences above which detections are counted.
    """
    ranked = np.sort(found.scores)[::-1]
    values = {f"top{top_k}_mean": ranked[:top_k].sum() / top_k, "max": ranked[:1].sum()}
    values |= {f"count_{t:g}": np.log1p((found.scores >= t).sum()) for t in thresholds}
    for index, name in enumerate(found.categories):
        own = found.scores[found.labels == index]
        values |= {f"{name}_max": own.max(initial=0.0), f"{name}_count": np.log1p(len(own))}
    return {name: float(value) for name, value in values.items()}


def make_tile_channels(
    found: SlideDetections, coords: Int[np.ndarray, "tiles 2"], side: int, block: int = 4096
) -> Float[np.ndarray, "tiles 2"]:
    """Highest confidence and number of the detections whose centre lies in each tile; 0, 0 where
    there is none.

    Args:
        found: the slide's detections.
        coords: top-left corners in level-0 px.
        side: of a tile, level-0 px; its left and upper edges belong to it, the others do not.
        block: tiles at a time.
    """
    centres = found.boxes[:, :2] + found.boxes[:, 2:] / 2  # (n, 2)
    channels = np.zeros((len(coords), 2), np.float32)
    for start in range(0, len(coords), block):
        corner = coords[start : start + block, None]  # (b, 1, 2)
        inside = ((centres >= corner) & (centres < corner + side)).all(2)  # (b, n)
        channels[start : start + block, 0] = np.where(inside, found.scores, 0).max(1, initial=0.0)
        channels[start : start + block, 1] = inside.sum(1)
    return channels


def write_channel(
    source: Path, target: Path, found: SlideDetections, detections: Path, *, overwrite: bool = False
) -> bool:
    """Write one slide's bag with the channels appended; False when it is there already.

    Args:
        source: the bag, with coords and their tile size.
        target: the new bag.
        found: the slide's detections, in level-0 px as the coords.
        detections: their file, for the provenance.

    Raises:
        UserError: a bag without coords or tile size; a target of other inputs, unless `overwrite`.
    """
    own = {"source_sha256": open_bag(source).digest(), "channels": CHANNELS}
    own |= {"detections_sha256": sha256_file(detections)}

    def recorded() -> dict[str, Any]:
        found_there = open_bag(target).provenance
        return {name: value for name, value in found_there.items() if name in own}

    if can_reuse(target, recorded, own, "a bag of other inputs", overwrite=overwrite):
        return False
    bag = read_bag(source)
    if bag.coords is None:
        raise UserError(
            f"{source}: expected coords beside the features, found none; detections cannot be "
            "laid on its tiles"
        )
    side = TileGeometry.from_attributes(bag.tiling, str(source)).patch_size_level0
    channels = torch.from_numpy(make_tile_channels(found, bag.coords.numpy(), side))
    features = torch.cat([bag.read(), channels], dim=1)
    encoder = bag.provenance.get("encoder", source.parent.parent.name)
    changed = {"encoder": f"{encoder}+detections", "software_version": __version__}
    write_bag(target, features, bag.coords, bag.tiling, bag.provenance | own | changed)
    return True


def write_channels(
    bags: Mapping[str, Path],
    found: Mapping[str, SlideDetections],
    files: Mapping[str, Path],
    folder: Path,
    overwrite: bool,
) -> int:
    """`<folder>/h5_files/<slide_id>.h5` for every slide; how many were written."""
    targets = {slide: folder / "h5_files" / f"{slide}.h5" for slide in bags}
    return sum(
        write_channel(bags[s], targets[s], found[s], files[s], overwrite=overwrite) for s in bags
    )
