"""One HTML page on a pre-training run: curves, settings, views, attention, neighbours, planes.

    python -m patch_encoder.pretrain_report run=runs/pretrain output=runs/pretrain/report

Reads the run directory of pretrain_dino, also of one that still trains, and the slides that it was
trained on. Writes `<output>/pretraining.html`, which needs no network and no other file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from patch_encoder.cohort.labels import read_labels
from patch_encoder.extraction.keys import DeviceKeys
from patch_encoder.models.encoders import PixelEncoder
from patch_encoder.pretrain_page.attention import describe_maps, has_class_attention, make_maps
from patch_encoder.pretrain_page.curves import PANELS, draw_panels
from patch_encoder.pretrain_page.figures import figure_uri
from patch_encoder.pretrain_page.gallery import Gallery, make_gallery
from patch_encoder.pretrain_page.neighbours import scale_to_unit
from patch_encoder.pretrain_page.projection import draw_planes
from patch_encoder.pretrain_page.run_folder import PretrainingFolder, load_network, read_run
from patch_encoder.pretrain_page.slide_map import draw_first_slide
from patch_encoder.pretrain_page.tile_maps import draw_tile_maps
from patch_encoder.pretrain_page.tile_sample import (
    TileSample,
    encode_tiles,
    measure_colours,
    read_sample,
    resize_tiles,
)
from patch_encoder.probing.pictures import read_picture
from patch_encoder.probing.tile_sets import TileSet, read_picture_set
from patch_encoder.selfdistill.view_figure import draw_view_figure
from patch_encoder.selfdistill.view_recipe import ViewRecipe
from patch_encoder.tile_stream.sources import TileSource, digest_sources
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.device import pick_device, pick_precision
from wsi_common.figures import jpeg_uri, svg_uri
from wsi_common.files import write_text
from wsi_common.pages import fill_template
from wsi_common.processes.pool import pick_workers

logger = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
SHOWN = 5  # tiles whose views and maps are drawn
FEATURES, COLOUR = "features", "mean colour"


@dataclass
class Config(DeviceKeys):
    """Keys of the page on a pre-training run."""

    run: str = key(REQUIRED, "run directory; of pretrain_dino", path=True)
    output: str = key(REQUIRED, "where the results are written; pretraining.html", runtime=True)
    slides: str = key(
        "", "slide file, or folder tree of slides; empty: where the run found them", path=True
    )
    coords: str = key("", "folder of coordinates files; empty: where the run found them", path=True)
    labels: str = key(
        "", "labels.csv of the cohort; colours the tiles; empty: that of the run", path=True
    )
    tile_set: str = key(
        "",
        "labelled tiles; pictures as for probe_tiles, whose features are shown by label; empty: "
        "none",
        path=True,
    )
    where: str = key(
        "", "regular expression; only tiles with a match in their name are taken; empty: all"
    )
    tiles: int = key(
        400, "tiles of the run that are encoded, and as many of tile_set at most", least=2
    )
    slide_tiles: int = key(
        2000,
        "most tiles of the whole-slide map; of larger slides evenly spread ones are taken",
        least=1,
    )
    seed: int = key(0, "seed of everything that is drawn at random")
    title: str = key("Pre-training", "title of the page")
    workers: int | None = key(
        None,
        "worker processes; they read tiles; null: one per core, at most 8; 0: the main process",
        runtime=True,
    )


@dataclass
class PageMaker:
    """What all sections of one page have in common."""

    config: Config
    run: PretrainingFolder
    sources: list[TileSource]
    recipe: ViewRecipe
    encoder: PixelEncoder
    device: torch.device
    workers: int

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """Features (N, D) of tiles (N, H, W, 3)."""
        precision = pick_precision(self.config.precision, self.device)
        side = self.recipe.global_size
        return encode_tiles(self.encoder, pictures, side, self.device, precision)

    def map(self, pictures: np.ndarray) -> np.ndarray:
        """Maps (N, heads, h, w) of tiles, float32."""
        tiles = resize_tiles(pictures, self.recipe.global_size).to(self.device)
        return make_maps(self.encoder.to(self.device), tiles).float().cpu().numpy()


def open_page(config: Config) -> PageMaker:
    """Read the run, find its slides and build its network."""
    run = read_run(config.run, config.slides, config.coords)
    device = pick_device(config.device)
    workers = pick_workers(config.workers, run.settings.read_timeout)
    problems: dict[str, str] = {}
    sources = run.settings.find(problems, workers)
    for name, reason in problems.items():
        logger.warning("%s is left out: %s", name, reason)
    encoder, recipe = load_network(run)
    return PageMaker(config, run, sources, recipe, encoder, device, workers)


def draw_curves(page: PageMaker) -> list[dict[str, str]]:
    """The panels of the values that the run has logged."""
    settings = page.run.settings
    steps, prototypes = settings.count_steps(page.sources), settings.network.out_dim
    return draw_panels(PANELS, page.run.lines, steps, prototypes)


def draw_views(page: PageMaker) -> str:
    """The views of the run's first tiles."""
    shown = read_sample(
        page.run.settings, page.sources, SHOWN, workers=page.workers, with_context=True
    )
    seed = page.run.settings.seed
    return figure_uri(
        draw_view_figure(shown.tiles, shown.context, shown.indices, page.recipe, seed)
    )


def draw_attention(page: PageMaker, sample: TileSample) -> dict[str, Any]:
    """Maps of a handful of tiles and of a whole slide."""
    pictures = sample.pictures()[:SHOWN]
    figure = draw_tile_maps(pictures, page.map(pictures))
    drawn = draw_first_slide(page.sources, page.config.slide_tiles, page.map)
    return {
        "what": describe_maps(page.encoder.network),
        "is_attention": has_class_attention(page.encoder.network),
        "tiles": figure_uri(figure),
        "columns": len(figure.axes) // len(pictures),
        "slide": drawn,
        "overview": jpeg_uri(drawn.overview),
        "map": jpeg_uri(drawn.map),
    }


def name_labels(page: PageMaker, sample: TileSample) -> list[str]:
    """Label of each tile's slide; empty where it is not known."""
    file = page.config.labels or page.run.settings.labels
    labels = {record.slide_id: record.label for record in read_labels(file)} if file else {}
    return [labels.get(slide, "") for slide in sample.ids]


def draw_tiles_of_run(page: PageMaker, sample: TileSample) -> tuple[Gallery, str]:
    """Neighbours and planes of the run's tiles."""
    pictures, labels = sample.pictures(), name_labels(page, sample)
    groupings: dict[str, Sequence[str]] = {"slide": sample.slides}
    if any(labels):
        groupings["label"] = [label or "unknown" for label in labels]
    return draw_tiles(page, pictures, sample.slides, labels, groupings)


def draw_tile_set(page: PageMaker) -> tuple[TileSet, Gallery, str] | None:
    """Neighbours and planes of labelled pictures, at most `tiles` of them, drawn at random."""
    config = page.config
    if not config.tile_set:
        return None
    labelled = read_picture_set(config.tile_set, config.where)
    order = np.random.default_rng(config.seed).permutation(len(labelled))[: config.tiles]
    chosen = [labelled.tiles[row] for row in sorted(order.tolist())]
    side = page.recipe.global_size
    pictures = np.stack(
        [
            cv2.resize(read_picture(tile.path), (side, side), interpolation=cv2.INTER_AREA)
            for tile in chosen
            if tile.path is not None
        ]
    )
    labels, groups = [tile.label for tile in chosen], [tile.group for tile in chosen]
    return labelled, *draw_tiles(page, pictures, groups, labels, {"label": labels})


def draw_tiles(
    page: PageMaker,
    pictures: np.ndarray,
    groups: Sequence[str],
    labels: Sequence[str],
    groupings: dict[str, Sequence[str]],
) -> tuple[Gallery, str]:
    """The gallery of neighbours, and the planes as a picture."""
    features, seed = page.encode(pictures), page.config.seed
    spaces = {FEATURES: scale_to_unit(features), COLOUR: measure_colours(pictures)}
    gallery = make_gallery(pictures, spaces, list(groups), list(labels), seed)
    return gallery, svg_uri(draw_planes(features, groupings, seed))


def render_page(page: PageMaker) -> str:
    """The HTML."""
    config, run = page.config, page.run
    sample = read_sample(run.settings, page.sources, config.tiles, workers=page.workers)
    digest = digest_sources(page.sources)
    return fill_template(
        TEMPLATES,
        "pretraining.html.j2",
        title=config.title,
        run=run,
        epoch=max((line["epoch"] for line in run.lines if "step" not in line), default=0),
        slides=len(page.sources),
        changed=bool(run.corpus) and run.corpus != digest,
        curves=draw_curves(page),
        views=draw_views(page),
        attention=draw_attention(page, sample),
        of_run=draw_tiles_of_run(page, sample),
        of_set=draw_tile_set(page),
        with_umap=find_spec("umap") is not None,
    )


def main(config: Config) -> int:
    page = open_page(config)
    target = Path(config.output) / "pretraining.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, render_page(page))
    size = target.stat().st_size / 1e6
    logger.info("pretrain_report: %d slides, %.1f MB: %s", len(page.sources), size, target)
    return 0


if __name__ == "__main__":
    launch(main, Config)
