"""Every kind of slide through tiling and extraction in one cohort: the pixels that were encoded are
those of the source.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from patch_encoder import extract_features, tile_slides
from patch_encoder.bags.bag import read_bag
from patch_encoder.descriptors.mean_colour import mean_colour
from patch_encoder.tiles.coordinates import coordinate_attributes, read_coordinates
from tests.helpers import draw_slide, write_pyramid
from wsi_common.cli import run

PATTERN = "tile_x{x}_y{y}.png"


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """The same drawing as a pyramid, a picture, an OME-TIFF in strips and a folder of tiles."""
    pixels, slides = draw_slide(256), tmp_path / "slides"
    write_pyramid(slides / "pyramid.tif", pixels)
    Image.fromarray(pixels).save(slides / "picture.png")
    tifffile.imwrite(
        slides / "strips.ome.tif", pixels, photometric="rgb", rowsperstrip=16, compression="zlib"
    )
    (slides / "folder").mkdir()
    for x in range(0, 256, 64):
        for y in range(0, 256, 64):
            Image.fromarray(pixels[y : y + 64, x : x + 64]).save(
                slides / "folder" / PATTERN.format(x=x, y=y)
            )
    lines = [f"{name},{name},a,0.5" for name in ("pyramid", "picture", "strips", "folder")]
    (tmp_path / "labels.csv").write_text("\n".join(["case_id,slide_id,label,mpp", *lines]) + "\n")
    return tmp_path


def tile(root: Path, *extra: str) -> int:
    keys = [
        f"slides={root}/slides",
        f"output={root}/tiles",
        f"labels={root}/labels.csv",
        f"tile_pattern={PATTERN}",
    ]
    return run(
        tile_slides.main,
        tile_slides.Config,
        [*keys, "tile_size=64", "method=none", "workers=1", *extra],
    )


def test_all_kinds_give_the_same_features(cohort: Path) -> None:
    assert tile(cohort) == 0
    keys = [
        f"slides={cohort}/slides",
        f"coords={cohort}/tiles",
        f"labels={cohort}/labels.csv",
        f"output={cohort}/features",
    ]
    keys += ["encoder=mean_colour", "device=cpu", "precision=fp32", "workers=0"]
    assert run(extract_features.main, extract_features.Config, keys) == 0
    pixels = draw_slide(256)
    for name in ("pyramid", "picture", "strips", "folder"):
        bag = read_bag(cohort / "features" / "mean_colour" / "h5_files" / f"{name}.h5")
        assert bag.coords is not None and len(bag.coords) == 16
        expected = [mean_colour(pixels[y : y + 64, x : x + 64]) for x, y in bag.coords.tolist()]
        assert np.allclose(bag.features, np.stack(expected), atol=1e-6)
        assert bag.attributes["tile_pattern"] == (PATTERN if name == "folder" else ""), (
            "only where it decides the pixels"
        )


def test_step_and_pad_reach_the_grid_and_the_settings(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tile(cohort) == 0
    plain = read_coordinates(cohort / "tiles" / "coords" / "pyramid.h5")
    settings = json.loads(
        coordinate_attributes(cohort / "tiles" / "coords" / "pyramid.h5")["settings"]
    )
    assert settings["pad"] is False and settings["step"] is None and "pictures" not in settings
    assert tile(cohort, "pad=true", "step=48") == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert tile(cohort, "pad=true", "step=48", "overwrite=true") == 0
    padded = read_coordinates(cohort / "tiles" / "coords" / "pyramid.h5")
    assert (plain.coords.max(), padded.coords.max(), padded.geometry.step) == (192, 192, 48)
    assert tile(cohort, "pad=true", "step=60", "overwrite=true") == 0
    assert read_coordinates(cohort / "tiles" / "coords" / "pyramid.h5").coords.max() == 240
    assert tile(cohort, "step=0", "overwrite=true") == 1, "each slide says what is wrong"
