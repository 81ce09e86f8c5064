"""The whole main road on real pictures."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.quickstart.runs import FEATURE_SETS, SMALL, finish

COHORT = "train_slides=6 val_slides=4 test_slides=4 tiles_per_slide=16"
FIELDS = {"train": 24, "val": 20, "test": 20}  # of 205, 87 and 72: as many as the slides take


def some_fields(data: Path, folder: Path) -> Path:
    """The real pictures and boxes, of which the lists name a part."""
    lists = folder / "bccd" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for name in ("JPEGImages", "coco_derived.json"):
        (folder / "bccd" / name).symlink_to(data / "bccd" / name)
    for split, count in FIELDS.items():
        names = (data / "bccd" / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
        (lists / f"{split}.txt").write_text("\n".join(names[:count]) + "\n")
    return folder


@pytest.mark.process
def test_real_pictures(warm_python: Path, real_data: Path, tmp_path: Path) -> None:
    """Blood smear fields: slides composed of 128 px tiles, the white blood cell as the lesion."""
    detector = "epochs=1 batch_size=8 augmentation.sizes=[96] architecture.decoder_layers=1"
    settings = {"COHORT": COHORT, "DETECTOR": detector, "MIL": f"{SMALL['MIL']} isolated=false"}
    data = some_fields(real_data, tmp_path / "data")
    summary = finish(warm_python, tmp_path / "bccd", {"DATA": str(data), **settings})
    assert set(summary["feature_sets"]) == FEATURE_SETS
    tiles = list((tmp_path / "bccd" / "cohort" / "slides").rglob("*.[jp][pn]g"))
    assert len(tiles) == 14 * 16


def some_cervical_fields(data: Path, folder: Path) -> Path:
    """Four real fields of each of 20 normal and 10 abnormal originals, in another tree."""
    folder.mkdir()
    taken: Counter[str] = Counter()
    for kind, most in (("NL", 20), ("HSIL", 10)):
        for path in sorted((data / "lbc_pap" / kind).glob("*.jpg")):
            original = path.name.split("(")[0]
            known = sum(name.startswith(kind) for name in taken)
            if taken[original] < 4 and (taken[original] or known < most):
                taken[original] += 1
                (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.process
def test_cervical_fields(warm_python: Path, real_data: Path, tmp_path: Path) -> None:
    """Labelled fields without boxes: slides without a common original, weak boxes, and the table
    that says how far colour goes.
    """
    settings = {
        "DATA": str(some_cervical_fields(real_data, tmp_path / "data")),
        "FIELDS": "train_share=0.4",
        "COHORT": "tiles_per_slide=4 columns=2 train_slides=6 test_slides=8",
        "DETECTOR": "epochs=1 batch_size=8 augmentation.sizes=[96] architecture.decoder_layers=1",
        "MIL": f"{SMALL['MIL']} isolated=false",
    }
    run = tmp_path / "cervical"
    summary = finish(warm_python, run, settings)
    assert set(summary["feature_sets"]) == {*FEATURE_SETS, "colour_statistics", "sharpness"}
    with (run / "cohort" / "tiles.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    slides = {row["original"]: row["slide_id"] for row in rows}
    assert len(rows) == 14 * 4 and all(slides[r["original"]] == r["slide_id"] for r in rows)
    boxes = json.loads((run / "cohort" / "detection" / "train.json").read_text())
    assert [category["name"] for category in boxes["categories"]] == ["enlarged_nucleus"]
    assert boxes["annotations"], "abnormal fields have weak boxes"
