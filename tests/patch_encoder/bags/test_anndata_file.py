"""Bags as AnnData: every group and dataset has the type and the attributes that anndata 0.12 itself
gives it, and where anndata can be imported, it reads the same numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from patch_encoder import convert_bags
from patch_encoder.bags.bag import read_bag
from tests.patch_encoder.bags.test_other_layouts import CORNERS, convert, make_bags
from wsi_common.cli import run

# `describe` of the file that anndata wrote after it had read ours
FORMAT = Path(__file__).with_name("anndata_format.json")
CENTRES = CORNERS + 64.0
SCORES = "tile,x,y,attention,class\n1,128,0,0.1,b\n0,0,0,0.30000000000000004,a\n2,128,256,,a\n"


def write(root: Path, scores: str = SCORES) -> Path:
    make_bags(root)
    (root / "scores").mkdir()
    (root / "scores" / "S1.csv").write_text(scores)
    assert convert(root, "anndata", f"scores={root}/scores") == 0
    return root / "anndata" / "S1.h5ad"


def describe(path: Path) -> dict[str, dict[str, Any]]:
    """Place -> kind, type, shape and attributes of everything in the file."""
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, item: Any) -> None:
        attributes = {
            key: value.tolist() if hasattr(value, "tolist") else value
            for key, value in item.attrs.items()
        }
        found[name] = {"attributes": attributes}
        if isinstance(item, h5py.Dataset):
            kind = "text" if h5py.check_string_dtype(item.dtype) else str(item.dtype)
            found[name] |= {"type": kind, "shape": list(item.shape)}

    with h5py.File(path) as file:
        attributes = {k: file.attrs[k] for k in ("encoding-type", "encoding-version")}
        file.visititems(add)
    return {"": {"attributes": attributes}, **found}


def test_the_file_is_as_anndata_writes_it(tmp_path: Path) -> None:
    assert describe(write(tmp_path)) == json.loads(FORMAT.read_text())


def test_numbers_are_those_of_the_bag(tmp_path: Path) -> None:
    with h5py.File(write(tmp_path)) as file:
        bag = read_bag(tmp_path / "features" / "tiny" / "h5_files" / "S1.h5")
        assert np.array_equal(file["X"][:], bag.features.numpy())
        assert np.array_equal(file["obsm/spatial"][:], CENTRES)
        assert file["obs/x"][:].tolist() == CORNERS[:, 0].tolist()
        assert file["obs/_index"].asstr()[:].tolist() == ["S1_0", "S1_1", "S1_2"]
        assert file["var/_index"].asstr()[:].tolist() == [f"tiny_{i}" for i in range(5)]
        attention = file["obs/attention"][:]
        assert attention[:2].tolist() == [0.30000000000000004, 0.1] and np.isnan(attention[2])
        names = file["obs/class/categories"].asstr()[:]
        assert names[file["obs/class/codes"][:]].tolist() == ["a", "b", "a"]
        assert file["uns/provenance/encoder"].asstr()[()] == "tiny"
        assert file["uns/provenance/sha256"].asstr()[()] == bag.digest()
        assert file["uns/tiles/mpp"][()] == 0.25
        assert file["uns/spatial/S1/scalefactors/spot_diameter_fullres"][()] == 128.0


def test_anndata_reads_it_and_concatenates_slides(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata", reason="not in the shared environment")
    path = write(tmp_path)
    found = anndata.read_h5ad(path)
    bag = read_bag(tmp_path / "features" / "tiny" / "h5_files" / "S1.h5")
    assert np.array_equal(found.X, bag.features.numpy())
    assert np.array_equal(found.obsm["spatial"], CENTRES)
    assert found.obs["class"].tolist() == ["a", "b", "a"]
    assert anndata.concat([found, found], index_unique="-").shape == (6, 5)


def test_a_slash_in_a_column_is_no_group(tmp_path: Path) -> None:
    make_bags(tmp_path)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "S1.csv").write_text(SCORES.replace("attention", "probability_HSIL/SCC"))
    assert convert(tmp_path, "anndata", f"scores={tmp_path}/scores") == 0
    with h5py.File(tmp_path / "anndata" / "S1.h5ad") as file:
        assert file["obs/probability_HSIL_SCC"].shape == (3,)
        assert "probability_HSIL_SCC" in file["obs"].attrs["column-order"].tolist()


def test_the_same_scores_are_kept_and_others_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    before = path.stat().st_mtime_ns
    assert convert(tmp_path, "anndata", f"scores={tmp_path}/scores") == 0
    assert path.stat().st_mtime_ns == before
    (tmp_path / "scores" / "S1.csv").write_text(SCORES.replace("0.1", "0.2"))
    assert convert(tmp_path, "anndata", f"scores={tmp_path}/scores") == 1
    assert "another bag" in (tmp_path / "anndata" / "failures.csv").read_text()
    assert convert(tmp_path, "anndata", f"scores={tmp_path}/scores", "overwrite=true") == 0


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        (SCORES.replace("128,256", "128,300"), "(128, 256)"),
        (SCORES + "3,0,999,0.5,a\n", "expected 3 rows"),
        ("a,b\n1,2\n", "'x'"),
        (SCORES.replace("128,0", "north,0"), "north"),
        (SCORES.replace("class", "slide"), "expected named columns of scores, found 'slide'"),
        (SCORES.replace("class", ""), "expected named columns of scores, found ''"),
    ],
)
def test_scores_of_other_tiles_are_listed(tmp_path: Path, scores: str, problem: str) -> None:
    make_bags(tmp_path)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "S1.csv").write_text(scores)
    assert convert(tmp_path, "anndata", f"scores={tmp_path}/scores") == 1
    assert problem in (tmp_path / "anndata" / "failures.csv").read_text()
    assert not (tmp_path / "anndata" / "S1.h5ad").exists()


def test_scores_are_for_anndata_and_a_slide_without_them_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bags(tmp_path)
    (tmp_path / "scores").mkdir()
    assert convert(tmp_path, "anndata", f"scores={tmp_path}/scores") == 1
    assert "found no file" in (tmp_path / "anndata" / "failures.csv").read_text()
    keys = [f"features={tmp_path}/features/tiny", f"output={tmp_path}/o", "to=stamp"]
    assert run(convert_bags.main, convert_bags.Config, [*keys, f"scores={tmp_path}/scores"]) == 2
    assert "expected to=anndata" in capsys.readouterr().err
    assert convert(tmp_path, "anndata") == 0, "and none are needed"
