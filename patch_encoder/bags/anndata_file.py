"""Feature bags as AnnData (`.h5ad`), for scanpy, squidpy and what else reads it.

Format: https://anndata.readthedocs.io/en/stable/fileformat-prose.html, written with h5py: every
group and dataset says its type and version in the attributes `encoding-type` and
`encoding-version`. A tile is an observation, a feature a variable. As in data of Visium,
`obsm["spatial"]` is the centre of a tile in level-0 px, and `uns["spatial"][<slide>]` its size.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from patch_encoder.bags.bag import Bag
from patch_encoder.tiles.coordinates import Coordinates
from wsi_common.errors import UserError
from wsi_common.hdf5 import write_hdf5

# versions of the encodings that AnnData has written since 0.8
VERSIONS = {
    "anndata": "0.1.0",
    "dict": "0.1.0",
    "dataframe": "0.2.0",
    "array": "0.2.0",
    "string-array": "0.2.0",
    "categorical": "0.2.0",
    "string": "0.2.0",
    "numeric-scalar": "0.2.0",
}
EMPTY = ("layers", "obsp", "varm", "varp")  # groups that every file has
PLACE = ("tile", "x", "y")  # columns of a table of scores that are no score
Columns = Mapping[str, np.ndarray]


def write_anndata(
    path: Path,
    slide_id: str,
    bag: Bag,
    encoder: str,
    scores: Columns,
    attributes: Mapping[str, Any],
) -> None:
    """Write one slide.

    Args:
        path: of the file, which is written as it is named.
        slide_id: goes into the names of the tiles, so that slides can be concatenated.
        bag: N tiles with coordinates; its features become float32, without loss.
        encoder: goes into the names of the D variables, so that those of two encoders never mix.
        scores: further columns of `obs`, (N,) numbers or texts.
        attributes: of the file, beside those of the format.
    """
    places = bag.coordinates()
    side = places.geometry.patch_size_level0
    count, width = bag.shape
    text = {name: str(value) for name, value in sorted(bag.provenance.items())}
    spatial = {"images": {}, "scalefactors": {"spot_diameter_fullres": float(side)}}
    tiles = {"slide": np.full(count, slide_id, object)}
    tiles |= {"x": places.coords[:, 0], "y": places.coords[:, 1]}
    with write_hdf5(path, track_order=False) as file:
        _mark(file, "anndata")
        file.attrs.update(attributes)
        _write_array(file, "X", bag.read().float().numpy())
        _write_table(file, "obs", [f"{slide_id}_{i}" for i in range(count)], {**tiles, **scores})
        _write_table(file, "var", [f"{encoder}_{i}" for i in range(width)], {})
        _write_array(_write_dict(file, "obsm", {}), "spatial", places.coords + side / 2)
        for name in EMPTY:
            _write_dict(file, name, {})
        described = {"provenance": text, "tiles": asdict(places.geometry)}
        _write_dict(file, "uns", {"spatial": {slide_id: spatial}, **described})


def _mark(item: h5py.Group | h5py.Dataset, encoding: str) -> None:
    item.attrs.update({"encoding-type": encoding, "encoding-version": VERSIONS[encoding]})


def _write_array(group: h5py.Group, name: str, values: np.ndarray) -> None:
    _mark(group.create_dataset(name, data=values, track_times=False), "array")


def _write_texts(group: h5py.Group, name: str, values: Sequence[str]) -> None:
    kind = h5py.string_dtype()
    texts = np.array(values, dtype=object)
    stored = group.create_dataset(name, data=texts, dtype=kind, track_times=False)
    _mark(stored, "string-array")


def _write_table(group: h5py.Group, name: str, index: Sequence[str], columns: Columns) -> None:
    """A table of numbers, and of texts as categories."""
    table = group.create_group(name)
    _mark(table, "dataframe")
    table.attrs["_index"] = "_index"
    table.attrs["column-order"] = np.array(list(columns), dtype=h5py.string_dtype())
    _write_texts(table, "_index", index)
    for column, values in columns.items():
        if values.dtype.kind in "iuf":
            _write_array(table, column, values)
            continue
        categories, codes = np.unique(values.astype(str), return_inverse=True)
        stored = table.create_group(column)
        _mark(stored, "categorical")
        stored.attrs["ordered"] = False
        _write_texts(stored, "categories", categories.tolist())
        smallest = np.int8 if len(categories) < 128 else np.int32  # as pandas
        _write_array(stored, "codes", codes.astype(smallest))


def _write_dict(group: h5py.Group, name: str, values: Mapping[str, Any]) -> h5py.Group:
    """A dict of texts, numbers and dicts."""
    stored = group.create_group(name)
    _mark(stored, "dict")
    for key, value in values.items():
        if isinstance(value, Mapping):
            _write_dict(stored, key, value)
            continue
        kind = "string" if isinstance(value, str) else "numeric-scalar"
        dtype = h5py.string_dtype() if isinstance(value, str) else None
        _mark(stored.create_dataset(key, data=value, dtype=dtype, track_times=False), kind)
    return stored


def read_scores(file: Path, places: Coordinates) -> dict[str, np.ndarray]:
    """The scores of a slide's tiles, in the order of the tiles.

    Args:
        file: CSV with `x` and `y` (level-0 corner) and any further columns, as heatmaps are
            written with them (`scores/`); one row per tile, in any order.
        places: the tiles.

    Returns:
        Column -> (N,) float64, NaN for an empty cell; or texts where a cell is no number. Slashes
        in the names of columns, as in those of a class HSIL/SCC, become underscores.

    Raises:
        UserError: not such a table, or one of other tiles.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, strict=True))
        found = {(int(row["x"]), int(row["y"])): row for row in rows}
        ordered = [found[x, y] for x, y in places.coords.tolist()]
    except FileNotFoundError:
        raise UserError(f"{file}: expected scores of the slide's tiles, found no file") from None
    except (KeyError, TypeError, ValueError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: expected a table with x, y and a row for each of the {len(places.coords)} "
            f"tiles of the bag, found a problem with {error}; give the scores of these tiles"
        ) from None
    if len(rows) != len(ordered):
        raise UserError(
            f"{file}: expected {len(ordered)} rows, one per tile of the bag, found {len(rows)}; "
            "give the scores of these tiles"
        )
    names = [name for name in rows[0] if name not in PLACE]
    unusable = [name for name in names if name in (None, "", "slide", "_index")]
    if unusable:  # None: cells beyond the header's
        raise UserError(
            f"{file}: expected named columns of scores, found {unusable[0]!r}; name it otherwise"
        )
    # a slash would be a group of HDF5, which AnnData does not read
    return {name.replace("/", "_"): _as_column([row[name] for row in ordered]) for name in names}


def _as_column(cells: Sequence[str]) -> np.ndarray:
    try:
        return np.array([float(cell or "nan") for cell in cells])
    except ValueError:
        return np.array(cells, object)
