"""Split one COCO annotation file into several, by lists of names (Pascal VOC's ImageSets) or at
random by groups of images.

Images of one slide or patient must not be on two sides: `group` says which part of a file name they
share. Ids, categories and all other content stay as they are.

    python -m detection_kd.split_coco annotations=bccd/coco.json lists=bccd/ImageSets/Main
    output=runs/bccd/annotations
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detection_kd.box_sets.image_groups import find_group
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import read_json, write_json

logger = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")


@dataclass
class Config:
    """Keys of `split_coco`."""

    annotations: str = key(REQUIRED, "COCO JSON file with the annotated boxes", path=True)
    output: str = key(
        REQUIRED, "where the results are written; train.json, val.json and test.json", runtime=True
    )
    lists: str = key(
        "",
        "folder with train.txt, val.txt and test.txt, one image name per line, with or "
        "without suffix; or without its folder, where that says which image is meant",
        path=True,
    )
    shares: list[float] = key([0.7, 0.15, 0.15], "shares of train, val and test, without lists")
    group: str = key(
        "",
        "regular expression; images whose names match alike stay together, as ^[^_]+; empty: each "
        "on its own",
    )
    seed: int = key(0, "seed of everything that is drawn at random")


def main(config: Config) -> int:
    """Write a file for every split that has images."""
    document = read_json(config.annotations, "a COCO document")
    try:
        names = [str(image["file_name"]) for image in document["images"]]
        image_ids = [annotation["image_id"] for annotation in document["annotations"]]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{config.annotations}: expected a COCO document (images, annotations), found {error!r}"
        ) from None
    sides = (
        split_by_lists(names, Path(config.lists))
        if config.lists
        else draw_split(names, config.shares, config.group, config.seed)
    )
    unused = sides.count("")
    if unused:
        logger.info("%s: %d of %d images are in no list", config.annotations, unused, len(names))
    boxes = Counter(image_ids)
    for split in SPLITS:
        images = [
            image for image, side in zip(document["images"], sides, strict=True) if side == split
        ]
        file = Path(config.output) / f"{split}.json"
        if not images:
            file.unlink(missing_ok=True)  # of an earlier split
        else:
            write_json(file, select_part(document, images))
            logger.info(
                "%s: %d images, %d boxes",
                split,
                len(images),
                sum(boxes[image["id"]] for image in images),
            )
    return 0


def split_by_lists(names: list[str], folder: Path) -> list[str]:
    """The split of every image by `<split>.txt`, "" where it is in none.

    Raises:
        UserError: no list, a name without image or of several, or one in two lists.
    """
    places = find_names(names)
    sides = [""] * len(names)
    files = [file for split in SPLITS if (file := folder / f"{split}.txt").is_file()]
    if not files:
        raise UserError(f"lists={folder}: expected train.txt, val.txt or test.txt, found none")
    for file in files:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        for name in filter(None, map(str.strip, lines)):
            found = places.get(name, [])
            if not found:
                raise UserError(
                    f"{file}: '{name}' is not among the {len(names)} images of the annotations"
                )
            if len(found) > 1:
                meant = ", ".join(f"'{names[index]}'" for index in found[:3])
                raise UserError(
                    f"{file}: '{name}' may be {len(found)} images ({meant}); give the whole name"
                )
            if sides[found[0]]:
                raise UserError(f"{file}: '{name}' is in {sides[found[0]]}.txt too")
            sides[found[0]] = file.stem
    return sides


def find_names(names: list[str]) -> dict[str, list[int]]:
    """The images that a line of a list may mean: the whole name first, then that without its
    suffix, then without its folder, then without both.
    """
    forms = (
        lambda path: path,
        lambda path: path.with_suffix(""),
        lambda path: Path(path.name),
        lambda path: Path(path.stem),
    )
    places: dict[str, list[int]] = {}
    for form in forms:
        found: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            found.setdefault(str(form(Path(name))), []).append(index)
        places = found | places  # what an earlier form says stands
    return places


def draw_split(names: list[str], shares: list[float], group: str, seed: int) -> list[str]:
    """A random split of every image; groups stay together, so that shares are met as nearly as
    their sizes allow.

    Raises:
        UserError: shares that do not make a whole, a name that `group` does not match, or too few
            groups for the splits.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(
            f"shares={shares}: expected three shares that sum to 1, of train, val and test"
        )
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(find_group(name, group), []).append(index)
    order = np.random.default_rng(seed).permutation(len(members))
    groups = list(members.values())
    sides, counts = [""] * len(names), np.zeros(len(SPLITS))
    for number in order:
        missing = np.array(shares) * len(names) - counts
        side = int(missing.argmax())
        counts[side] += len(groups[number])
        for index in groups[number]:
            sides[index] = SPLITS[side]
    empty = [
        name for name, share in zip(SPLITS, shares, strict=True) if share and name not in sides
    ]
    if empty:
        raise UserError(
            f"group='{group}', shares={shares}: expected images in every split, found none for "
            f"{' and '.join(empty)}, since there are {len(members)} groups; give another group or "
            "other shares"
        )
    return sides


def select_part(document: dict[str, Any], images: list[dict[str, Any]]) -> dict[str, Any]:
    """The document with these images and their annotations only."""
    kept = {image["id"] for image in images}
    annotations = [
        annotation for annotation in document["annotations"] if annotation["image_id"] in kept
    ]
    return {**document, "images": images, "annotations": annotations}


if __name__ == "__main__":
    launch(main, Config)
