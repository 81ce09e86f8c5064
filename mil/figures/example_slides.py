"""Example slides for the report: which ones to show, and the tiles that the classifier looked
at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch

from common.figures import jpeg_uri
from mil.datasets.bags import Sample
from mil.evaluation.runs import FinishedRun
from mil.figures.report import mark_tiles
from mil.tasks.base import Task
from mil.training.engine import examine, load_classifier
from patch_encoder.bags.bag import open_bag
from patch_encoder.bags.paths import find_coordinates
from patch_encoder.slides import open_slide
from patch_encoder.slides.overview import read_overview
from patch_encoder.tiles.grid import read_tile

THUMBNAIL_SIDE = 460
T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """A test slide to show.

    Attributes:
        slide_id: the slide.
        fold: of the run that judged it.
        label: what is known of it.
        called: what the classifier makes of it.
        detail: how sure that is.
        right: False where `called` contradicts `label`.
    """

    slide_id: str
    fold: int
    label: str
    called: str
    detail: str
    right: bool = True


@dataclass(frozen=True)
class Group(Generic[T]):
    """What stands under one heading of the page, and the sentence that stands there where it is
    empty.
    """

    title: str
    none: str
    slides: list[T]


@dataclass(frozen=True)
class Example:
    """A chosen slide with its pictures as data URIs."""

    choice: Choice
    tiles: int
    overview: str
    top: list[tuple[str, float]]


def choose_slides(runs: Sequence[FinishedRun], task: Task, each: int) -> list[Group[Choice]]:
    """Up to `each` slides that are called right and not negative, and as many errors; where nothing
    is called those of the highest and of the lowest rank.

    The most confident of both: what the classifier knows best, and what it gets wrong without
    doubt. A slide that several runs test (nested, repeated cross-validation) stands there once, see
    `_once`.
    """
    ranked = _once((item for run in runs for item in _choices(run, task)), task)
    first, second = task.example_groups
    if not task.has_calls:
        chosen = [choice for _, choice in sorted(ranked, key=lambda r: (r[0], r[1].slide_id))]
        each = min(each, len(chosen) // 2)  # no slide in both groups
        return [
            Group(first, "No slide.", chosen[::-1][:each]),
            Group(second, "No slide.", chosen[:each]),
        ]
    choices = [choice for _, choice in sorted(ranked, key=lambda r: (-r[0], r[1].slide_id))]
    hits = [choice for choice in choices if choice.right and choice.label != task.negative]
    errors = [choice for choice in choices if not choice.right]
    return [
        Group(first, f"No slide {task.positive_words} was called right.", hits[:each]),
        Group(second, "No test slide was called wrong.", errors[:each]),
    ]


def _once(ranked: Iterable[tuple[float, Choice]], task: Task) -> list[tuple[float, Choice]]:
    """One entry per slide: what most of its runs call it (of equally many the first), shown by the
    first run that does.

    The confidence is the mean over all runs, 0 for those that call it something else; where nothing
    is called it is the mean rank.
    """
    tested: dict[str, list[tuple[float, Choice]]] = {}
    for item in ranked:
        tested.setdefault(item[1].slide_id, []).append(item)
    found = []
    for items in tested.values():
        if len(items) == 1:
            found += items
            continue
        most = Counter(choice.called for _, choice in items).most_common(1)[0][0]
        agreed = [item for item in items if item[1].called == most] if task.has_calls else items
        sure, first = sum(sure for sure, _ in agreed) / len(items), agreed[0][1]
        count = (
            f"{len(agreed)} of {len(items)} runs say so"
            if task.has_calls
            else task.repeated_rank(sure, len(items))
        )
        found.append((sure, replace(first, detail=f"{first.detail}; {count}")))
    return found


def _choices(run: FinishedRun, task: Task) -> Iterator[tuple[float, Choice]]:
    """(rank, slide) of every test slide of a run."""
    for slide, verdict in zip(run.slides, task.verdicts(run.test), strict=True):
        words = (verdict.label, verdict.called, verdict.detail, verdict.right)
        yield verdict.rank, Choice(slide, run.test.fold, *words)


def make_example(
    choice: Choice,
    checkpoint: Path,
    bag_file: Path,
    slide_file: Path,
    mpp: float | None,
    top: int,
    coords: str | Path = "",
) -> Example:
    """Attention of the fold's model over the slide, drawn.

    Args:
        choice, checkpoint: the slide, and the model that judges it.
        bag_file, slide_file: its files.
        mpp: of the slide where it does not say.
        top: number of tiles.
        coords: folder with coordinates, for a bag that has none.

    Raises:
        UserError: unreadable or not finite bag, bag without coordinates, unreadable slide.
    """
    bag = open_bag(bag_file, find_coordinates(bag_file, coords))
    where = bag.coordinates()
    bag.check_finite()
    device = torch.device("cpu")
    model, _ = load_classifier(checkpoint, device)
    attention = examine(model, Sample(choice.slide_id, bag, 0), device).attention.numpy()
    rows, geometry = np.argsort(-attention, kind="stable")[:top], where.geometry
    with open_slide(slide_file, mpp, geometry.tile_pattern) as slide:
        overview = mark_tiles(
            read_overview(slide, THUMBNAIL_SIDE).pixels, geometry, slide.width, where.coords[rows]
        )
        tiles = [
            (
                jpeg_uri(read_tile(slide, geometry, *where.coords[row].tolist())),
                float(attention[row]),
            )
            for row in rows
        ]
    return Example(choice, len(bag), jpeg_uri(overview), tiles)
