"""Bags to one vector per slide: files that everybody reads, the right bags only, and resume."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mil import benchmark
from mil.training.bag_record import read_tiling
from patch_encoder import encode_slides, extract_regions
from patch_encoder.bags.bag import open_bag, read_bag
from patch_encoder.bags.paths import list_bags
from patch_encoder.bags.writer import write_bag
from patch_encoder.slide_encoders import places
from patch_encoder.slide_encoders.places import place_tiles
from tests.patch_encoder.regions.cohort import (
    GEOMETRY,
    STEP,
    make_corners,
    write_cohort,
    write_slide,
)
from tests.patch_encoder.regions.cohort import build as build_regions
from tests.patch_encoder.regions.test_extract_regions import G, make_run
from tests.patch_encoder.slide_encoders import published
from wsi_common.cli import run


@pytest.fixture(autouse=True)
def _fresh_warnings() -> None:
    places.warn_once.cache_clear()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Bags of three slides."""
    write_cohort(tmp_path / "features")
    return tmp_path


def encode(root: Path, *keys: str) -> int:
    common = [f"features={root}/features/tiny", f"output={root}/out", "device=cpu"]
    return run(encode_slides.main, encode_slides.Config, [*common, *keys])


def read_failure(folder: Path) -> dict[str, str]:
    with (folder / "failures.csv").open() as stream:
        return next(csv.DictReader(stream))


@pytest.mark.parametrize("pool", ["mean", "max", "mean_std"])
def test_pools_write_one_vector_per_slide_with_its_provenance(root: Path, pool: str):
    assert encode(root, f"slide_encoder={pool}") == 0
    files = list_bags(root / "out" / f"{pool}-tiny")
    assert sorted(files) == ["S0", "S1", "S2"]
    for slide, file in files.items():
        tiles, bag = read_bag(root / f"features/tiny/h5_files/{slide}.h5"), open_bag(file)
        x = tiles.read().double().numpy()
        expected = {
            "mean": x.mean(0),
            "max": x.max(0),
            "mean_std": np.concatenate([x.mean(0), x.std(0)]),
        }[pool]
        assert file == root / "out" / f"{pool}-tiny" / f"{slide}.h5"
        np.testing.assert_allclose(bag.read()[0].numpy(), expected, rtol=1e-5, atol=1e-6)
        found = bag.provenance
        assert found["encoder"] == pool and found["tile_encoder"] == "tiny"
        assert found["bag_sha256"] == tiles.provenance["sha256"] and found["tiles"] == str(
            len(tiles)
        )
        # the one row lies where the slide's tiles lie
        side = bag.coordinates().geometry.patch_size_level0
        low, high = tiles.coords.amin(0), tiles.coords.amax(0) + STEP
        # and says how these were cut, by which mil.predict tells tiles of another size
        assert read_tiling(bag) == read_tiling(tiles) == {"target_mpp": 0.5, "target_size": STEP}
        assert torch.equal(bag.coords[0], low) and side == int((high - low).max())


def test_vectors_are_a_feature_set_of_the_benchmark(root: Path):
    for number in range(3, 12):
        write_slide(root / "features", f"S{number}", make_corners(4, 4, 0.9, number), seed=number)
    assert encode(root, "slide_encoder=mean") == 0
    rows = ["case_id,slide_id,label"]
    rows += [f"C{number},S{number},{'ab'[number % 2]}" for number in range(12)]
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    keys = [f"labels={root}/labels.csv", f"features=[{root}/out/mean-tiny]", f"output={root}/bench"]
    keys += [
        "models=[abmil, linear_probe]",
        "seeds=[1]",
        "folds=3",
        "training.epochs=1",
        "training.min_epochs=0",
    ]
    keys += ["device=cpu", "resamples=5", "isolated=false"]
    assert run(benchmark.main, benchmark.Config, keys) == 0
    assert "mean-tiny" in (root / "bench" / "results.csv").read_text()


def test_slpd_is_the_mean_of_extract_regions(root: Path):
    make_run(root / "slpd")
    assert build_regions(root, f"region_tiles={G}") == 0
    regions = [f"weights={root}/slpd", f"regions={root}/regions/tiny", f"output={root}/regions_out"]
    keys = [*regions, "pool=mean", "device=cpu", "precision=fp32"]
    assert run(extract_regions.main, extract_regions.Config, keys) == 0
    assert encode(root, "slide_encoder=slpd", f"weights={root}/slpd") == 0
    for slide in ("S0", "S1", "S2"):
        expected = open_bag(root / "regions_out" / "slpd_mean" / "h5_files" / f"{slide}.h5").read()
        found = open_bag(root / "out" / "slpd" / f"{slide}.h5").read()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_work_that_is_there_is_kept_and_other_work_refused(root: Path, capsys):
    assert encode(root, "slide_encoder=mean") == 0
    path = root / "out" / "mean-tiny" / "S1.h5"
    before = {file: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    path.unlink()
    assert encode(root, "slide_encoder=mean") == 0  # only what is missing
    after = {file: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    assert {file for file in before if before[file] != after[file]} == {path}
    # another bag under the same name
    write_slide(root / "features", "S1", make_corners(5, 5, 0.7, 9), seed=9)
    assert encode(root, "slide_encoder=mean") == 1
    row = read_failure(path.parent)
    assert (
        row["slide"] == "S1" and "bag_sha256" in row["error"] and "overwrite=true" in row["error"]
    )
    assert encode(root, "slide_encoder=mean", "overwrite=true") == 0
    assert not (path.parent / "failures.csv").exists()
    capsys.readouterr()


def write_chief_cohort(root: Path, encoder: str, width: int = 768) -> Path:
    path = root / "features" / "chief_bags" / "h5_files" / "S1.h5"
    corners = make_corners(4, 3, 0.9, 0)
    features = np.random.default_rng(0).normal(size=(len(corners), width)).astype(np.float32)
    provenance = {"encoder": encoder} if encoder else {}
    write_bag(path, features, corners, GEOMETRY | {"name": "S1"}, provenance)
    return path.parent.parent


def encode_with_chief(root: Path, *keys: str) -> int:
    """The published width, since it is checked; the numbers are fabricated."""
    torch.save(published.chief_state(768), root / "CHIEF_pretraining.pth")
    bags = f"features={root}/features/chief_bags"
    chief = ["slide_encoder=chief", f"weights={root}/CHIEF_pretraining.pth", f"output={root}/out"]
    return run(encode_slides.main, encode_slides.Config, [bags, *chief, "device=cpu", *keys])


def test_bags_of_another_tile_encoder_are_refused_in_one_line(tmp_path: Path, caplog):
    write_chief_cohort(tmp_path, "conch_v1_5")  # of the same width
    assert encode_with_chief(tmp_path) == 1
    row = read_failure(tmp_path / "out" / "chief")
    assert "expected tile features of ctranspath (width 768)" in row["error"]
    assert "found conch_v1_5" in row["error"] and "encoder=ctranspath" in row["error"]
    assert not (tmp_path / "out" / "chief" / "S1.h5").exists()
    write_chief_cohort(tmp_path, "ctranspath", 512)
    assert encode_with_chief(tmp_path) == 1
    write_chief_cohort(tmp_path, "ctranspath")
    with caplog.at_level(logging.WARNING):
        assert encode_with_chief(tmp_path) == 0
    # the bags are of 64 px at 0.5 um/px
    assert "trained on tiles of 256 px at 1.0 um/px" in caplog.text
    assert encode_with_chief(tmp_path, "organ=lung", "name=chief_lung") == 0
    assert open_bag(tmp_path / "out" / "chief_lung" / "S1.h5").shape == (1, 8)


def test_bags_that_name_no_encoder_pass_with_a_warning(tmp_path: Path, caplog):
    write_chief_cohort(tmp_path, "")
    with caplog.at_level(logging.WARNING):
        assert encode_with_chief(tmp_path) == 0
    assert "do not say which encoder made them" in caplog.text


def test_names_of_other_tools_are_known(tmp_path: Path):
    """TRIDENT's conch_v15 is conch_v1_5."""
    path = tmp_path / "features" / "t" / "S1.h5"
    corners = make_corners(3, 3, 1.0, 0)
    features = np.random.default_rng(0).normal(size=(len(corners), 768)).astype(np.float32)
    write_bag(path, features, corners, GEOMETRY | {"name": "S1"}, {"encoder": "conch_v15"})
    save_file(published.feather_state(768), tmp_path / "model.safetensors")
    keys = ["slide_encoder=feather", f"weights={tmp_path}", f"features={tmp_path}/features/t"]
    keys += [f"output={tmp_path}/out", "device=cpu"]
    assert run(encode_slides.main, encode_slides.Config, keys) == 0
    assert (
        open_bag(tmp_path / "out" / "feather" / "S1.h5").provenance["tile_encoder"] == "conch_v1_5"
    )


def test_bags_without_coordinates(tmp_path: Path):
    """A pool needs none, and the vector has none; a slide encoder that does says what to give."""
    folder = tmp_path / "features" / "tiny" / "pt_files"
    folder.mkdir(parents=True)
    torch.save(torch.randn(5, 12), folder / "S1.pt")
    assert encode(tmp_path, "slide_encoder=mean") == 0
    bag = open_bag(tmp_path / "out" / "mean-tiny" / "S1.h5")
    assert bag.shape == (1, 12) and bag.coords is None
    make_run(tmp_path / "slpd")
    assert encode(tmp_path, "slide_encoder=slpd", f"weights={tmp_path}/slpd") == 1
    assert "add coords=<folder" in (tmp_path / "out" / "slpd" / "failures.csv").read_text()


def test_a_bag_that_is_not_finite_fails_alone(root: Path):
    path = root / "features/tiny/h5_files/S1.h5"
    with h5py.File(path, "a") as file:
        file["features"][2, 3] = np.nan
    assert encode(root, "slide_encoder=mean") == 1
    assert sorted(list_bags(root / "out/mean-tiny")) == ["S0", "S2"]
    assert "finite vector" in (root / "out/mean-tiny/failures.csv").read_text()


def test_tiles_keep_their_cells_where_corners_are_rounded(tmp_path: Path):
    """A step of 63.9 px: corner // 64 would put neighbours into one cell."""
    cells = np.stack(np.meshgrid(np.arange(120), np.arange(3)), -1).reshape(-1, 2)
    corners = np.rint(cells * 63.9).astype(int) + 128
    write_slide(tmp_path, "S1", corners)
    placed = place_tiles(open_bag(tmp_path / "tiny/h5_files/S1.h5"))
    assert len(np.unique(corners // 64, axis=0)) < len(corners)
    np.testing.assert_array_equal(placed.cells.numpy(), cells + 2)


def test_overlapping_tiles_are_told(tmp_path: Path, caplog):
    write_slide(tmp_path, "S1", make_corners(6, 6, 1.0, 0, STEP // 2), overlap=0.5)
    with caplog.at_level(logging.WARNING):
        place_tiles(open_bag(tmp_path / "tiny/h5_files/S1.h5"))
    assert "tiles overlap (step 32 px, side 64 px)" in caplog.text


def test_tridents_slide_features_are_read_as_bags(tmp_path: Path):
    """`features` (D,), as TRIDENT writes a slide's vector."""
    vector = np.random.default_rng(0).normal(size=768).astype(np.float32)
    path = tmp_path / "slide_features_titan" / "S1.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["features"] = vector
        file["features"].attrs["encoder"] = "titan"
    bag = read_bag(list_bags(path.parent)["S1"])
    assert bag.shape == (1, 768) and bag.provenance["encoder"] == "titan"
    np.testing.assert_array_equal(bag.read()[0].numpy(), vector)
    assert torch.equal(next(open_bag(path).blocks(1)), bag.read())


def test_unknown_slides_are_listed(root: Path):
    (root / "list.txt").write_text("S0\nS7\n")
    assert encode(root, "slide_encoder=mean", f"slides_list={root}/list.txt") == 1
    assert sorted(list_bags(root / "out/mean-tiny")) == ["S0"]
    assert "S7" in (root / "out/mean-tiny/failures.csv").read_text()


def test_shards_share_the_slides_and_one_folder(root: Path, capsys: pytest.CaptureFixture[str]):
    """Parts of equal bags as one process writes them; more parts than slides is nothing to do."""
    assert encode(root, "slide_encoder=mean", f"output={root}/whole") == 0
    (root / "list.txt").write_text("S0\nS1\nS2\nS7\n")
    listed = f"slides_list={root}/list.txt"
    assert encode(root, "slide_encoder=mean", "shard=1/4", listed) == 1
    assert len(list_bags(root / "out/mean-tiny")) == 1
    for part in (2, 3, 4):
        assert encode(root, "slide_encoder=mean", f"shard={part}/4", listed) == 0
    assert "S7" in (root / "out/mean-tiny/failures.1-of-4.csv").read_text()
    for name, file in list_bags(root / "whole/mean-tiny").items():
        assert file.read_bytes() == (root / "out/mean-tiny" / f"{name}.h5").read_bytes()
    assert encode(root, "slide_encoder=mean") == 0  # the whole cohort: nothing failed
    assert not list((root / "out/mean-tiny").glob("failures*"))
    assert encode(root, "slide_encoder=mean", "shard=5/4") == 2
    assert "shard=5/4: expected i/n" in capsys.readouterr().err


def test_check_names_the_width_of_slpds_training(root: Path):
    make_run(root / "slpd")
    write_slide(root / "features", "S9", make_corners(4, 4, 1.0, 0), width=7)
    assert encode(root, "slide_encoder=slpd", f"weights={root}/slpd") == 1
    assert "width 12" in (root / "out/slpd/failures.csv").read_text()
