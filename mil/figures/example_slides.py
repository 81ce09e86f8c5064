"""Example slides for the report: which ones to show, and the tiles that the classifier looked
at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from mil.datasets.bags import Sample
from mil.datasets.case_bags import CaseSlide, open_in_case
from mil.datasets.covariates import encode_stored
from mil.evaluation.runs import FinishedRun
from mil.figures.report import mark_tiles
from mil.tasks.base import Task
from mil.tasks.records import Verdict
from mil.training.bag_record import check_bag
from mil.training.engine import examine, load_trained_model
from patch_encoder.bags.bag import open_bag
from patch_encoder.bags.paths import find_coordinates
from patch_encoder.slides import open_slide
from patch_encoder.slides.names import check_fingerprint
from patch_encoder.slides.overview import read_overview
from patch_encoder.tiles.grid import read_tile
from wsi_common.figures import jpeg_uri

THUMBNAIL_SIDE = 460
T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """A test slide to show.

    Attributes:
        slide_id: the slide.
        fold: of the run that judged it.
        verdict: what the classifier makes of it.
    """

    slide_id: str
    fold: int
    verdict: Verdict


@dataclass(frozen=True)
class Group(Generic[T]):
    """What stands under one heading of the page, and the sentence that stands there where it is
    empty.
    """

    title: str
    none: str
    slides: list[T]


class ExampleSlide(NamedTuple):
    """A slide and its files; `mpp` where the slide does not say it, no bag: it is not there."""

    slide_id: str
    bag: Path | None
    slide: Path
    mpp: float | None = None


@dataclass(frozen=True)
class Example:
    """A chosen slide, or slide of a chosen case, with its pictures as data URIs.

    Attributes:
        choice: what was chosen.
        slide_id: what is drawn.
        tiles: of the slide.
        overview, top: pictures; the tiles with their attention.
        together: slides that the model sees as one bag.
        share: of the attention over all of these, what the slide has.
        slides: of the case; 0 where slides are predicted.
    """

    choice: Choice
    slide_id: str
    tiles: int
    overview: str
    top: list[tuple[str, float]]
    together: int = 1
    share: float = 1.0
    slides: int = 0


def choose_slides(runs: Sequence[FinishedRun], task: Task, each: int) -> list[Group[Choice]]:
    """Up to `each` slides that are called right and not negative, and as many errors; where nothing
    is called those of the highest and of the lowest rank.

    The most confident of both: what the classifier knows best, and what it gets wrong without
    doubt. A slide that several runs test (nested, repeated cross-validation) stands there once, see
    `_merge_runs`.
    """
    ranked = _merge_runs(
        [
            Choice(slide, run.test.fold, verdict)
            for run in runs
            for slide, verdict in zip(run.slides, task.verdicts(run.test), strict=True)
        ],
        task,
    )
    first, second = task.example_groups
    if not task.has_calls:
        chosen = sorted(ranked, key=lambda choice: (choice.verdict.rank, choice.slide_id))
        each = min(each, len(chosen) // 2)  # no slide in both groups
        return [
            Group(first, "No slide.", chosen[::-1][:each]),
            Group(second, "No slide.", chosen[:each]),
        ]
    choices = sorted(ranked, key=lambda choice: (-choice.verdict.rank, choice.slide_id))
    hits = [
        choice
        for choice in choices
        if choice.verdict.right and choice.verdict.label != task.negative
    ]
    errors = [choice for choice in choices if not choice.verdict.right]
    return [
        Group(
            first,
            f"No slide with a label other than {task.negative} was called right.",
            hits[:each],
        ),
        Group(second, "No test slide was called wrong.", errors[:each]),
    ]


def pick_slides(
    case: str, run: FinishedRun, by_slide: FinishedRun, unit: str, task: Task
) -> tuple[list[str], int]:
    """The slides of a chosen case that are looked at, and how many it has.

    All of them where the model sees them as one bag; of pooled slides the one whose own prediction
    is nearest to that of the case, which with `case_max` is the slide that it comes from.

    Args:
        case: as it is called in `run`.
        run, by_slide: the same test set by case and by slide.
        unit: one of mil.datasets.case_bags.UNITS.
        task: what the model was asked.
    """
    own = [number for number, row in enumerate(by_slide.rows) if row["case_id"] == case]
    names = [by_slide.slides[number] for number in own]
    if unit == "case":
        return names, len(names)
    whole = task.values(run.test)[run.slides.index(case)]
    distances = np.abs(task.values(by_slide.test)[own] - whole).sum(1)
    return [names[int(distances.argmin())]], len(names)


def _merge_runs(choices: Sequence[Choice], task: Task) -> list[Choice]:
    """One entry per slide: what most of its runs call it (of equally many the first), shown by the
    first run that does.

    Its rank is the mean over all runs, 0 for those that call it something else; where nothing is
    called it is the mean of all.
    """
    tested: dict[str, list[Choice]] = {}
    for choice in choices:
        tested.setdefault(choice.slide_id, []).append(choice)
    found = []
    for items in tested.values():
        first, count = items[0], len(items)
        if count > 1:
            agreed, most = items, Counter(item.verdict.called for item in items).most_common(1)
            if task.has_calls:
                agreed = [item for item in items if item.verdict.called == most[0][0]]
            rank, first = sum(item.verdict.rank for item in agreed) / count, agreed[0]
            said = f"{len(agreed)} of {count} runs say so"
            repeats = said if task.has_calls else task.repeated_rank(rank, count)
            detail = f"{first.verdict.detail}; {repeats}"
            first = replace(first, verdict=replace(first.verdict, rank=rank, detail=detail))
        found.append(first)
    return found


def make_example(
    choice: Choice,
    checkpoint: Path,
    slides: Sequence[ExampleSlide],
    top: int,
    coords: str | Path = "",
) -> Example:
    """Attention of the fold's model over a slide, drawn.

    Args:
        choice, checkpoint: the slide or case, and the model that judges it.
        slides: the slide, or all slides of a case that the model sees as one bag, in its order; the
            one with the most attention is drawn.
        top: number of tiles.
        coords: folder with coordinates, for a bag that has none.

    Raises:
        UserError: unreadable or not finite bag, one that the model was not tested on or one without
            coordinates, unreadable slide or one that the bag is not of.
    """
    files = [
        CaseSlide(one.slide_id, one.bag, find_coordinates(one.bag, coords) if one.bag else None)
        for one in slides
    ]
    seen = open_in_case(files[0], files)
    places = [bag.coordinates() for bag in seen.parts.values()]
    seen.check_finite()
    device = torch.device("cpu")
    model, content = load_trained_model(checkpoint, device)
    for one in slides:
        check_bag(one.slide_id, open_bag(one.bag), content["config"])
    covariates = encode_stored(content["config"], checkpoint, slides[0].slide_id)
    sample = Sample(choice.slide_id, seen.whole, 0, covariates=covariates)
    parts = examine(model, sample, device).attention.split([len(p.coords) for p in places])
    number = int(np.argmax([float(part.sum()) for part in parts]))
    drawn, where, attention = slides[number], places[number], parts[number].numpy()
    stored = seen.parts[drawn.slide_id].attributes.get("slide_fingerprint", "")
    check_fingerprint(drawn.slide, str(stored), "its features")
    rows, geometry = np.argsort(-attention, kind="stable")[:top], where.geometry
    with open_slide(drawn.slide, drawn.mpp, geometry.tile_pattern) as slide:
        overview = mark_tiles(
            read_overview(slide, THUMBNAIL_SIDE).pixels, geometry, slide.width, where.coords[rows]
        )
        corners = where.coords[rows].tolist()
        tiles = [jpeg_uri(read_tile(slide, geometry, *corner)) for corner in corners]
    top_tiles = list(zip(tiles, attention[rows].tolist(), strict=True))
    found = (choice, drawn.slide_id, len(attention), jpeg_uri(overview), top_tiles)
    return Example(*found, len(slides), float(attention.sum()))
