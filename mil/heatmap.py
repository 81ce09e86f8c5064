"""Where a trained slide classifier looked: heatmaps, top tiles, and pages to look through a cohort.

    python -m mil.heatmap run=runs/mil/abmil_fold0 features=runs/features/uni slides=cohort/slides
    output=runs/heatmaps python -m mil.heatmap run=runs/benchmark slides=cohort/slides
    output=runs/heatmaps feature_set=student model=abmil

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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import nn

from mil.heatmaps.drawing import make_colour_bar
from mil.heatmaps.pages import write_pages
from mil.heatmaps.scores import TileScores
from mil.heatmaps.settings import Drawing, check_drawing
from mil.heatmaps.slide import Inputs, draw_slide, score_slide
from mil.heatmaps.sources import (
    SlidePrediction,
    Source,
    is_benchmark,
    read_from_benchmark,
    read_from_run,
)
from mil.tasks.base import Task
from mil.tasks.keys import SlideKeys
from mil.tasks.table import task_from_dict
from mil.training.engine import load_classifier
from patch_encoder.bags.bag import COORDS_REMEDY, open_bag
from patch_encoder.bags.paths import find_coordinates, list_bags
from patch_encoder.cohort.failures import Failures
from patch_encoder.slides.names import check_fingerprint
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, group, key
from wsi_common.device import pick_device
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import atomic_path, read_json, safe_id, sha256_file, write_json
from wsi_common.memory import is_out_of_memory
from wsi_common.processes.pool import Lost, Raised, pick_workers, run_jobs
from wsi_common.progress import progress
from wsi_common.provenance import can_reuse

logger = logging.getLogger(__name__)
# a slide, its files, and what decides its pictures
Pending = tuple[SlidePrediction, Inputs, dict[str, Any]]


@dataclass(frozen=True)
class DrawingJob:
    """A slide to draw; `scores` is an error where it could not be judged."""

    judged: SlidePrediction
    inputs: Inputs
    stamp: dict[str, Any]
    scores: TileScores | str


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


digest_weights = lru_cache(maxsize=1)(sha256_file)  # the slides of a fold share them


def made_from(judged: SlidePrediction, inputs: Inputs, drawing: Drawing) -> dict[str, Any]:
    """What decides a slide's files: weights, bag, the slide's fingerprint, settings.

    Raises:
        UserError: a bag that cannot be read, or that is of another slide.
    """
    bag = open_bag(inputs.bag)
    stored = str(bag.attributes.get("slide_fingerprint", ""))
    found = {
        "weights": digest_weights(judged.checkpoint),
        "bag": bag.digest(),
        "slide": check_fingerprint(inputs.slide, stored, "its features") if inputs.slide else "",
        "mpp": inputs.mpp,
        "tissue": sha256_file(inputs.tissue) if inputs.tissue else "",
    }
    if inputs.coords:
        found["coords"] = sha256_file(inputs.coords)
    return found | {"drawing": asdict(drawing)}


def find_inputs(
    config: Config, chosen: list[SlidePrediction], bags: dict[str, Path]
) -> dict[str, Inputs]:
    """Bag, slide, mpp and outline of every slide that has a bag, and where slides are given a
    slide.
    """
    slides, mpps = config.find_slides(bags)
    found = {}
    for judged in chosen:
        name = safe_id(judged.slide_id)
        if name in bags and (name in slides or not config.slides):
            outline = Path(config.outlines) / f"{name}.geojson" if config.outlines else None
            tissue = outline if outline is not None and outline.is_file() else None
            needed = config.coords or bags[name].suffix == ".pt"
            coords = find_coordinates(bags[name], config.coords) if needed else None
            found[name] = Inputs(bags[name], slides.get(name), mpps.get(name), tissue, coords)
    plain = [given for given in found.values() if given.bag.suffix == ".pt"]
    lost = [given.bag for given in plain if given.coords is None]
    if lost and len(lost) == len(found):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(
            f"{lost[0]}{more}: expected coordinates to place their tiles, which .pt files have "
            f"none of; {COORDS_REMEDY}"
        )
    return found


def is_done(output: Path, slide_id: str, wanted: dict[str, Any], overwrite: bool) -> bool:
    """Whether the slide was drawn from the same.

    Raises:
        UserError: it was drawn from something else.
    """
    path = output / "records" / f"{slide_id}.json"
    return can_reuse(
        path,
        lambda: read_json(path, "a slide's record").get("made_from", {}),
        wanted,
        "a drawing with other settings or inputs",
        overwrite=overwrite,
    )


class Scored(Sequence[DrawingJob]):
    """The slides that are left to draw, each judged when it is its turn: the scores of one slide
    are in memory, and one model.

    Args:
        pending: slides with what they are drawn from, fold by fold.
        drawing: settings.
        device: where the models run.
    """

    def __init__(self, pending: Sequence[Pending], drawing: Drawing, device: torch.device) -> None:
        self._pending, self._drawing = pending, drawing
        self._load = lru_cache(maxsize=1)(partial(load_model, device=device))

    def __len__(self) -> int:
        return len(self._pending)

    def __getitem__(self, number: int) -> DrawingJob:
        judged, inputs, stamp = self._pending[number]
        try:
            loaded = self._load(judged.checkpoint)
            scores: TileScores | str = score_slide(judged, inputs, *loaded, self._drawing)
        except (UserError, OSError) as error:
            scores = str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            scores = f"{inputs.bag}: expected memory for its tiles, found none left; use device=cpu"
        return DrawingJob(judged, inputs, stamp, scores)


def load_model(checkpoint: Path, device: torch.device) -> tuple[nn.Module, Task, dict[str, Any]]:
    """A trained classifier, its task, and the configuration in its checkpoint."""
    model, content = load_classifier(checkpoint, device)
    return model, task_from_dict(content["config"]["task"]), content["config"]


def draw_one(job: DrawingJob, output: Path, task: Task, drawing: Drawing) -> None:
    """Draw a judged slide.

    Raises:
        UserError: the slide cannot be used, or could not be judged.
    """
    if isinstance(job.scores, str):
        raise UserError(job.scores)
    draw_slide(output, job.judged, job.inputs, job.scores, task, drawing, job.stamp)


def draw_all(
    config: Config,
    source: Source,
    pending: Sequence[Pending],
    device: torch.device,
    failures: Failures,
) -> None:
    """Judge slides here, on the device, and draw them in processes that do nothing but read and
    draw.
    """
    cv2.setNumThreads(1)  # one core a process; before the fork, which takes no threads along
    jobs = Scored(pending, config.drawing, device)
    work = partial(draw_one, output=Path(config.output), task=source.task, drawing=config.drawing)
    outcomes = run_jobs(work, jobs, config.workers, config.read_timeout)
    for number, result in progress(outcomes, "heatmaps", len(jobs), "slides"):
        if isinstance(result, (Lost, Raised)):
            failures.add(pending[number][0].slide_id, result.reason)


def main(config: Config) -> int:
    torch.set_num_threads(config.threads)
    output, failures = Path(config.output), Failures("heatmap")
    config.workers = pick_workers(config.workers, config.read_timeout)
    device = pick_device(config.device)
    source, bags = read_source(config)
    check_drawing(config.drawing, source.task)
    chosen = choose(source, config.only)
    inputs = find_inputs(config, chosen, bags)
    pending: list[Pending] = []
    for judged in chosen:
        name = judged.slide_id
        if name not in inputs:
            where = (
                f"a bag below {source.features}"
                if name not in bags
                else f"a slide below {config.slides}"
            )
            failures.add(name, f"expected {where}, found none")
            continue
        try:
            stamp = made_from(judged, inputs[name], config.drawing)
        except UserError as error:  # its bag cannot be read, or is of another slide
            failures.add(name, str(error))
            continue
        if not is_done(output, name, stamp, config.overwrite):
            pending.append((judged, inputs[name], stamp))
    logger.info(
        "heatmap: %s: %d slides, %d drawn already",
        source.title,
        len(chosen),
        len(inputs) - len(pending),
    )
    with atomic_path(output / "pictures" / "colours.png") as temporary:
        make_colour_bar(config.drawing.colours, 8).save(temporary, "PNG")
    draw_all(config, source, pending, device, failures)
    finish(config, source, failures)
    return failures.write(output)


def finish(config: Config, source: Source, failures: Failures) -> None:
    """Pages and summary.json over all slides that were drawn, now or before."""
    output = Path(config.output)
    failed = {row["slide"]: row["error"] for row in failures.rows}
    paths = [output / "records" / f"{judged.slide_id}.json" for judged in source.slides]
    records = {
        path.stem: read_json(path, "a slide's record")
        for path in paths
        if path.is_file() and path.stem not in failed
    }
    numbers = write_pages(output, source, records, failed, config.title)
    summary = {"model": source.title, "task": source.task.variant}
    summary |= {"classes": list(source.task.names), "slides": len(source.slides)}
    write_json(output / "summary.json", summary | {"drawn": len(records), **numbers})
    logger.info(
        "heatmap: %d slides drawn, %d failed: %s", len(records), len(failed), output / "index.html"
    )


if __name__ == "__main__":
    launch(main, Config)
