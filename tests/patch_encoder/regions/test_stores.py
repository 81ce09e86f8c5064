"""Stores: the same bits from memory and from files, and what they refuse."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from patch_encoder.bags.writer import write_bag
from patch_encoder.regions.keys import RegionKeys
from patch_encoder.regions.opening import open_store
from patch_encoder.regions.region_set import read_region_set
from patch_encoder.regions.store import FileStore, RamStore, RegionStore, make_ram_store
from tests.patch_encoder.regions.cohort import GEOMETRY, build, make_corners, write_cohort
from wsi_common.config import load_config
from wsi_common.errors import UserError


def open_regions(root: Path, *keys: str, output: str = "regions") -> RegionStore:
    arguments = [f"regions={root}/{output}/tiny", *keys]
    return open_store(load_config(RegionKeys, arguments))


def pick_ids(store: RegionStore, count: int = 40) -> np.ndarray:
    return np.random.default_rng(1).integers(0, len(store), count)


def fetch_naively(root: Path, features: dict[str, np.ndarray], ids: np.ndarray) -> torch.Tensor:
    """Regions tile by tile, from the definition."""
    regions = read_region_set(root / "regions" / "tiny")
    out = torch.zeros(len(ids), 3, 3, regions.width, dtype=torch.float16)
    for place, region in enumerate(ids):
        tiles = features[regions.slides[regions.slide_of[region]]]
        for y, x in np.argwhere(regions.rows[region] >= 0):
            row = tiles[regions.rows[region, y, x]]
            out[place, y, x] = torch.from_numpy(row.astype(np.float16))
    return out


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_all_stores_and_forms_give_the_same_bits(tmp_path: Path, dtype: str) -> None:
    features = write_cohort(tmp_path / "features", dtype=dtype)
    for output in ("regions", "materialised"):
        form = f"form={output}" if output != "regions" else "form=indexed"
        assert build(tmp_path, "region_tiles=3", form, output=output) == 0
    stores = [
        open_regions(tmp_path, f"store={kind}", output=output)
        for kind in ("ram", "hdf5")
        for output in ("regions", "materialised")
    ]
    ids = pick_ids(stores[0])
    expected = fetch_naively(tmp_path, features, ids)
    for store in stores:
        found, valid = store.fetch(ids)
        assert found.dtype == torch.float16 and torch.equal(found, expected)
        assert torch.equal(valid, expected.abs().sum(-1) > 0)
        assert not found[~valid].any() and (~valid).any()
        assert store.digest == stores[0].digest


def test_standardised_features_are_the_same_from_all_stores(tmp_path: Path) -> None:
    write_cohort(tmp_path / "features")
    assert build(tmp_path, "region_tiles=3", "min_fill=0") == 0
    keys = ("standardise=slide",)
    ram, files = (open_regions(tmp_path, f"store={kind}", *keys) for kind in ("ram", "hdf5"))
    every = np.arange(len(ram))
    found, valid = ram.fetch(every)
    assert torch.equal(found, files.fetch(every)[0])
    assert torch.equal(found[7], ram.fetch(np.array([3, 7]))[0][1]), "whatever else is fetched"
    assert not found[~valid].any() and not torch.signbit(found[~valid]).any()
    for slide in range(3):
        here = torch.from_numpy(ram.regions.region_numbers(slide))
        tiles = found[here][valid[here]].double()
        assert (
            tiles.mean(0).abs().max() < 1e-3 and (tiles.std(0, correction=0) - 1).abs().max() < 1e-3
        )


def test_a_feature_that_does_not_vary_becomes_zero(tmp_path: Path) -> None:
    features = torch.randn(6, 2, 2, 3).half()
    features[..., 1] = 0.1
    store = make_ram_store(
        features, torch.ones(6, 2, 2, dtype=torch.bool), ["a", "b"], [2, 4], standardise="slide"
    )
    found, _ = store.fetch(np.arange(6))
    assert found.isfinite().all() and found[..., 1].abs().max() < 1e-2
    assert store.counts.tolist() == [2, 4] and store.cases == ["a", "b"]


def test_a_selection_keeps_the_namespace_and_has_a_digest_of_its_own(tmp_path: Path) -> None:
    write_cohort(tmp_path / "features")
    assert build(tmp_path, "region_tiles=3") == 0
    names, labels = tmp_path / "list.txt", tmp_path / "labels.csv"
    names.write_text("S0\nS2\n")
    labels.write_text("case_id,slide_id,label\nP7,S0,a\nP7,S1,b\nP8,S2,a\n")
    whole = open_regions(tmp_path)
    part = open_regions(tmp_path, f"slides_list={names}", f"labels={labels}")
    assert part.slides == ["S0", "S2"] and part.cases == ["P7", "P8"]
    assert part.digest != whole.digest and part.regions.namespace == whole.regions.namespace
    first = int(whole.regions.offsets[2])
    assert part.regions.numbers[part.counts[0]] == first
    assert torch.equal(part.fetch(part.counts[:1])[0], whole.fetch(np.array([first]))[0])
    np.testing.assert_array_equal(part.corners(1), whole.corners(2))


def test_slides_without_a_patient_are_named_and_a_foreign_table_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_cohort(tmp_path / "features")
    assert build(tmp_path, "region_tiles=3") == 0
    labels = tmp_path / "labels.csv"
    labels.write_text("case_id,slide_id,label\nP7,S0,a\nP7,S2,b\nP9,elsewhere,b\n")
    assert open_regions(tmp_path, f"labels={labels}").cases == ["P7", "S1", "P7"]
    assert "1 of 3 slides have no row and count as patients of their own: S1" in caplog.text
    labels.write_text("case_id,slide_id,label\nP7,TCGA-1,a\n")
    with pytest.raises(UserError, match="such as S0, found others, such as TCGA-1"):
        open_regions(tmp_path, f"labels={labels}")


def test_a_store_travels_to_a_worker_without_its_files(tmp_path: Path) -> None:
    write_cohort(tmp_path / "features", slides=2)
    assert build(tmp_path, "region_tiles=3") == 0
    store = open_regions(tmp_path)
    ids = pick_ids(store)
    expected, _ = store.fetch(ids)
    tiles = sum(table.shape[0] for table in store.regions.tables) * store.width * 2
    size = len(pickle.dumps(store)) - len(pickle.dumps(store.regions))
    assert size < tiles, "no features in the pickle"
    assert torch.equal(pickle.loads(pickle.dumps(store)).fetch(ids)[0], expected)
    store.close()
    assert torch.equal(store.fetch(ids)[0], expected), "opened again"


def test_files_stay_closed_however_many_slides_are_read(tmp_path: Path) -> None:
    write_cohort(tmp_path / "features", slides=8)
    assert build(tmp_path, "region_tiles=3") == 0
    store = open_regions(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    store.fetch(np.arange(len(store)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_bags_that_cannot_be_mapped_need_ram_or_the_materialised_form(tmp_path: Path) -> None:
    write_cohort(tmp_path / "features", slides=1)
    path = tmp_path / "features" / "tiny" / "h5_files" / "S0.h5"
    with h5py.File(path, "a") as file:
        features, attributes = file["features"][()], dict(file["features"].attrs)
        del file["features"]
        file.create_dataset("features", data=features, chunks=(4, 12), compression="gzip")
        file["features"].attrs.update(attributes)
    assert build(tmp_path, "region_tiles=3") == 0
    with pytest.raises(UserError, match="form=materialised or set store=ram"):
        open_regions(tmp_path)
    ram = open_regions(tmp_path, "store=ram")
    assert build(tmp_path, "region_tiles=3", "form=materialised", output="copied") == 0
    ids = pick_ids(ram)
    copied = open_regions(tmp_path, output="copied")
    assert torch.equal(ram.fetch(ids)[0], copied.fetch(ids)[0])


def test_changed_bags_and_odd_folders_are_refused(tmp_path: Path) -> None:
    write_cohort(tmp_path / "features")
    assert build(tmp_path, "region_tiles=3") == 0
    path = tmp_path / "features" / "tiny" / "h5_files" / "S1.h5"
    moved = path.rename(path.with_name("gone.h5"))
    with pytest.raises(UserError, match="S1.h5, found none; give features="):
        open_regions(tmp_path)
    other = tmp_path / "elsewhere" / "h5_files"
    other.mkdir(parents=True)
    for name in ("S0", "S2"):
        (path.parent / f"{name}.h5").rename(other / f"{name}.h5")
    moved.rename(other / "S1.h5")
    store = open_regions(tmp_path, f"features={tmp_path}/elsewhere")
    assert len(store.fetch(np.arange(4))[0]) == 4
    write_bag(path, np.zeros((5, 12), np.float16), make_corners(5, 1, 1.0, 0), GEOMETRY)
    for name in ("S0", "S2"):
        (other / f"{name}.h5").rename(path.parent / f"{name}.h5")
    with pytest.raises(UserError, match="S1.h5: expected the bag that"):
        open_regions(tmp_path)
    with pytest.raises(UserError, match="expected <slide>.h5 of build_regions, found none"):
        open_regions(tmp_path, f"regions={tmp_path}")


def test_memory_that_is_not_there_is_said_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cohort(tmp_path / "features")
    assert build(tmp_path, "region_tiles=3") == 0
    monkeypatch.setattr("patch_encoder.regions.store.free_memory", lambda: 1000)
    with pytest.raises(UserError, match="store=ram: expected .* set store=hdf5"):
        open_regions(tmp_path, "store=ram")


def test_both_stores_read_what_the_set_says(tmp_path: Path) -> None:
    write_cohort(tmp_path / "features")
    assert build(tmp_path, "region_tiles=3", "stride=1") == 0
    regions = read_region_set(tmp_path / "regions" / "tiny")
    with RamStore(regions) as ram, FileStore(regions) as files:
        every = np.arange(len(regions))
        assert torch.equal(ram.fetch(every)[0], files.fetch(every)[0])
        assert ram.fetch(every[:0])[0].shape == (0, 3, 3, 12)
