"""The whole main road on real pictures."""

from __future__ import annotations

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
