"""Turn labelled microscope fields without boxes into what `compose_cohort` and a detector read.

    python -m patch_encoder.demo.label_fields --config configs/quickstart/cervical_fields.yaml
        fields=data/lbc_pap output=runs/cervical/fields

Every picture is resized and cut to its middle (sources that were augmented have streaks along the
borders), and its colours are changed as `look` says. An abnormal field gets a box around all of it,
from which a composed slide has its lesion, and *weak* boxes around its enlarged nuclei for the
detector: compact dark bodies larger than most of those in the normal fields of split train. Nobody
has drawn these boxes. A normal field has none, which is certain.

Written: images/*.png, annotations.json (COCO, with the original of each picture), fields.csv (for
`probe_tiles`), lists/{train,val,test}.txt and cohort.json. Originals, and pictures that look alike,
stay on one side of the lists.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from patch_encoder.demo.cohort_folder import claim_folder, make_coco_document
from patch_encoder.demo.composition.composed_slides import SPLITS
from patch_encoder.demo.composition.field_pictures import (
    LOOKS,
    Box,
    balance_light,
    change_look,
    find_dark_bodies,
    hash_picture,
    read_field,
)
from patch_encoder.demo.composition.labelled_fields import (
    LabelledField,
    find_fields,
    merge_duplicates,
    split_originals,
)
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, identity, key
from wsi_common.errors import UserError
from wsi_common.files import atomic_path, sha256_bytes, write_csv, write_json, write_text
from wsi_common.progress import progress

FIELD, NUCLEUS = "abnormal_field", "enlarged_nucleus"
MARGIN = 2
"""Pixels that a weak box is wider than its body on each side."""
logger = logging.getLogger(__name__)
Body = tuple[int, Box]


@dataclass
class Config:
    """Keys of the script."""

    output: str = key(REQUIRED, "where the results are written; pictures and boxes", runtime=True)
    fields: str = key(
        REQUIRED, "folder tree of pictures; labelled, <kind>_<original> (<number>).jpg", path=True
    )
    normal_kinds: list[str] = key(["NL"], "kinds without a lesion; all others are abnormal")
    size: list[int] = key([512, 384], "width and height that pictures are resized to, px")
    middle: int = key(256, "side of the middle part that is kept, px", least=32)
    look: str = key(
        "reinhard",
        "colours; reinhard or macenko: light balanced and stain normalised; grey: light balanced, "
        "without colour; none: as they are",
        choices=LOOKS,
    )
    enlarged: float = key(
        0.9,
        "share of the dark bodies in normal fields of split train that are smaller than an "
        "enlarged nucleus",
    )
    smallest_body: int = key(40, "area below which a dark body counts as dirt, px", least=1)
    train_share: float = key(0.3, "share of each kind's originals in split train")
    val_share: float = key(0.1, "share of each kind's originals in split val")
    seed: int = key(0, "seed of everything that is drawn at random", least=0)
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def check(config: Config) -> None:
    """Raise UserError on settings that make no set of fields."""
    if len(config.size) != 2 or min(config.size) < config.middle:
        raise UserError(
            f"size={config.size}: expected a width and height of middle={config.middle} px or more"
        )
    shares = (config.train_share, config.val_share)
    if min(shares) <= 0 or sum(shares) >= 1 or not 0 < config.enlarged < 1:
        raise UserError(
            f"train_share={shares[0]:g} val_share={shares[1]:g} enlarged={config.enlarged:g}: "
            "expected shares between 0 and 1, and the first two below 1 together"
        )


def is_normal(config: Config, field: LabelledField) -> bool:
    """Whether the field's label says that it has no lesion."""
    return field.kind in {kind.upper() for kind in config.normal_kinds}


def check_kinds(config: Config, chosen: dict[str, list[LabelledField]]) -> None:
    """Raise UserError where a split lacks normal or abnormal fields."""
    for split, fields in chosen.items():
        found = {field.kind for field in fields}
        if len({is_normal(config, field) for field in fields}) < 2:
            raise UserError(
                f"split {split}: expected fields of normal_kinds={config.normal_kinds} and of "
                f"others, found {sorted(found) or 'none'}; change the shares or normal_kinds"
            )


def measure_limit(
    config: Config, bodies: dict[Path, list[Body]], train: list[LabelledField]
) -> int:
    """The area from which a body counts as an enlarged nucleus, px."""
    areas = [area for f in train if is_normal(config, f) for area, _ in bodies[f.path]]
    if not areas:
        raise UserError(
            "split train: expected dark bodies in its normal fields, found none; lower "
            f"smallest_body={config.smallest_body}"
        )
    return int(np.quantile(areas, config.enlarged))


def list_boxes(
    config: Config, field: LabelledField, bodies: list[Body], limit: int
) -> list[tuple[str, Box]]:
    """Boxes of one field: none, or all of it and its enlarged nuclei."""
    side = config.middle
    if is_normal(config, field):
        return []
    nuclei = [
        (max(x0 - MARGIN, 0), max(y0 - MARGIN, 0), min(x1 + MARGIN, side), min(y1 + MARGIN, side))
        for area, (x0, y0, x1, y1) in bodies
        if area > limit
    ]
    return [(FIELD, (0, 0, side, side)), *((NUCLEUS, box) for box in nuclei)]


def prepare_pictures(
    config: Config, root: Path, found: list[LabelledField]
) -> tuple[dict[Path, list[Body]], np.ndarray]:
    """Write the pictures that are missing; the dark bodies of each by its source, and the hashes
    (N, 256) of all.
    """
    bodies, hashes = {}, []
    for field in progress(found, "fields", len(found), "field"):
        picture = read_field(field.path, config.size, config.middle)
        bodies[field.path] = find_dark_bodies(balance_light(picture), config.smallest_body)
        hashes.append(hash_picture(picture))
        target = root / "images" / field.file_name
        if not target.is_file():
            with atomic_path(target) as temporary:
                Image.fromarray(change_look(picture, config.look)).save(temporary, "PNG")
    return bodies, np.array(hashes)


def write_tables(
    config: Config,
    root: Path,
    fields: list[LabelledField],
    boxes: list[list[tuple[str, Box]]],
    chosen: dict[str, list[LabelledField]],
) -> None:
    """Write fields.csv, the lists and annotations.json."""
    images = [(field.file_name, config.middle, config.middle) for field in fields]
    document = make_coco_document(images, boxes, [FIELD, NUCLEUS])
    for image, field in zip(document["images"], fields, strict=True):
        image |= {"original": field.original, "kind": field.kind}
    rows = [
        {
            "image": f"images/{field.file_name}",
            "label": "normal" if is_normal(config, field) else "abnormal",
            "group": field.original,
        }
        for field in fields
    ]
    write_csv(root / "fields.csv", ("image", "label", "group"), rows)
    for split in SPLITS:
        names = [Path(field.file_name).stem for field in chosen[split]]
        write_text(root / "lists" / f"{split}.txt", "\n".join(names) + "\n")
    # last: a set counts as finished once it is there
    write_json(root / "annotations.json", document)


def is_finished(root: Path, found: list[LabelledField]) -> bool:
    """Whether nothing is missing in a set of these settings."""
    tables = [root / "annotations.json", root / "fields.csv"]
    tables += [root / "lists" / f"{split}.txt" for split in SPLITS]
    pictures = [root / "images" / field.file_name for field in found]
    return all(path.is_file() for path in (*tables, *pictures))


def main(config: Config) -> int:
    """Measure all fields, then write pictures, boxes and lists."""
    check(config)
    root = Path(config.output)
    found = find_fields(Path(config.fields))
    lines = [f"{field.path.name} {field.path.stat().st_size}" for field in found]
    settings = {**identity(config), "inputs": sha256_bytes("\n".join(lines).encode())}
    claim_folder(root, "label_fields", settings, config.overwrite)
    if is_finished(root, found):
        logger.info("%s: %d fields, all done already", root, len(found))
        return 0
    bodies, hashes = prepare_pictures(config, root, found)
    fields, pairs = merge_duplicates(found, hashes)
    shares = {"train": config.train_share, "val": config.val_share}
    chosen = split_originals(fields, shares, config.seed)
    check_kinds(config, chosen)
    limit = measure_limit(config, bodies, chosen["train"])
    boxes = [list_boxes(config, field, bodies[field.path], limit) for field in fields]
    write_tables(config, root, fields, boxes, chosen)
    nuclei = sum(name == NUCLEUS for own in boxes for name, _ in own)
    line = "%s: %d fields of %d originals, %d pairs alike between originals; nuclei above %d px: %d"
    logger.info(line, root, len(fields), len({f.original for f in fields}), pairs, limit, nuclei)
    return 0


if __name__ == "__main__":
    launch(main, Config)
