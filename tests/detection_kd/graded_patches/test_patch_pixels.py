"""Pixels of patches: pictures reduced by area, windows of slides, kept or read on demand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection_kd.graded_patches import patch_pixels
from detection_kd.graded_patches.graded_set import GradedSet
from detection_kd.graded_patches.labelled_tiles import read_labelled_tiles
from detection_kd.graded_patches.patch_pixels import PatchPixels
from detection_kd.graded_patches.resolution import reduce_resolution
from patch_encoder.demo.pyramid import write_pyramid
from wsi_common.errors import UserError


def write_pictures(root: Path, side: int, count: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (side, side, 3), np.uint8) for _ in range(count)]
    for number, picture in enumerate(pictures):
        folder = root / ("low", "high")[number % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number}.png")
    return pictures


def read_set(root: Path) -> GradedSet:
    return read_labelled_tiles(root, ["low", "high"])


def test_pictures_of_the_asked_size_are_read_as_they_are(tmp_path: Path):
    pictures = write_pictures(tmp_path, 12)
    pixels = PatchPixels(read_set(tmp_path), 12)
    order = [int(patch.path.stem) for patch in pixels.patches.patches]
    found = pixels.read(np.array([2, 0]))
    assert pixels.patches.names[0] == f"{order[0]}.png"
    assert found.shape == (2, 3, 12, 12) and found.dtype == torch.uint8
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), pictures[order[2]])


def test_larger_pictures_are_averaged(tmp_path: Path):
    pictures = write_pictures(tmp_path, 12)
    pixels = PatchPixels(read_set(tmp_path), 4)
    first = pictures[int(pixels.patches.patches[0].path.stem)]
    wanted = reduce_resolution(torch.from_numpy(first).permute(2, 0, 1)[None].float(), 3)
    # Pillow rounds after each of the two axes
    assert (pixels.read(np.array([0])).float() - wanted).abs().max() <= 1


def test_a_set_that_does_not_fit_is_read_on_demand(tmp_path, monkeypatch: pytest.MonkeyPatch):
    write_pictures(tmp_path, 12)
    kept = PatchPixels(read_set(tmp_path), 6)
    monkeypatch.setattr(patch_pixels, "KEPT_BYTES", 100)
    read = PatchPixels(read_set(tmp_path), 6)
    assert kept.in_memory and not read.in_memory
    numbers = np.array([4, 1, 1])
    assert torch.equal(kept.read(numbers), read.read(numbers))


def test_windows_of_slides_are_read_at_their_resolution(tmp_path: Path):
    """The student's pixels are the slide's own level, or the mean of the teacher's."""
    picture = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    write_pyramid(tmp_path / "slides" / "s1.tiff", picture, 0.5, "test")
    table = tmp_path / "places.csv"
    table.write_text("slide_id,x,y,label\ns1,64,128,low\ns1,256,0,high\n")
    sets = [
        read_labelled_tiles(table, ["low", "high"], slides=tmp_path / "slides", mpp=mpp)
        for mpp in (0.5, 1.0)
    ]
    fine, coarse = (PatchPixels(own, side) for own, side in zip(sets, (64, 32)))
    assert np.array_equal(
        fine.read(np.array([0]))[0].permute(1, 2, 0).numpy(), picture[128:192, 64:128]
    )
    mean = reduce_resolution(fine.read(np.array([0, 1])).float(), 2)
    assert (coarse.read(np.array([0, 1])).float() - mean).abs().max() <= 0.51
    # a table of predictions says where each of them is
    assert sets[0].names == ["s1.tiff:64,128", "s1.tiff:256,0"]
    assert sets[0].patches[1].position == (256, 0) and sets[0].slides.tolist() == ["s1", "s1"]


def test_places_need_slides_and_a_resolution(tmp_path: Path):
    table = tmp_path / "places.csv"
    table.write_text("slide_id,x,y,label\ns1,64,128,low\ns1,256,0,high\n")
    with pytest.raises(UserError, match="expected slides= and mpp= to cut them, found slides=noth"):
        read_labelled_tiles(table)
    write_pyramid(tmp_path / "slides" / "s2.tiff", np.zeros((256, 256, 3), np.uint8), 0.5, "test")
    with pytest.raises(UserError, match="1 missing, first 's1'"):
        read_labelled_tiles(table, slides=tmp_path / "slides", mpp=1.0)


def test_pictures_that_were_drawn_anew_are_other_inputs(tmp_path: Path):
    """Also where their files have the size that they had."""
    write_pictures(tmp_path, 12)
    for path in tmp_path.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    patches = read_set(tmp_path)
    before, again = (PatchPixels(patches, 6).digest() for _ in range(2))
    path = patches.patches[0].path
    size = path.stat().st_size
    Image.new("RGB", (12, 12), (1, 2, 3)).save(path)
    assert path.stat().st_size == size
    assert before == again != PatchPixels(patches, 6).digest()


@pytest.mark.parametrize("corner", ["256,0", "0,900", "-1,0"])
def test_places_beyond_a_slide_are_no_glass(tmp_path: Path, corner: str):
    table = tmp_path / "places.csv"
    table.write_text(f"slide_id,x,y,label\ns1,64,128,low\ns1,{corner},high\n")
    write_pyramid(tmp_path / "slides" / "s1.tiff", np.zeros((256, 256, 3), np.uint8), 0.5, "test")
    patches = read_labelled_tiles(table, slides=tmp_path / "slides", mpp=0.5)
    x, y = corner.split(",")
    with pytest.raises(UserError, match=f"s1.tiff: expected .*256 x 256.*found x={x}, y={y}; mend"):
        PatchPixels(patches, 64)


def test_pictures_that_cannot_be_used_are_named(tmp_path: Path):
    write_pictures(tmp_path, 12)
    patches = read_set(tmp_path)
    with pytest.raises(UserError, match=r"\d.png: expected a square.*at least 16 px.*12 x 12"):
        PatchPixels(patches, 16)
    Image.new("RGB", (20, 16)).save(tmp_path / "low" / "0.png")
    with pytest.raises(UserError, match="0.png: expected a square.*found 20 x 16"):
        PatchPixels(patches, 12)
    (tmp_path / "low" / "0.png").write_text("no picture")
    with pytest.raises(UserError, match="0.png: expected a picture"):
        PatchPixels(patches, 12)
    (tmp_path / "low" / "0.png").unlink()
    with pytest.raises(UserError, match=r"0.png: expected the file.*\(1 of 5 files are missing\)"):
        PatchPixels(patches, 12)
