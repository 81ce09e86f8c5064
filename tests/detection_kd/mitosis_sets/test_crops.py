"""Crops of single mitotic figures: the real table of AMi-Br and the real stack of MIDOG 2025."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from detection_kd.mitosis_sets.crops import read_atypical_crops, read_crop_stack
from wsi_common.errors import UserError

HEADER = ",slide,dataset,uid,x,y,majority_atypical\n"


def write_crop(path: Path, black: int = 0) -> None:
    pixels = np.full((128, 128, 3), 150, np.uint8)
    pixels[:, :black] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_crops_have_label_and_slide_and_cut_ones_are_left_out(tmp_path: Path) -> None:
    table = tmp_path / "AMI-BR_MIDOG21.csv"
    table.write_text(
        f"{HEADER}0,002.tiff,MIDOG21,6,1,2,False\n1,002.tiff,MIDOG21,7,1,2,True\n"
        "2,003.tiff,MIDOG21,8,1,2,True\n"
    )
    write_crop(tmp_path / "patches/normal/MIDOG21_6.png")
    write_crop(tmp_path / "patches/atypical/MIDOG21_7.png")
    write_crop(tmp_path / "patches/atypical/MIDOG21_8.png", black=3)
    crops = read_atypical_crops(table, tmp_path / "patches")
    assert [(crop.path.name, crop.slide, crop.atypical) for crop in crops] == [
        ("MIDOG21_6.png", "002.tiff", False),
        ("MIDOG21_7.png", "002.tiff", True),
    ]
    table.write_text(f"{HEADER}0,002.tiff,MIDOG21,9,1,2,False\n")
    with pytest.raises(UserError, match="line 2: expected its crop .*MIDOG21_9.png, found none"):
        read_atypical_crops(table, tmp_path / "patches")
    table.write_text(f"{HEADER}0,002.tiff,MIDOG21,6,1,2,maybe\n")
    with pytest.raises(UserError, match="line 2: expected True or False, found 'maybe'"):
        read_atypical_crops(table, tmp_path / "patches")


def test_the_real_crops_have_their_published_counts(real_data: Path) -> None:
    folder = real_data / "amibr_midog21"
    crops = read_atypical_crops(folder / "AMI-BR_MIDOG21.csv", folder / "patches")
    assert len(crops) == 1_721 - 60  # 60 are cut by the border of their image
    assert sum(crop.atypical for crop in crops) <= 404
    assert len({crop.slide for crop in crops}) <= 135


def test_the_real_stack_has_16_crops(real_data: Path) -> None:
    crops = read_crop_stack(real_data / "midog25_t2_stack/stack_5.tiff")
    assert crops.shape == (16, 128, 128, 3) and crops.dtype == np.uint8
    assert (crops.std(axis=(1, 2, 3)) > 10).all()


def test_a_stack_of_one_page_is_read_and_other_pages_are_refused(tmp_path: Path) -> None:
    stack = tmp_path / "stack.tiff"
    tifffile.imwrite(stack, np.full((128, 128, 3), 9, np.uint8), photometric="rgb")
    assert read_crop_stack(stack).shape == (1, 128, 128, 3)
    tifffile.imwrite(stack, np.zeros((2, 64, 64, 3), np.uint8), photometric="rgb")
    with pytest.raises(UserError, match=r"page 1: expected 128 x 128 px of 8-bit RGB, found \(64"):
        read_crop_stack(stack)
    stack.write_text("no picture")
    with pytest.raises(UserError, match="expected a TIFF with one crop per page, found"):
        read_crop_stack(stack)
