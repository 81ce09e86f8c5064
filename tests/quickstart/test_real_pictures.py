"""The main road on real pictures: blood smears up to their tiles, cervical fields whole."""

from __future__ import annotations

import csv
import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.quickstart.runs import FEATURE_SETS, SMALL, finish, printed, start
from wsi_common.config import load_config

COHORT = "train_slides=6 val_slides=4 test_slides=4 tiles_per_slide=16"
FIELDS = {"train": 24, "val": 20, "test": 20}  # of 205, 87 and 72: as many as the slides take
TRAINED = (
    "detection_kd.train_detector",
    "mil.rank_patches",
    "detection_kd.train_d2vfm",
    "detection_kd.extract_student",
    "studies.measure_encoders",
    "mil.benchmark",
    "mil.report",
)


def some_fields(data: Path, folder: Path) -> Path:
    """The folders of the published set, of which the lists name a part."""
    lists = folder / "bccd" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for name in ("JPEGImages", "Annotations"):
        (folder / "bccd" / name).symlink_to(data / "bccd" / name)
    for split, count in FIELDS.items():
        names = (data / "bccd" / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
        (lists / f"{split}.txt").write_text("\n".join(names[:count]) + "\n")
    return folder


@pytest.mark.process
def test_blood_smears(warm_python: Path, real_data: Path, tmp_path: Path) -> None:
    """Slides composed of 128 px tiles, the white blood cell as the lesion. Later stages are not
    run, as cervical fields take all of them; what they are started with has to be right.
    """
    python, started = record_stages(warm_python, tmp_path)
    run, data = tmp_path / "bccd", some_fields(real_data, tmp_path / "data")
    process = start(python, run, {"DATA": str(data), "COHORT": COHORT, "DETECTOR": ""})
    assert process.wait(timeout=300) == 0, printed(run)
    tiles = list((run / "cohort" / "slides").rglob("*.[jp][pn]g"))
    assert len(tiles) == 14 * 16
    assert len(list((run / "tiles" / "coords").glob("*.h5"))) == 14
    stages = [line.split("\t") for line in started.read_text().splitlines()]
    assert [name for name, *_ in stages] == [*["patch_encoder.extract_features"] * 3, *TRAINED]
    configs = {name: keys_of(name, keys) for name, *keys in stages}
    assert not configs["detection_kd.train_detector"].class_agnostic, "its three kinds of cells"
    assert configs["mil.rank_patches"].subset == "train"
    benchmark = configs["mil.benchmark"]
    assert (benchmark.protocol, benchmark.subset) == ("fixed", "")
    assert {Path(folder).name for folder in benchmark.features} == FEATURE_SETS


def record_stages(python: Path, folder: Path) -> tuple[Path, Path]:
    """A program that runs the stages before features and notes what the others get, one per line:
    module and keys between tabs.
    """
    program, started = folder / "recorder", folder / "started.tsv"
    program.write_text(
        f"""#!/usr/bin/env bash
stage=("$@")
if [[ "$2" == wsi_common.stage_timer ]]; then stage=("${{@:7}}"); fi
case "${{stage[1]}}" in
  patch_encoder.extract_features|{"|".join(TRAINED)})
    (IFS=$'\\t' && echo "${{stage[*]:1}}") >> {started} ;;
  *) exec {python} "$@" ;;
esac
"""
    )
    program.chmod(0o755)
    return program, started


def keys_of(module: str, arguments: list[str]) -> Any:
    """The settings that a stage was started with; its paths are those of stages that did not run."""
    config = importlib.import_module(module).Config
    return load_config(config, arguments, check_paths=False)


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
