"""Turns one slide's bag into its files: heatmap, layers for the page, gallery, GeoJSON, TIFF, CSV.

- `heatmaps/<slide>.png`: the slide with its heat, colour bar and scale bar
- `pictures/<slide>/`: overview.jpg, heat.png (transparent), thumbnail.jpg, gallery.jpg, strip.jpg
  and tiles/
- `scores/<slide>.csv`: one row per tile
- `geojson/`, `tiff/`: on request
- `records/<slide>.json`: what the pages show, and what the files were made from; written last
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mil.datasets.case_bags import CaseSlide, open_in_case
from mil.datasets.covariates import encode_stored
from mil.heatmaps.drawing import Heat, add_frame, blend, draw_cover, draw_outlines, make_heat_layer
from mil.heatmaps.gallery import choose_tiles, save_jpeg, write_gallery
from mil.heatmaps.pyramid import write_heat_pyramid
from mil.heatmaps.scores import TileScores, compute_percentile_ranks, score_bag, write_scores
from mil.heatmaps.settings import Drawing, choose_picture_side
from mil.heatmaps.sources import SlidePrediction, list_facts
from mil.tasks.base import Task
from mil.training.bag_record import check_bag
from patch_encoder.slides import Slide, open_slide
from patch_encoder.slides.overview import read_overview
from patch_encoder.tiles.coordinates import Coordinates
from patch_encoder.tiles.geojson import make_tiles_geojson
from patch_encoder.tissue.geojson import Shape, read_geojson
from wsi_common.errors import UserError
from wsi_common.files import atomic_path, write_json, write_text

PAGE_SIDE, THUMBNAIL = 1100, 200  # px of the pictures in a slide's page and in the cohort's table
# precision of a run -> how far its logits may be from those that are computed here, in float32, as
# a share of their size where that is more than 1; rounding makes less
TOLERANCE = {"fp32": 0.01, "bf16": 0.1}
# a probability nearer to 0 or 1 has a logit that is only rounding
SURE = 1e-9


@dataclass(frozen=True)
class Inputs:
    """Files of one slide; slide, tissue and coordinates (which most bags have) may be missing.

    `case` has the slides that the model sees as one bag, in its order; empty: this one alone.
    """

    bag: Path
    slide: Path | None
    mpp: float | None
    tissue: Path | None
    coords: Path | None = None
    case: tuple[CaseSlide, ...] = ()


def score_slide(
    judged: SlidePrediction,
    inputs: Inputs,
    model: nn.Module,
    task: Task,
    config: Mapping[str, Any],
    drawing: Drawing,
) -> TileScores:
    """Score the slide's tiles.

    Args:
        judged, inputs: the slide.
        model, task, config: of the checkpoint that judges it.
        drawing: settings.

    Raises:
        UserError: a bag that cannot be used, or that is not the one that was predicted.
    """
    case = [one._replace(coords=None) for one in inputs.case]  # digests are of the bags alone
    seen = open_in_case(CaseSlide(judged.slide_id, inputs.bag), case)
    for slide_id, bag in seen.parts.items():
        check_bag(slide_id, bag, config)
    weights = next(model.parameters(), torch.empty(0))
    slide = CaseSlide(judged.slide_id, inputs.bag, inputs.coords)
    wanted = (drawing.value, drawing.of_class, weights.device)
    covariates = encode_stored(config, judged.checkpoint, judged.slide_id)
    scores = score_bag(model, task, slide, *wanted, covariates, inputs.case)
    _check_prediction(judged, scores, task, config["precision"])
    return scores


def draw_slide(
    output: Path,
    judged: SlidePrediction,
    inputs: Inputs,
    scores: TileScores,
    task: Task,
    drawing: Drawing,
    made_from: dict[str, Any],
) -> None:
    """Write all files of a judged slide.

    Raises:
        UserError: a slide that cannot be used.
    """
    geometry = scores.coordinates.geometry
    opened = (
        nullcontext()
        if inputs.slide is None
        else open_slide(inputs.slide, inputs.mpp, geometry.tile_pattern)
    )
    with opened as slide:
        extent = _find_extent(slide, scores.coordinates)
        mpp = (slide.mpp if slide is not None else geometry.mpp) or 0.0
        heat = make_heat(scores, drawing)
        title = f"{judged.slide_id}   {describe_call(judged, scores, task)}"
        bounds = slide.bounds if slide is not None else geometry.bounds
        tissue = read_geojson(inputs.tissue, bounds) if inputs.tissue is not None else None
        side = choose_picture_side(drawing, slide, extent, mpp)
        overview = (
            read_overview(slide, side).pixels if slide is not None else make_white(extent, side)
        )
        files = write_pictures(output, judged.slide_id, overview, heat, extent, mpp, tissue, title)
        chosen = choose_tiles(scores, drawing.top, drawing.low)
        if slide is not None:
            write_gallery(output / "pictures" / judged.slide_id, slide, scores, chosen, title)
        if drawing.tiff:
            target = output / "tiff" / f"{judged.slide_id}.tiff"
            write_heat_pyramid(target, slide, heat, extent, mpp, drawing.tiff_max_side)
    if drawing.geojson:
        geometry = replace(geometry, bounds_x=bounds[0], bounds_y=bounds[1])
        write_text(
            output / "geojson" / f"{judged.slide_id}.geojson",
            make_tiles_geojson(replace(scores.coordinates, geometry=geometry), scores.columns()),
        )
    write_scores(output / "scores" / f"{judged.slide_id}.csv", scores)
    record = {
        **list_facts(judged, task),
        "made_from": made_from,
        "tiles": len(scores.values),
        "mpp": mpp or None,
        "predictions": dict(zip(task.value_names, scores.slide.tolist(), strict=True)),
        "shown": scores.shown,
        "class_name": scores.class_name,
        "width": extent[0],
        "height": extent[1],
        "side": geometry.patch_size_level0,
        "tiles_half": count_tiles_for_half(scores.attention),
        "share": float(scores.attention.sum()),
        "together": scores.together,
        "gallery": slide is not None,
        "picture": list(files),
        "low": heat.low,
        "high": heat.high,
        "bar": heat.name,
        "chosen": [tile.record() for tile in chosen],
    }
    write_json(output / "records" / f"{judged.slide_id}.json", record)


def make_heat(scores: TileScores, drawing: Drawing) -> Heat:
    """Scale the values to lie between 0 and 1, with what the ends of the colour bar say.

    Percentile: rank / 100. Raw: attention over the highest of the slide or of its case, so that
    colours differ; a probability as it is; other numbers between the slide's lowest and highest.
    """
    values = scores.values
    of_class = f" of {scores.class_name}" if scores.class_name else ""
    what = "attention" if scores.shown == "attention" else f"{scores.shown}{of_class}, tile alone"
    least, most = float(values.min()), float(values.max())
    low, high, name = "0", "1", what
    if drawing.scale == "percentile":
        values = compute_percentile_ranks(values) / 100
        high, name = "100", f"percentile of {what}"
    elif scores.shown == "attention":
        values = values / scores.most
        whose = "slide" if scores.together == 1 else "case"
        high, name = f"{100 * scores.most:.3g} %", f"of the {whose}'s attention"
    elif scores.shown != "probability":
        values = (values - least) / ((most - least) or 1.0)
        low, high = f"{least:.3g}", f"{most:.3g}"
    tiles = scores.coordinates.coords, values, scores.coordinates.geometry.patch_size_level0
    return Heat(*tiles, low, high, name, drawing.colours, drawing.alpha)


def count_tiles_for_half(attention: np.ndarray) -> int:
    """Count the fewest tiles that hold half of the slide's attention: how concentrated it is."""
    half = (0.5 - 1e-12) * attention.sum()
    return int(np.searchsorted(np.cumsum(np.sort(attention)[::-1]), half) + 1)


def write_pictures(
    output: Path,
    slide_id: str,
    overview: np.ndarray,
    heat: Heat,
    extent: tuple[int, int],
    mpp: float,
    tissue: list[Shape] | None,
    title: str,
) -> tuple[int, int]:
    """Write the PNG, and beside it what the page shows; returns (width, height) of the latter's
    pictures.
    """
    scale = overview.shape[1] / extent[0], overview.shape[0] / extent[1]
    if heat_is_alone := bool((overview == 255).all()):
        heat = replace(heat, alpha=1.0)
    blended = blend(overview, heat, scale)
    if tissue is not None:
        outlines = [shape.outline for shape in tissue]
        rings = [ring for outline in outlines for ring in (outline.outer, *outline.holes)]
        blended = draw_outlines(blended, rings, scale)
    elif not heat_is_alone:
        blended = draw_cover(blended, heat, scale)
    second = f"{len(heat.coords):,} tiles"
    with atomic_path(output / "heatmaps" / f"{slide_id}.png") as temporary:
        framed = add_frame(blended, heat, title, second, mpp / scale[0] if mpp else None)
        framed.save(temporary, "PNG", compress_level=4)
    folder = output / "pictures" / slide_id
    small = Image.fromarray(overview)
    small.thumbnail((PAGE_SIDE, PAGE_SIDE), Image.Resampling.BOX)
    save_jpeg(folder / "overview.jpg", small, 82)
    with atomic_path(folder / "heat.png") as temporary:
        shrunk = small.width / extent[0], small.height / extent[1]
        layer = make_heat_layer(heat, small.size, shrunk)
        layer.quantize(128, Image.Quantize.FASTOCTREE).save(temporary, "PNG", optimize=True)
    thumbnail = Image.fromarray(blended)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    save_jpeg(folder / "thumbnail.jpg", thumbnail, 78)
    return small.size


def make_white(extent: tuple[int, int], side: int) -> np.ndarray:
    """Make a white picture, `side` px long, of the shape of the slide."""
    scale = side / max(extent)
    width, height = (max(1, round(length * scale)) for length in extent)
    return np.full((height, width, 3), 255, dtype=np.uint8)


def _find_extent(slide: Slide | None, coordinates: Coordinates) -> tuple[int, int]:
    """Find (width, height) of level 0: the slide's, else what the bag says, else as far as the
    tiles go.
    """
    if slide is not None:
        return slide.width, slide.height
    geometry = coordinates.geometry
    reach = coordinates.coords.max(0) + geometry.patch_size_level0
    return geometry.level0_width or int(reach[0]), geometry.level0_height or int(reach[1])


def _check_prediction(
    slide: SlidePrediction, scores: TileScores, task: Task, precision: str
) -> None:
    """Refuse a slide for which the model predicts something else than predictions.csv says.

    Probabilities are compared by their logits: a model that is sure of everything gives nearly the
    same ones for any bag.
    """
    found = zip(task.value_names, slide.predictions, scores.slide.tolist(), strict=False)
    for name, expected, value in found:
        what, pair = task.alone, (expected, value)
        if task.alone == "probability":
            what, pair = f"logit of {name}", (_logit(expected), _logit(value))
        if abs(pair[0] - pair[1]) > TOLERANCE[precision] * task.tolerance(pair[0]):
            raise UserError(
                f"slide {slide.slide_id}: expected a {what} of {pair[0]:.4g} as in "
                f"predictions.csv, found {pair[1]:.4g}; predictions, checkpoint and bag are not of "
                "one run: train again"
            )


def _logit(probability: float) -> float:
    share = min(max(probability, SURE), 1 - SURE)
    return math.log(share) - math.log1p(-share)


def describe_call(slide: SlidePrediction, scores: TileScores, task: Task) -> str:
    """Say what the model that the slide is drawn by makes of it: `label tumour, called normal
    (0.81)`, `event at 9, risk 0.3`.
    """
    label = f"{task.label_word} {slide.label}".strip() if slide.label else ""
    fold = f"fold {slide.fold}" if slide.others else ""
    words = (label, task.describe(scores.slide, slide.predicted), fold)
    return ", ".join(filter(None, words))
