"""The layers of a slide's page: which files of which stages, from the lowest to the highest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch_encoder.viewer.facts import list_predictions
from patch_encoder.viewer.heat import read_heat
from patch_encoder.viewer.shapes import read_shapes
from wsi_common.errors import UserError


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer.

    Attributes:
        key: of the configuration that names its folder.
        name: for people.
        opacity: at first.
        filled: whether areas are filled; else their outlines are drawn.
    """

    key: str
    name: str
    opacity: float
    filled: bool = False


HEAT = LayerKind("heat", "attention", 0.5)
KINDS = (
    LayerKind("grade_maps", "grades", 0.45, filled=True),
    HEAT,
    LayerKind("outlines", "tissue", 1.0),
    LayerKind("detections", "detections", 1.0),
    LayerKind("mitoses", "mitoses", 1.0),
)


@dataclass(frozen=True)
class SlideLayers:
    """What a slide's page shows over the slide, as plain values, and the facts that came with
    it.
    """

    layers: list[dict[str, Any]]
    facts: dict[str, str]


def read_layers(
    folders: Mapping[str, str], slide_id: str, extent: tuple[int, int], bounds: tuple[int, int]
) -> SlideLayers:
    """Read the layers of a slide that are there.

    Args:
        folders: key of the configuration -> folder; an empty one is not used.
        slide_id: of the slide.
        extent: (width, height) of the slide, level-0 px.
        bounds: `Slide.bounds`.

    Raises:
        UserError: broken files, or files of another slide.
    """
    layers, facts = [], dict[str, str]()
    for kind in KINDS:
        folder = folders.get(kind.key)
        if not folder:
            continue
        about = {"id": kind.key, "name": kind.name, "opacity": kind.opacity, "on": True}
        if kind is HEAT:
            found = read_heat(Path(folder), slide_id, extent)
            if found is not None:
                heat, record = found
                name = str(heat.pop("what"))
                layers.append(about | {"kind": "heat", "name": name} | heat)
                facts |= list_predictions(record)
            continue
        path = find_shapes(Path(folder), slide_id)
        if path is not None:
            shapes = read_shapes(path, bounds)
            layers.append(about | {"kind": "shapes", "filled": kind.filled} | shapes)
    if {"grade_maps", HEAT.key} <= {layer["id"] for layer in layers}:
        # two layers of colour over all tissue cannot be read at once
        next(layer for layer in layers if layer["id"] == HEAT.key)["on"] = False
    return SlideLayers(layers, facts)


def find_shapes(folder: Path, slide_id: str) -> Path | None:
    """The slide's GeoJSON: in the folder, or in `geojson/` below it, where the stages put it."""
    paths = (folder / "geojson" / f"{slide_id}.geojson", folder / f"{slide_id}.geojson")
    return next((path for path in paths if path.is_file()), None)


def check_layers(folders: Mapping[str, str], slide_ids: Sequence[str]) -> None:
    """Refuse a folder that has nothing of any of the slides: it is likely another one's.

    Raises:
        UserError: which folder.
    """
    for kind in KINDS:
        folder = Path(folders.get(kind.key) or "")
        if not folders.get(kind.key):
            continue
        if kind is HEAT:
            ending = "records/<slide_id>.json"
            found = any((folder / "records" / f"{name}.json").is_file() for name in slide_ids)
        else:
            ending = "geojson/<slide_id>.geojson or <slide_id>.geojson"
            found = any(find_shapes(folder, name) for name in slide_ids)
        if not found:
            raise UserError(
                f"{kind.key}={folder}: expected {ending} of the {len(slide_ids)} slides, found "
                "none; give the output folder of the stage"
            )
