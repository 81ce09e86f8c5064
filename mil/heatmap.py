"""Where a trained slide classifier looked: heatmaps, top tiles, and pages to look through a cohort.

    python -m mil.heatmap run=runs/abmil_fold0 features=runs/features/uni slides=cohort/slides
        output=runs/heatmaps
    python -m mil.heatmap run=runs/benchmark slides=cohort/slides output=runs/heatmaps
        feature_set=student model=abmil

Source: CLAM's heatmaps and top tiles (Lu, Williamson et al., Nature BME 2021). Different: any of
the models, no second pass over the slide (the bag's own tiles are drawn), any task (survival: the
risk), the slides of a benchmark are judged by the fold that tests them; where several do, as in
nested cross-validation, a slide is drawn by the first and counted in all.

Writes index.html, slides/<slide>.html, heatmaps/<slide>.png, scores/<slide>.csv, geojson/, tiff/ on
request, pictures/ (what the pages show), summary.json and failures.csv. Slides that are there are
skipped; pages are written anew each time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import nn

from mil.datasets.case_bags import CaseSlide
from mil.heatmaps.attention_maps import MapJob, check_maps, write_all_maps
from mil.heatmaps.cohort import (
    FoldScorer,
    Scored,
    draw_all,
    find_inputs,
    find_pending,
    finish,
    load_model,
    made_from,
)
from mil.heatmaps.settings import Drawing, check_drawing
from mil.heatmaps.slide import Inputs
from mil.heatmaps.sources import (
    SlidePrediction,
    Source,
    is_benchmark,
    read_from_benchmark,
    read_from_run,
)
from mil.tasks.keys import SlideKeys
from patch_encoder.bags.paths import list_bags
from patch_encoder.cohort.failures import Failures
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, group, key
from wsi_common.device import pick_device
from wsi_common.errors import UserError, did_you_mean
from wsi_common.processes.pool import pick_workers

logger = logging.getLogger(__name__)


@dataclass
class Config(SlideKeys):
    """Keys of the heatmaps."""

    run: str = key(REQUIRED, "run directory; of mil.train, or folder of mil.benchmark", path=True)
    output: str = key(
        REQUIRED, "where the results are written; index.html and the figures", runtime=True
    )
    features: str = key(
        "",
        "folder of feature bags; empty: those of the benchmark (a run directory needs it)",
        path=True,
    )
    outlines: str = key(
        "", "folder of tissue outlines <slide>.geojson, as tile_slides writes it", path=True
    )
    split: str = key(
        "test",
        "slides of a run directory; all: validation and unpredicted ones too",
        choices=("test", "val", "all"),
    )
    only: list[str] = key(
        [],
        "slide ids to draw; empty: all. The page lists the others without pictures",
        runtime=True,
    )
    feature_set: str = key("", "of a benchmark; empty: the best by its headline metric")
    model: str = key("", "slide classifier; of the benchmark; empty: its headline")
    seed: int | None = key(
        None,
        "seed of everything that is drawn at random; training seed of a benchmark; "
        "null: its first one",
    )
    drawing: Drawing = group(Drawing, "how slides are drawn")
    attention_maps: bool = key(
        False, "write attention/<slide>.h5; every map of the slide's model and its raw scores"
    )
    title: str = key("Heatmaps", "title of the page", runtime=True)
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    workers: int | None = key(
        None,
        "worker processes; one slide each; null: one per core, at most 8; 0: the main process, "
        "which a slide that crashes its reader ends",
        runtime=True,
    )
    threads: int = key(1, "CPU threads per process; of the model", runtime=True)
    read_timeout: float = key(
        300.0,
        "seconds without progress after which a slide is given up (not with workers=0)",
        runtime=True,
    )
    overwrite: bool = key(
        False,
        "replace results of other settings or inputs",
        runtime=True,
    )


def read_source(config: Config) -> tuple[Source, dict[str, Path]]:
    """The judged slides and the bags, checked against each other."""
    folder = Path(config.run)
    if is_benchmark(folder):
        if config.split != "test":
            raise UserError(
                f"split={config.split}: expected test for a benchmark, whose test slides are drawn"
            )
        chosen = (config.feature_set, config.model, config.seed, config.features)
        source = read_from_benchmark(folder, *chosen)
        return source, list_bags(source.features)
    if not config.features:
        raise UserError(
            "features: expected the folder of bags that the run was trained on, found none; add "
            "features=..."
        )
    bags = list_bags(config.features)
    return read_from_run(folder, config.features, bags, config.split), bags


def choose(source: Source, only: list[str]) -> list[SlidePrediction]:
    """The slides to draw."""
    known = [judged.slide_id for judged in source.slides]
    for name in (name for name in only if name not in known):
        raise UserError(
            f"only: slide '{name}' is none of the {len(known)} slides; {did_you_mean(name, known)}"
        )
    return [judged for judged in source.slides if not only or judged.slide_id in only]


def write_attention(
    config: Config,
    source: Source,
    chosen: list[SlidePrediction],
    inputs: dict[str, Inputs],
    device: torch.device,
    failures: Failures,
) -> None:
    """The attention maps of the chosen slides, each of the model that the slide is drawn by."""

    @lru_cache(maxsize=1)
    def load(checkpoint: Path) -> nn.Module:
        return load_model(checkpoint, device)[0]

    found = [judged for judged in chosen if judged.slide_id in inputs]
    if found:
        check_maps(load(found[0].checkpoint))
    files = {judged.slide_id: inputs[judged.slide_id] for judged in found}
    jobs = [
        MapJob(
            CaseSlide(judged.slide_id, files[judged.slide_id].bag),
            [judged.checkpoint],
            files[judged.slide_id].case,
        )
        for judged in found
    ]
    folder, names = Path(config.output) / "attention", source.task.names
    write_all_maps(folder, jobs, load, names, failures, overwrite=config.overwrite)


def main(config: Config) -> int:
    torch.set_num_threads(config.threads)
    output, failures = Path(config.output), Failures("heatmap")
    config.workers = pick_workers(config.workers, config.read_timeout)
    device = pick_device(config.device)
    source, bags = read_source(config)
    check_drawing(config.drawing, source.task)
    chosen = choose(source, config.only)
    inputs = find_inputs(config, config.outlines, chosen, bags)
    for name in (judged.slide_id for judged in chosen if judged.slide_id not in inputs):
        where = (
            f"a bag below {source.features}"
            if name not in bags
            else f"a slide below {config.slides}"
        )
        failures.add(name, f"expected {where}, found none")
    stamp = partial(made_from, drawing=config.drawing)
    pending = find_pending(output, chosen, inputs, stamp, failures, overwrite=config.overwrite)
    logger.info(
        "heatmap: %s: %d slides, %d drawn already",
        source.title,
        len(chosen),
        len(inputs) - len(pending),
    )
    if config.attention_maps:
        write_attention(config, source, chosen, inputs, device, failures)
    jobs = Scored(pending, FoldScorer(config.drawing, device))
    how = (config.workers, config.read_timeout)
    draw_all(output, source, jobs, config.drawing, *how, failures)
    finish(output, source, failures, config.title)
    return failures.write(output)


if __name__ == "__main__":
    launch(main, Config)
