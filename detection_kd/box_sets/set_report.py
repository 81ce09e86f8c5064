"""What a detection set holds, and what is wrong with it, before a detector is trained on it."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from detection_kd.datasets.coco import DetectionSet, ImageRecord
from wsi_common.errors import UserError
from wsi_common.files import sha256_file

logger = logging.getLogger(__name__)
SIZES = (32**2, 96**2)  # px of area between small, medium and large, as COCO has it
QUANTILES = (0, 5, 25, 50, 75, 95, 100)
SHOWN = 10  # names in a message
RARE = 10  # boxes of a class from which on it can be learned at all


def count_real(record: ImageRecord) -> int:
    """Boxes of an image without its crowd regions."""
    return int((~record.crowd).sum())


def find_crowded(records: list[ImageRecord], most: int) -> list[ImageRecord]:
    """Images with more boxes than `most`, the fullest first."""
    crowded = [record for record in records if count_real(record) > most]
    return sorted(crowded, key=count_real, reverse=True)


def warn_of_crowded_images(annotated: DetectionSet, name: str, most: int) -> None:
    """Warn where images have more boxes than a detector can find."""
    crowded = find_crowded(annotated.images, most)
    if crowded:
        logger.warning("%s: %s", name, describe_crowded(crowded, most))


def describe_crowded(crowded: list[ImageRecord], most: int) -> str:
    """One line on images with too many boxes, with the remedy."""
    fullest = count_real(crowded[0])
    return (
        f"{len(crowded)} images have more boxes than the {most} that can be found, up to "
        f"{fullest} ({crowded[0].path.name}); raise architecture.queries and max_detections to "
        f"{fullest} or cut the images smaller"
    )


def describe_set(annotated: DetectionSet, most: int) -> dict[str, Any]:
    """Numbers of one set.

    Args:
        annotated: the set.
        most: boxes per image that a detector can find.

    Returns:
        `images`, `images_without_boxes`, `boxes`, `crowd_regions`, `boxes_per_image` and
        `box_sides` (quantiles; a side is the root of the area, px), `box_share` (quantiles of the
        side as a share of the image's short side), `sizes` (COCO's small, medium, large),
        `crowded_images` (names), `classes` (boxes, images, share of the images).
    """
    records = annotated.images
    counts = np.array([count_real(record) for record in records])
    kept = [~record.crowd for record in records]
    areas = np.concatenate([r.areas[k] for r, k in zip(records, kept, strict=True)])
    shares = np.concatenate(
        [np.sqrt(r.areas[k]) / min(r.width, r.height) for r, k in zip(records, kept, strict=True)]
    )
    small, large = (int((areas < SIZES[0]).sum()), int((areas >= SIZES[1]).sum()))
    return {
        "images": len(records),
        "images_without_boxes": int((counts == 0).sum()),
        "boxes": int(counts.sum()),
        "crowd_regions": sum(int(record.crowd.sum()) for record in records),
        "boxes_per_image": _find_quantiles(counts),
        "box_sides": _find_quantiles(np.sqrt(areas)),
        "box_share": _find_quantiles(shares),
        "sizes": {"small": small, "medium": len(areas) - small - large, "large": large},
        "crowded_images": [record.path.name for record in find_crowded(records, most)],
        "classes": _count_classes(annotated),
    }


def _find_quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.percentile(values, QUANTILES)
    return {f"{q}%": round(float(value), 4) for q, value in zip(QUANTILES, found, strict=True)}


def _count_classes(annotated: DetectionSet) -> dict[str, dict[str, float]]:
    rows = {}
    for index, name in enumerate(annotated.categories):
        counts = [int(((r.labels == index) & ~r.crowd).sum()) for r in annotated.images]
        images = sum(count > 0 for count in counts)
        share = round(images / len(counts), 4)
        rows[name] = {"boxes": sum(counts), "images": images, "image_share": share}
    return rows


def find_problems(sets: Mapping[str, DetectionSet], most: int, group: str) -> list[str]:
    """What should be looked at before training, one line each.

    Args:
        sets: by split; the first is trained on.
        most: boxes per image that a detector can find.
        group: regular expression of what a file name says of its patient; "": nothing.

    Raises:
        UserError: `group` is no regular expression, or does not match an image.
    """
    problems = []
    for split, annotated in sets.items():
        crowded = find_crowded(annotated.images, most)
        if crowded:
            problems.append(f"{split}: {describe_crowded(crowded, most)}")
        for name, row in _count_classes(annotated).items():
            if row["boxes"] < RARE:
                problems.append(
                    f"{split}: class '{name}' has {row['boxes']:g} boxes; merge it or leave it out "
                    "with class_map, or annotate more"
                )
    return problems + _find_leaks(sets, group)


def _find_leaks(sets: Mapping[str, DetectionSet], group: str) -> list[str]:
    problems = []
    kinds = {"the same file": _group_by_content(sets)}
    if group:
        kinds["the same patient"] = _group_by_name(sets, group)
    for kind, members in kinds.items():
        shared = {key: owners for key, owners in members.items() if len(owners) > 1}
        pairs = defaultdict(list)
        for key, owners in shared.items():
            name = min(min(names) for names in owners.values()) if kind.endswith("file") else key
            pairs[" and ".join(owners)].append(name)
        for splits, names in pairs.items():
            shown = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            problems.append(
                f"leak: {kind} is in {splits} ({len(names)}): {shown}; split again with "
                "split_coco group=, or by lists"
            )
    return problems


def _group_by_name(
    sets: Mapping[str, DetectionSet], pattern: str
) -> dict[str, dict[str, list[str]]]:
    """Part of the file name -> split -> names."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"group='{pattern}': expected a regular expression: {error}") from None
    members: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for split, annotated in sets.items():
        for record in annotated.images:
            found = compiled.search(record.path.name)
            if found is None:
                raise UserError(f"group='{pattern}': does not match image '{record.path.name}'")
            members[found.group()][split].append(record.path.name)
    return members


def _group_by_content(sets: Mapping[str, DetectionSet]) -> dict[str, dict[str, list[str]]]:
    """Digest -> split -> names, of files that share their size with another one."""
    sized: dict[int, list[tuple[str, ImageRecord]]] = defaultdict(list)
    for split, annotated in sets.items():
        for record in annotated.images:
            sized[record.path.stat().st_size].append((split, record))
    members: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for entries in sized.values():
        if len({split for split, _ in entries}) > 1:
            for split, record in entries:
                members[sha256_file(record.path)][split].append(record.path.name)
    return members
