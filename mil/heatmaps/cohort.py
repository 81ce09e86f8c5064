"""Draws the slides of a cohort: judged one after the other on the device, drawn in processes of
their own, skipped where they are there; and the pages over all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import nn

from mil.datasets.case_bags import CaseSlide, open_in_case
from mil.heatmaps.attention_maps import digest_weights
from mil.heatmaps.drawing import make_colour_bar
from mil.heatmaps.pages import write_pages
from mil.heatmaps.scores import TileScores
from mil.heatmaps.settings import Drawing
from mil.heatmaps.slide import Inputs, draw_slide, score_slide
from mil.heatmaps.sources import SlidePrediction, Source
from mil.tasks.base import Task
from mil.tasks.keys import SlideKeys
from mil.tasks.table import task_from_dict
from mil.training.engine import load_trained_model
from patch_encoder.bags.bag import COORDS_REMEDY
from patch_encoder.bags.paths import find_coordinates
from patch_encoder.cohort.failures import Failures
from patch_encoder.slides.names import check_fingerprint
from wsi_common.errors import UserError
from wsi_common.files import atomic_path, read_json, safe_id, sha256_file, write_json
from wsi_common.memory import is_out_of_memory
from wsi_common.processes.pool import Lost, Raised, run_jobs
from wsi_common.progress import progress
from wsi_common.provenance import can_reuse

logger = logging.getLogger(__name__)
# a slide, its files, and what decides its pictures
Pending = tuple[SlidePrediction, Inputs, dict[str, Any]]
Score = Callable[[SlidePrediction, Inputs], TileScores]


@dataclass(frozen=True)
class DrawingJob:
    """A slide to draw; `scores` is an error where it could not be judged."""

    judged: SlidePrediction
    inputs: Inputs
    stamp: dict[str, Any]
    scores: TileScores | str


def made_from(
    judged: SlidePrediction, inputs: Inputs, drawing: Drawing, weights: str = ""
) -> dict[str, Any]:
    """What decides a slide's files: weights, bag, the slide's fingerprint, settings.

    Raises:
        UserError: a bag that cannot be read, or that is of another slide.
    """
    seen = open_in_case(CaseSlide(judged.slide_id, inputs.bag), inputs.case)
    bag = seen.own
    stored = str(bag.attributes.get("slide_fingerprint", ""))
    found = {
        "weights": weights or digest_weights(judged.checkpoint),
        "bag": bag.digest(),
        "slide": check_fingerprint(inputs.slide, stored, "its features") if inputs.slide else "",
        "mpp": inputs.mpp,
        "tissue": sha256_file(inputs.tissue) if inputs.tissue else "",
    }
    if inputs.coords:
        found["coords"] = sha256_file(inputs.coords)
    if inputs.case:
        found["case"] = {name: bag.digest() for name, bag in seen.parts.items()}
    return found | {"drawing": asdict(drawing)}


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
    are in memory.

    Args:
        pending: slides with what they are drawn from, fold by fold.
        score: scores the tiles of a slide.
    """

    def __init__(self, pending: Sequence[Pending], score: Score) -> None:
        self._pending, self._score = pending, score

    def __len__(self) -> int:
        return len(self._pending)

    def __getitem__(self, number: int) -> DrawingJob:
        judged, inputs, stamp = self._pending[number]
        try:
            scores: TileScores | str = self._score(judged, inputs)
        except (UserError, OSError) as error:
            scores = str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            scores = f"{inputs.bag}: expected memory for its tiles, found none left; use device=cpu"
        return DrawingJob(judged, inputs, stamp, scores)

    def name(self, number: int) -> str:
        """Id of a slide."""
        return self._pending[number][0].slide_id


class FoldScorer:
    """Scores each slide by the model of its own checkpoint; one model is in memory.

    Args:
        drawing: settings.
        device: where the models run.
    """

    def __init__(self, drawing: Drawing, device: torch.device) -> None:
        self._drawing = drawing
        self._load = lru_cache(maxsize=1)(partial(load_model, device=device))

    def __call__(self, judged: SlidePrediction, inputs: Inputs) -> TileScores:
        """The scores of a slide."""
        return score_slide(judged, inputs, *self._load(judged.checkpoint), self._drawing)


def load_model(checkpoint: Path, device: torch.device) -> tuple[nn.Module, Task, dict[str, Any]]:
    """A trained classifier, its task, and the configuration in its checkpoint."""
    model, content = load_trained_model(checkpoint, device)
    return model, task_from_dict(content["config"]["task"]), content["config"]


def draw_one(job: DrawingJob, output: Path, task: Task, drawing: Drawing) -> None:
    """Draw a judged slide.

    Raises:
        UserError: the slide cannot be used, or could not be judged.
    """
    if isinstance(job.scores, str):
        raise UserError(job.scores)
    draw_slide(output, job.judged, job.inputs, job.scores, task, drawing, job.stamp)


def find_inputs(
    keys: SlideKeys, outlines: str, chosen: Sequence[SlidePrediction], bags: Mapping[str, Path]
) -> dict[str, Inputs]:
    """Bag, slide, mpp and outline of every slide that has a bag, and where slides are given a
    slide.
    """
    slides, mpps = keys.find_slides(bags)

    def find_coords(bag: Path) -> Path | None:
        needed = keys.coords or bag.suffix == ".pt"
        return find_coordinates(bag, keys.coords) if needed else None

    def find_case(name: str) -> CaseSlide:
        return CaseSlide(name, bags.get(name), find_coords(bags[name]) if name in bags else None)

    found = {}
    for judged in chosen:
        name = safe_id(judged.slide_id)
        if name in bags and (name in slides or not keys.slides):
            outline = Path(outlines) / f"{name}.geojson" if outlines else None
            tissue = outline if outline is not None and outline.is_file() else None
            files = (bags[name], slides.get(name), mpps.get(name), tissue, find_coords(bags[name]))
            found[name] = Inputs(*files, tuple(map(find_case, judged.case)))
    plain = [given for given in found.values() if given.bag.suffix == ".pt"]
    lost = [given.bag for given in plain if given.coords is None]
    if lost and len(lost) == len(found):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(
            f"{lost[0]}{more}: expected coordinates to place their tiles, which .pt files have "
            f"none of; {COORDS_REMEDY}"
        )
    return found


def find_pending(
    output: Path,
    chosen: Sequence[SlidePrediction],
    inputs: Mapping[str, Inputs],
    made_from: Callable[[SlidePrediction, Inputs], dict[str, Any]],
    failures: Failures,
    *,
    overwrite: bool,
) -> list[Pending]:
    """The slides that are not drawn yet from the same; those that cannot be are listed.

    Args:
        output: folder of the pages.
        chosen: slides to draw; those without inputs are passed over.
        inputs: slide id -> its files.
        made_from: what decides the files of a slide.
        failures: gets the slides whose bag or slide cannot be used.
        overwrite: draw those again that were drawn from something else.
    """
    pending: list[Pending] = []
    for judged in chosen:
        name = judged.slide_id
        if name not in inputs:
            continue
        try:
            stamp = made_from(judged, inputs[name])
        except UserError as error:  # its bag cannot be read, or is of another slide
            failures.add(name, str(error))
            continue
        if not is_done(output, name, stamp, overwrite):
            pending.append((judged, inputs[name], stamp))
    return pending


def draw_all(
    output: Path,
    source: Source,
    jobs: Scored,
    drawing: Drawing,
    workers: int,
    read_timeout: float,
    failures: Failures,
) -> None:
    """Judge slides here, on the device, and draw them in processes that do nothing but read and
    draw.
    """
    with atomic_path(output / "pictures" / "colours.png") as temporary:
        make_colour_bar(drawing.colours, 8).save(temporary, "PNG")
    cv2.setNumThreads(1)  # one core a process; before the fork, which takes no threads along
    work = partial(draw_one, output=output, task=source.task, drawing=drawing)
    outcomes = run_jobs(work, jobs, workers, read_timeout)
    for number, result in progress(outcomes, "heatmaps", len(jobs), "slides"):
        if isinstance(result, (Lost, Raised)):
            failures.add(jobs.name(number), result.reason)


def finish(output: Path, source: Source, failures: Failures, title: str) -> None:
    """Pages and summary.json over all slides that were drawn, now or before."""
    failed = {row["slide"]: row["error"] for row in failures.rows}
    paths = [output / "records" / f"{judged.slide_id}.json" for judged in source.slides]
    records = {
        path.stem: read_json(path, "a slide's record")
        for path in paths
        if path.is_file() and path.stem not in failed
    }
    numbers = write_pages(output, source, records, failed, title)
    summary = {"model": source.title, "task": source.task.variant}
    summary |= {"classes": list(source.task.names), "slides": len(source.slides)}
    write_json(output / "summary.json", summary | {"drawn": len(records), **numbers})
    logger.info(
        "heatmap: %d slides drawn, %d failed: %s", len(records), len(failed), output / "index.html"
    )
