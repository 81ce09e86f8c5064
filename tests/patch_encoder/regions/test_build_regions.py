"""build_regions: the files, their reuse, the slides that fail, and what the log lists."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from patch_encoder.regions import files
from patch_encoder.regions.files import read_region_file
from patch_encoder.regions.region_set import read_region_set
from tests.helpers import kill_when
from tests.patch_encoder.regions.cohort import STEP, build, make_corners, write_cohort, write_slide


@pytest.mark.parametrize("form", ["indexed", "materialised"])
def test_rows_give_back_the_bag(tmp_path: Path, form: str) -> None:
    features = write_cohort(tmp_path / "features")
    assert build(tmp_path, "region_tiles=3", "min_fill=0", f"form={form}") == 0
    for slide, tiles in features.items():
        path = tmp_path / "regions" / "tiny" / f"{slide}.h5"
        found = read_region_file(path)
        valid = found.rows >= 0
        assert sorted(found.rows[valid].tolist()) == list(range(len(tiles)))
        assert (found.region_tiles, found.region_size_level0) == (3, 3 * STEP)
        np.testing.assert_allclose(found.mean, tiles.astype(np.float64).mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.std, tiles.astype(np.float64).std(0), rtol=1e-5)
        with h5py.File(path) as file:
            assert ("features" in file) == (form == "materialised")
            if form == "materialised":
                stored = file["features"][()]
                np.testing.assert_array_equal(stored[valid], tiles[found.rows[valid]])
                assert not stored[~valid].any()


def test_both_forms_are_the_same_set(tmp_path: Path) -> None:
    write_cohort(tmp_path / "features")
    sets = []
    for form in ("indexed", "materialised"):
        assert build(tmp_path, "region_tiles=3", f"form={form}", output=form) == 0
        sets.append(read_region_set(tmp_path / form / "tiny"))
    assert sets[0].digest == sets[1].digest
    assert build(tmp_path, "region_tiles=3", "min_fill=0.9", output="other") == 0
    assert read_region_set(tmp_path / "other" / "tiny").digest != sets[0].digest


def test_finished_work_is_reused_and_other_work_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cohort(tmp_path / "features")
    assert build(tmp_path, "region_tiles=3") == 0
    path = tmp_path / "regions" / "tiny" / "S1.h5"
    before = path.stat().st_mtime_ns
    assert build(tmp_path, "region_tiles=3") == 0
    assert path.stat().st_mtime_ns == before, "kept"
    path.write_bytes(path.read_bytes()[:300])
    assert build(tmp_path, "region_tiles=3") == 0
    read_region_file(path)  # a damaged file is made anew
    assert build(tmp_path, "region_tiles=4") == 1
    table = (tmp_path / "regions" / "failures.csv").read_text()
    assert table.count("region_tiles 3 -> 4") == 3 and "set overwrite=true" in table
    assert build(tmp_path, "region_tiles=4", "overwrite=true") == 0
    assert read_region_file(path).region_tiles == 4
    assert not (tmp_path / "regions" / "failures.csv").exists()


def test_one_bad_slide_stops_no_other(tmp_path: Path) -> None:
    write_cohort(tmp_path / "features")
    corners = make_corners(5, 5, 1.0, 0)
    bad = write_slide(tmp_path / "features", "nan", corners)
    path = tmp_path / "features" / "tiny" / "h5_files" / "nan.h5"
    with h5py.File(path, "a") as file:
        bad[3, 2] = np.nan
        file["features"][()] = bad
    write_slide(tmp_path / "features", "huge", corners, dtype="float32")
    with h5py.File(path.with_name("huge.h5"), "a") as file:
        file["features"][0, 0] = 1e6
    path.with_name("torn.h5").write_bytes(b"no HDF5")
    names = tmp_path / "list.txt"
    names.write_text("S0\nS1\nnan\nhuge\ntorn\nabsent\n")
    assert build(tmp_path, "region_tiles=3", f"slides_list={names}") == 1
    with (tmp_path / "regions" / "failures.csv").open() as stream:
        errors = {row["slide"]: row["error"] for row in csv.DictReader(stream)}
    assert errors.keys() == {"nan", "huge", "torn", "absent"}
    assert "NaN or infinity in 1 of 25 tiles" in errors["nan"]
    assert "half precision holds (up to 65504), found 1e+06" in errors["huge"]
    made = {path.stem for path in (tmp_path / "regions" / "tiny").glob("*.h5")}
    assert made == {"S0", "S1"}, "S2 is not in the list"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("min_fill=1.5", "min_fill=1.5: expected a share of a region, 0 to 1"),
        ("min_fill=1", "expected regions, found none in 3 slides: no square of 30 x 30 cells"),
    ],
)
def test_a_grid_that_leaves_no_region_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: str, said: str
) -> None:
    write_cohort(tmp_path / "features")
    assert build(tmp_path, "region_tiles=30", keys) == 2
    assert said in capsys.readouterr().err
    assert build(tmp_path, "region_tiles=3", "overwrite=true") == 0


def test_small_slides_are_counted_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_cohort(tmp_path / "features")
    write_slide(tmp_path / "features", "one", make_corners(3, 3, 1.0, 0))
    write_slide(tmp_path / "features", "none", make_corners(1, 1, 1.0, 0))
    with caplog.at_level("INFO"):
        assert build(tmp_path, "region_tiles=3", "min_regions=4", "min_fill=0.2") == 0
    assert "not clustered, with fewer than 4 regions, 2 of 5 slides: none (0), one (1)" in (
        caplog.text
    )
    with (tmp_path / "regions" / "tiny" / "regions.csv").open() as stream:
        rows = {row["slide"]: row for row in csv.DictReader(stream)}
    assert (rows["one"]["regions"], rows["one"]["fill"]) == ("1", "1.000")
    assert (rows["none"]["regions"], rows["none"]["left_out"]) == ("0", "1")
    found = read_region_set(tmp_path / "regions" / "tiny")
    assert found.slides == ["S0", "S1", "S2", "one"] and found.counts.min() == 1
    assert "1 of 5 slides have no region and are left out: none" in caplog.text


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cohort(tmp_path / "features")
    reserve, calls = files.reserve, []

    def fill_up(path: Path, size: int) -> None:
        calls.append(size)
        if len(calls) == 2:
            raise OSError(28, os.strerror(28))
        reserve(path, size)

    monkeypatch.setattr(files, "reserve", fill_up)
    keys = ("region_tiles=3", "form=materialised")
    assert build(tmp_path, *keys) == 2
    line = capsys.readouterr().err
    assert "the disk is full" in line and "or set form=indexed" in line
    assert [path.name for path in (tmp_path / "regions" / "tiny").iterdir()] == ["S0.h5"]
    assert build(tmp_path, *keys) == 0, "the same command goes on"
    assert len(list((tmp_path / "regions" / "tiny").glob("*.h5"))) == 3


@pytest.mark.process
def test_a_killed_build_goes_on(tmp_path: Path) -> None:
    for number in range(40):
        write_slide(tmp_path / "features", f"S{number:02}", make_corners(40, 40, 1.0, 0), 64)
    done = tmp_path / "regions" / "tiny"
    keys = [f"features={tmp_path}/features/tiny", f"output={tmp_path}/regions", "region_tiles=4"]
    keys.append("form=materialised")
    kill_when(lambda: len(list(done.glob("S*.h5"))) > 2, "patch_encoder.build_regions", keys)
    kept = {path: path.stat().st_mtime_ns for path in done.glob("S*.h5")}
    assert len(kept) < 40
    assert build(tmp_path, "region_tiles=4", "form=materialised") == 0
    assert len(read_region_set(done).slides) == 40
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
