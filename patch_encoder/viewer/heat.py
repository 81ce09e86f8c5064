"""Scores of a slide's tiles, as `tools/heatmap.sh` writes them, as a layer of a slide page."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from patch_encoder.viewer.arrays import pack_array
from wsi_common.errors import UserError
from wsi_common.files import read_json
from wsi_common.hdf5 import get_dataset, open_hdf5

PLACES = ("tile", "x", "y")
COLOURS = "viridis"


def read_heat(
    folder: Path, slide_id: str, extent: tuple[int, int]
) -> tuple[dict[str, Any], Mapping[str, Any]] | None:
    """The tiles' scores as plain values for a page, and the slide's record with its predictions.

    Args:
        folder: that heatmap wrote.
        slide_id: of the slide.
        extent: (width, height) of the slide, level-0 px.

    Returns:
        None where the slide was not drawn.

    Raises:
        UserError: broken files, or of a slide of another size.
    """
    path = folder / "records" / f"{slide_id}.json"
    if not path.is_file():
        return None
    record = read_json(path, "a slide's record")
    size = (record.get("width"), record.get("height"))
    if size != extent:
        raise UserError(
            f"{path}: expected a slide of {extent[0]} x {extent[1]} px, found {size[0]} x "
            f"{size[1]}; draw the heatmap of this slide again"
        )
    table = folder / "scores" / f"{slide_id}.csv"
    columns = read_columns(table)
    places = {name: columns.pop(name) for name in PLACES if name in columns}
    if not {"x", "y"} <= places.keys() or not columns:
        raise UserError(f"{table}: expected columns x, y and scores, found {', '.join(places)}")
    columns |= read_attention_maps(folder, slide_id, len(places["x"]))
    return {
        "side": int(record["side"]),
        "x": pack_array(places["x"], "int32"),
        "y": pack_array(places["y"], "int32"),
        "values": {name: pack_array(column, "float32") for name, column in columns.items()},
        # ranks use the whole range of colours, whatever the values are
        "shown": "percentile" if "percentile" in columns else next(iter(columns)),
        "what": record.get("shown", "score"),
        "colours": make_colours(),
    }, record


def read_columns(path: Path) -> dict[str, Float[np.ndarray, " n"]]:
    """The columns of a table of numbers.

    Raises:
        UserError: it is not there, or not of numbers.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            header, *rows = csv.reader(stream)
        values = np.array(rows, dtype=np.float64).reshape(-1, len(header))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a table of numbers, found {error}") from None
    return dict(zip(header, values.T, strict=True))


def read_attention_maps(
    folder: Path, slide_id: str, count: int
) -> dict[str, Float[np.ndarray, " n"]]:
    """The attention of each class or head, where the stage left it: `<model> <map>` -> (N,).

    Args:
        folder: of the heatmaps; mil_predict leaves `attention/` beside it.
        slide_id: of the slide.
        count: number of its scored tiles, N.

    Raises:
        UserError: maps of other tiles.
    """
    places = (root / "attention" / f"{slide_id}.h5" for root in (folder, folder.parent))
    path = next((path for path in places if path.is_file()), None)
    found: dict[str, np.ndarray] = {}
    if path is None:
        return found
    with open_hdf5(path, "attention maps") as file:
        for model in (name for name in file if name != "coords"):
            weights = get_dataset(file, f"{model}/weights")[:]
            names = file[model].attrs["names"]
            if weights.shape != (len(names), count):
                raise UserError(
                    f"{path}: expected maps of the {count} scored tiles, found {weights.shape}; "
                    "draw the heatmap of this slide again"
                )
            found |= {f"{model} {name}": row for name, row in zip(names, weights, strict=True)}
    return found


def make_colours() -> dict[str, str]:
    """256 colours from low to high, packed as 0xBBGGRR."""
    from matplotlib import colormaps  # loads for a second

    rgb = (colormaps[COLOURS](np.arange(256))[:, :3] * 255).round().astype(np.uint32)
    return pack_array(rgb[:, 0] | rgb[:, 1] << 8 | rgb[:, 2] << 16, "uint32")
