"""Bags and coordinates of other tools: what we write for STAMP and TRIDENT is read by the rules of
their readers, written out here; their own files go into our stages as they are.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from patch_encoder import convert_bags, convert_coordinates
from patch_encoder.bags.bag import open_bag, read_bag
from patch_encoder.bags.writer import write_bag
from patch_encoder.tiles.coordinates import read_coordinates
from tests.patch_encoder.extraction.conftest import cohort, extract, tiled  # noqa: F401  fixtures
from wsi_common.cli import run
from wsi_common.errors import UserError

CORNERS = np.array([[0, 0], [128, 0], [128, 256]])
GEOMETRY = {
    "name": "S1",
    "patch_size": 64,
    "patch_size_level0": 128,
    "patch_level": 1,
    "target_size": 64,
    "target_mpp": 0.5,
    "mpp": 0.25,
    "overlap": 0.0,
    "level0_width": 1000,
    "level0_height": 600,
}


def make_bags(root: Path, **geometry: object) -> Path:
    """The bag of one slide, 3 tiles of 5 features."""
    features = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float16)
    path = root / "features" / "tiny" / "h5_files" / "S1.h5"
    write_bag(path, features, CORNERS, GEOMETRY | geometry, {"encoder": "tiny"})
    return root / "features" / "tiny"


def convert(root: Path, to: str, *extra: str) -> int:
    keys = [f"features={root}/features/tiny", f"output={root}/{to}", f"to={to}", *extra]
    return run(convert_bags.main, convert_bags.Config, keys)


def read_as_stamp(path: Path) -> dict[str, Any]:
    """STAMP 2: `feats` and `coords` at the root, corners in um by `unit` and `tile_size_um`; the
    resolution of the tiles is `tile_size_um` by `tile_size_px`; files of tiles say feat_type=tile;
    a `stamp_version` above the reader's is refused, so there is none.
    """
    with h5py.File(path) as file:
        attributes = dict(file.attrs)
        assert attributes["feat_type"] == "tile" and "stamp_version" not in attributes
        assert attributes["unit"] == "um" and attributes["tile_size_um"] > 0
        features = torch.from_numpy(file["feats"][:]).float()
        corners = torch.from_numpy(file["coords"][:]).float()
        assert features.ndim == 2 and corners.shape == (len(features), 2)
    mpp = float(attributes["tile_size_um"]) / int(attributes["tile_size_px"])
    return {"features": features, "um": corners, "mpp": mpp, "extractor": attributes["extractor"]}


def read_as_trident(path: Path) -> dict[str, Any]:
    """TRIDENT's slide encoders: `features` (N, D) and `coords` at level 0, the tile's side at level
    0 in an attribute of `coords`; files lie in `features_<patch encoder>/<slide>.h5`.
    """
    with h5py.File(path) as file:
        features, corners = file["features"][:], file["coords"][:]
        attributes = dict(file["coords"].attrs)
        assert {"name", "savetodir"} <= set(file["features"].attrs)
    assert features.ndim == 2 and corners.dtype == np.int64 and len(corners) == len(features)
    side = attributes["patch_size"] * attributes["level0_magnification"]
    assert attributes["patch_size_level0"] == side // attributes["target_magnification"]
    assert (attributes["level0_width"], attributes["level0_height"]) == (1000, 600)
    return {
        "features": torch.from_numpy(features).float(),
        "corners": corners,
        "side": int(attributes["patch_size_level0"]),
        "encoder": path.parent.name.removeprefix("features_"),
    }


def test_stamp_reads_what_we_write(tmp_path: Path) -> None:
    bag = read_bag(make_bags(tmp_path) / "h5_files" / "S1.h5")
    assert convert(tmp_path, "stamp") == 0
    found = read_as_stamp(tmp_path / "stamp" / "S1.h5")
    assert torch.equal(found["features"], bag.features)
    assert found["um"].tolist() == (CORNERS * 0.25).tolist()
    assert (found["mpp"], found["extractor"]) == (0.5, "tiny")
    again = open_bag(tmp_path / "stamp" / "S1.h5")
    assert torch.equal(again.coords, bag.coords), "and we read it back"
    assert again.coordinates().geometry.patch_size_level0 == 128


def test_trident_reads_what_we_write(tmp_path: Path) -> None:
    bag = read_bag(make_bags(tmp_path) / "h5_files" / "S1.h5")
    assert convert(tmp_path, "trident") == 0
    found = read_as_trident(tmp_path / "trident" / "features_tiny" / "S1.h5")
    assert torch.equal(found["features"], bag.features)
    assert found["corners"].tolist() == CORNERS.tolist()
    assert (found["side"], found["encoder"]) == (128, "tiny")
    again = open_bag(tmp_path / "trident" / "features_tiny" / "S1.h5")
    assert again.coordinates().geometry == bag.coordinates().geometry


def test_again_keeps_and_another_bag_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bags(tmp_path)
    assert convert(tmp_path, "stamp") == 0
    path = tmp_path / "stamp" / "S1.h5"
    before = path.stat().st_mtime_ns
    assert convert(tmp_path, "stamp") == 0 and path.stat().st_mtime_ns == before
    make_bags(tmp_path, mpp=0.5)
    assert convert(tmp_path, "stamp") == 1
    assert "another bag" in (tmp_path / "stamp" / "failures.csv").read_text()
    assert convert(tmp_path, "stamp", "overwrite=true") == 0
    assert read_as_stamp(path)["um"].tolist() == (CORNERS * 0.5).tolist()


def test_a_bag_without_resolution_is_listed(tmp_path: Path) -> None:
    make_bags(tmp_path, mpp=0.0)
    assert convert(tmp_path, "stamp") == 1
    assert "um per pixel" in (tmp_path / "stamp" / "failures.csv").read_text()
    assert convert(tmp_path, "stamp", "mpp=0.25") == 0
    assert not (tmp_path / "stamp" / "failures.csv").exists()
    (tmp_path / "list.txt").write_text("S1\nS2\n")
    assert convert(tmp_path, "trident", "mpp=0.25", f"slides_list={tmp_path}/list.txt") == 1
    assert "S2,convert_bags" in (tmp_path / "trident" / "failures.csv").read_text()


def write_stamp(path: Path, corners: np.ndarray, **attributes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["coords"], file["feats"] = corners, np.ones((len(corners), 4), np.float16)
        file.attrs.update(attributes)
    return path


@pytest.mark.parametrize("unit", [{"unit": "um", "tile_size_um": 32.5}, {"tile_size_um": 32.5}])
def test_micrometres_of_stamp_are_never_taken_for_pixels(
    tmp_path: Path, unit: dict[str, object]
) -> None:
    corners = np.array([[0, 0], [32.5, 0], [65, 97.5]], np.float32)
    path = write_stamp(tmp_path / "S1.h5", corners, tile_size_px=64, **unit)
    bag = open_bag(path)
    assert bag.coords is None and bag.shape == (3, 4), "features serve without places"
    with pytest.raises(UserError, match="coords in um .* convert_coordinates"):
        bag.coordinates()
    with pytest.raises(UserError, match="coords in um .* convert_coordinates"):
        read_coordinates(path)
    path = write_stamp(tmp_path / "S2.h5", corners, tile_size_px=64, mpp=0.5, **unit)
    assert open_bag(path).coords.tolist() == [[0, 0], [65, 0], [130, 195]]
    assert read_coordinates(path).coords.tolist() == [[0, 0], [65, 0], [130, 195]]
    assert read_coordinates(path).geometry.patch_size_level0 == 65
    path = write_stamp(tmp_path / "S3.h5", corners + 0.25)
    with pytest.raises(UserError, match="expected whole numbers"):
        open_bag(path)


def test_the_folder_of_trident_goes_into_extraction(cohort: Path) -> None:  # noqa: F811
    keys = [f"input={cohort}/tiles", f"output={cohort}/trident", "to=trident"]
    keys.append(f"slides={cohort}/slides")
    assert run(convert_coordinates.main, convert_coordinates.Config, keys) == 0
    assert (cohort / "trident" / "patches" / "S001_patches.h5").is_file()
    with h5py.File(cohort / "trident" / "patches" / "S000_patches.h5", "a") as file:
        del file["coords"].attrs["tile_geometry"]  # which TRIDENT itself does not write
    for folder in ("trident", "trident/patches"):
        assert extract(cohort, f"coords={cohort}/{folder}", f"output={cohort}/f") == 0
        bag = open_bag(cohort / "f" / "mean_colour" / "h5_files" / "S001.h5")
        assert bag.coords is not None
        shutil.rmtree(cohort / "f")
    assert extract(cohort) == 0
    own = open_bag(cohort / "features" / "mean_colour" / "h5_files" / "S001.h5")
    assert torch.equal(own.coords, bag.coords)
