"""Every problem of a distillation set in one line and one table, before training; and training
without the bad pairs.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection_kd import train_d2vfm
from detection_kd.datasets.distillation import digest_pairs, read_pairs
from tests.detection_kd.d2vfm_runs import write_backbone
from tests.detection_kd.distillation_sets import (
    SIDE,
    read_listing,
    write_listing,
    write_set,
)
from wsi_common.cli import run
from wsi_common.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", slides=4, tiles=4)


def break_everything(root: Path) -> set[tuple[str, str, str]]:
    """One fault of every kind; returns (slide, patch, kind) of each."""
    pictures = root / "wsi_root"
    (pictures / "S0" / "0_0.png").unlink()
    (pictures / "S0" / "1_0.pt").unlink()
    (pictures / "S0" / "2_0.png").write_bytes(b"no picture")
    torch.save(torch.full((151,), float("nan")), pictures / "S1" / "0_1.pt")
    torch.save(torch.zeros(150), pictures / "S1" / "1_1.pt")
    (pictures / "S1" / "2_1.pt").write_text("no tensor")
    torch.save(torch.zeros(1, 151), pictures / "S1" / "3_1.pt")
    Image.new("RGB", (SIDE, SIDE + 1)).save(pictures / "S2" / "0_2.png")
    torch.save(torch.zeros(151), pictures / "S2" / "9_9.pt")
    shutil.copy(pictures / "S2" / "1_2.png", pictures / "S2" / "8_8.png")
    (pictures / "S2" / ".7_7.png.host.1.tmp").write_bytes(b"left by a killed process")
    Image.new("RGB", (SIDE, 2 * SIDE)).save(pictures / "S2" / "2_2.png")
    images = read_listing(root)
    for image in images:
        if image["file_name"] == "S2/2_2.png":
            image["height"] = 2 * SIDE
    write_listing(root, [*images, images[-1], {"file_name": "../set/ann.json"}, {"id": 7}])
    return {
        ("S0", "0_0", "missing picture"), ("S0", "1_0", "missing feature"),
        ("S0", "2_0", "undecodable picture"),
        ("S1", "0_1", "not finite"), ("S1", "1_1", "other width"), ("S1", "2_1", "unreadable "
                                                                                 "feature"),
        ("S1", "3_1", "unreadable feature"), ("S2", "0_2", "listing disagrees"),
        ("S2", "9_9", "feature without picture"),
        ("S2", "8_8", "not listed"), ("S2", "2_2", "other size"), ("S3", "3_3", "duplicate"),
        ("", "../set/ann.json", "bad entry"), ("", "None", "bad entry"),
    }  # fmt: skip


def test_every_problem_is_told_at_once(folder: Path, tmp_path: Path) -> None:
    expected, report = break_everything(folder), tmp_path / "run" / "problems.csv"
    with pytest.raises(UserError) as caught:
        read_pairs(folder, report=report)
    message = str(caught.value)
    assert (
        message.startswith(f"{folder}: 14 problems (2 ")
        and f"all in {report}; first: " in message
        and "\n" not in message
    )
    assert (
        "2 unreadable feature" in message
        and "1 missing picture" in message
        and "skip_bad=true" in message
    )
    with report.open() as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["slide"], row["patch"], row["kind"]) for row in rows} == expected
    assert len(rows) == len(expected) and all(row["detail"] for row in rows)


def test_the_good_pairs_can_be_trained_on(folder: Path, tmp_path: Path) -> None:
    whole = read_pairs(folder)
    break_everything(folder)
    backbone, output = write_backbone(tmp_path / "backbone.pt"), tmp_path / "run"
    arguments = [
        f"dataset={folder}",
        f"backbone={backbone}",
        f"output={output}",
        "device=cpu",
        "workers=0",
        "precision=fp32",
        "figures=false",
    ]
    arguments += ["epochs=1", "batch_size=4"]
    assert run(train_d2vfm.main, train_d2vfm.Config, arguments) == 2
    assert (
        len((output / "problems.csv").read_text().splitlines()) == 15
        and not (output / "run.json").exists()
    )
    assert run(train_d2vfm.main, train_d2vfm.Config, [*arguments, "skip_bad=true"]) == 0
    bad = {
        (row["slide"], row["patch"])
        for row in csv.DictReader((output / "problems.csv").read_text().splitlines())
    } - {("S3", "3_3")}
    left = [pair for pair in whole if (pair.slide_id, pair.image.stem) not in bad]
    assert len(left) == 7 and digest_pairs(read_pairs(folder, skip_bad=True)) == digest_pairs(left)


def test_mended_sets_lose_their_table(folder: Path, tmp_path: Path) -> None:
    feature, report = folder / "wsi_root" / "S0" / "0_0.pt", tmp_path / "problems.csv"
    content = feature.read_bytes()
    feature.unlink()
    with pytest.raises(UserError, match=r"1 problems \(1 missing feature\)"):
        read_pairs(folder, report=report)
    feature.write_bytes(content)
    assert len(read_pairs(folder, report=report)) == 16 and not report.exists()


def test_a_picture_cut_short_is_found_when_all_are_decoded(folder: Path) -> None:
    picture = folder / "wsi_root" / "S1" / "1_1.png"
    picture.write_bytes(picture.read_bytes()[:-400])
    assert len(read_pairs(folder)) == 16, "its header is whole"
    with pytest.raises(UserError, match=r"1 undecodable picture.*S1/1_1\.png"):
        read_pairs(folder, verify=True)


def test_nothing_usable_is_refused_even_with_skip_bad(folder: Path) -> None:
    for feature in folder.glob("wsi_root/*/*.pt"):
        feature.unlink()
    with pytest.raises(UserError, match="16 problems .*no pair is left"):
        read_pairs(folder, skip_bad=True)
    write_listing(folder, [])
    with pytest.raises(UserError, match="expected a COCO-style file with images"):
        read_pairs(folder, skip_bad=True)


def test_half_precision_and_integer_features(folder: Path) -> None:
    feature = folder / "wsi_root" / "S0" / "0_0.pt"
    torch.save(torch.linspace(0, 1, 151).half(), feature)
    assert read_pairs(folder)[0].feature.dtype == torch.float32
    torch.save(torch.arange(151), feature)
    with pytest.raises(UserError, match="vector .* of floats, found torch.int64"):
        read_pairs(folder)


def test_a_picture_that_is_a_bomb_is_a_problem(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match="16 undecodable picture"):
        read_pairs(folder)


def test_grey_and_transparent_tiles_become_rgb(folder: Path) -> None:
    from detection_kd.datasets.distillation import DistillationTiles

    Image.fromarray(np.full((SIDE, SIDE), 90, np.uint8)).save(
        folder / "wsi_root" / "S0" / "0_0.png"
    )
    tile, _ = DistillationTiles(read_pairs(folder), augment=False, seed=0)[0]
    assert tile.shape == (3, SIDE, SIDE) and (tile == 90).all()
