"""One HTML page on the region features of a cohort: slides like this one, and the prototypes of
each slide.

    python -m patch_encoder.region_report features=runs/features/slpd slides=cohort/slides
    output=runs/regions_report

Reads the bags of extract_regions. Writes `<output>/regions.html`, which needs no network and no
other file, and `<output>/neighbours.csv` with the neighbours of every slide.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch_encoder.bags.paths import list_bags
from patch_encoder.cohort.labels import read_labels
from patch_encoder.cohort.slide_files import find_slides
from patch_encoder.prototypes.keys import CENTRES
from patch_encoder.region_page.region_vectors import read_region_vectors
from patch_encoder.region_page.retrieval import (
    Retrieval,
    choose_shown,
    find_shown,
    measure_agreements,
    retrieve,
)
from patch_encoder.region_page.sections import SectionMaker
from patch_encoder.region_page.slide_pictures import SlidePictures
from patch_encoder.region_page.training_curves import draw_training
from patch_encoder.tiles.coordinates import tile_pattern_of
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.files import write_csv, write_text
from wsi_common.pages import fill_template

logger = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
COLUMNS = ("slide_id", "place", "neighbour", "similarity")


@dataclass
class Config:
    """Keys of the page on region features."""

    features: str = key(
        REQUIRED, "folder of feature bags; of extract_regions, a row per region", path=True
    )
    slides: str = key(REQUIRED, "slide file, or folder tree of slides", path=True)
    output: str = key(REQUIRED, "where the results are written; regions.html", runtime=True)
    run: str = key(
        "", "run directory; of pretrain_slpd, whose curves are shown, too; empty: none", path=True
    )
    labels: str = key(
        "",
        "labels.csv of the cohort; only its slides are taken, patients are kept apart, and "
        "neighbours with the same label are marked",
        path=True,
    )
    show: list[str] = key([], "ids of the slides that are shown; empty: drawn at random")
    queries: int = key(6, "slides that are shown where show does not name them", least=1)
    neighbours: int = key(3, "similar slides of each slide", least=1)
    clusters: int = key(4, "prototypes of a slide, K", least=1)
    min_regions: int = key(
        8, "regions that a slide needs to be clustered; slides with fewer are left out", least=1
    )
    centre: str = key(
        "none",
        "slide: the mean of a slide's vectors is taken off before they are compared, so that a "
        "common offset such as the stain does not make slides neighbours",
        choices=CENTRES,
    )
    seed: int = key(0, "seed of everything that is drawn at random")
    title: str = key("Regions", "title of the page")


def write_neighbours(path: Path, retrieval: Retrieval) -> None:
    """The neighbours of every slide, with the mean cosine of matched prototypes."""
    names = retrieval.regions.slides
    rows = [
        {
            "slide_id": names[slide],
            "place": place + 1,
            "neighbour": names[other],
            "similarity": f"{retrieval.similarity(slide, place):.4f}",
        }
        for slide in retrieval.kept
        for place, other in enumerate(retrieval.neighbours(slide))
    ]
    write_csv(path, COLUMNS, rows)


def describe(retrieval: Retrieval) -> dict[str, Any]:
    """The numbers at the head of the page."""
    regions, kept = retrieval.regions, set(retrieval.kept)
    left_out = [name for slide, name in enumerate(regions.slides) if slide not in kept]
    return {
        "encoder": regions.encoder,
        "slides": len(regions.slides),
        "patients": len(set(regions.cases)),
        "regions": int(regions.counts.sum()),
        "width": regions.vectors.shape[1],
        "left_out": left_out,
        "agreement": measure_agreements(retrieval),
    }


def render_page(config: Config, retrieval: Retrieval, maker: SectionMaker) -> str:
    """The HTML."""
    shown = (
        find_shown(retrieval, config.show)
        if config.show
        else choose_shown(retrieval, config.queries, config.seed)
    )
    return fill_template(
        TEMPLATES,
        "regions.html.j2",
        config=config,
        about=describe(retrieval),
        queries=[maker.draw_query(slide) for slide in shown],
        gallery=[maker.draw_gallery(slide) for slide in shown],
        curves=draw_training(config.run),
        problems=maker.pictures.problems,
    )


def main(config: Config) -> int:
    records = {r.slide_id: r for r in read_labels(config.labels)} if config.labels else None
    regions = read_region_vectors(config.features, records)
    retrieval = retrieve(
        regions,
        config.clusters,
        config.min_regions,
        config.neighbours,
        config.centre,
        config.seed,
    )
    pattern = tile_pattern_of(list_bags(config.features).values())
    found = find_slides(config.slides, pattern, wanted=set(regions.slides))
    mpps = {name: record.mpp for name, record in (records or {}).items()}
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with SlidePictures(found.slides, mpps, pattern) as pictures:
        html = render_page(config, retrieval, SectionMaker(retrieval, pictures))
    write_text(output / "regions.html", html)
    write_neighbours(output / "neighbours.csv", retrieval)
    line = "region_report: %d slides with %d regions, %.1f MB: %s"
    logger.info(line, len(regions.slides), int(regions.counts.sum()), len(html) / 1e6, output)
    return 0


if __name__ == "__main__":
    launch(main, Config)
