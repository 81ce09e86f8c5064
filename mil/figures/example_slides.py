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
from mil.evaluation.runs import Finished
from mil.figures.report import mark_tiles
from mil.tasks.kinds import Task
from mil.tasks.objective_results import follow_up
from mil.tasks.targets import NONE
from mil.tasks.task import SURVIVAL
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


def choose_slides(runs: Sequence[Finished], task: Task, each: int) -> list[Group[Choice]]:
    """Up to `each` slides that are called right and not negative, and as many errors; of risks the
    highest and the lowest.

    The most confident of both: what the classifier knows best, and what it gets wrong without
    doubt. Of several labels the confidence is the product of theirs. Risks of two folds have no
    common scale, so that places within a fold are compared. A slide that several runs test (nested,
    repeated cross-validation) stands there once, see `_once`.
    """
    if task.kind in SURVIVAL:
        ranked = sorted(
            _once((item for run in runs for item in _risks(run)), calls=False),
            key=lambda item: (item[0], item[1].slide_id),
        )
        chosen, each = (
            [choice for _, choice in ranked],
            min(each, len(ranked) // 2),
        )  # no slide in both groups
        return [
            Group("Highest risk", "No slide.", chosen[::-1][:each]),
            Group("Lowest risk", "No slide.", chosen[:each]),
        ]
    said = (
        item
        for run in runs
        for item in (_labels(run, task) if task.kind == "multilabel" else _classes(run))
    )
    choices = [
        choice for _, choice in sorted(_once(said), key=lambda item: (-item[0], item[1].slide_id))
    ]
    negative, positive = (
        (NONE, "with a label")
        if task.kind == "multilabel"
        else (task.classes[0], "of a positive class")
    )
    hits = [choice for choice in choices if choice.right and choice.label != negative]
    errors = [choice for choice in choices if not choice.right]
    return [
        Group("Called right", f"No slide {positive} was called right.", hits[:each]),
        Group("Called wrong", "No test slide was called wrong.", errors[:each]),
    ]


def _once(said: Iterable[tuple[float, Choice]], calls: bool = True) -> list[tuple[float, Choice]]:
    """One entry a slide: what most of its runs call it (of equally many the first), shown by the
    first run that does.

    The confidence is the mean over all runs, 0 for those that call it something else; of risks it
    is the mean place.
    """
    tested: dict[str, list[tuple[float, Choice]]] = {}
    for item in said:
        tested.setdefault(item[1].slide_id, []).append(item)
    found = []
    for items in tested.values():
        if len(items) == 1:
            found += items
            continue
        most = Counter(choice.called for _, choice in items).most_common(1)[0][0]
        agreed = [item for item in items if item[1].called == most] if calls else items
        sure, first = sum(sure for sure, _ in agreed) / len(items), agreed[0][1]
        count = (
            f"{len(agreed)} of {len(items)} runs say so"
            if calls
            else f"{100 * sure:.0f} % on average over {len(items)} runs"
        )
        found.append((sure, replace(first, detail=f"{first.detail}; {count}")))
    return found


def _classes(run: Finished) -> Iterator[tuple[float, Choice]]:
    for row in run.rows:
        sure, right = float(row[f"prob_{row['predicted']}"]), row["label"] == row["predicted"]
        yield (
            sure,
            Choice(
                row["slide_id"],
                run.test.fold,
                row["label"],
                row["predicted"],
                f"probability {sure:.2f}",
                right,
            ),
        )


def _labels(run: Finished, task: Task) -> Iterator[tuple[float, Choice]]:
    """Each label is called at its cut, which comes from the validation slides."""
    called = run.test.probabilities >= run.test.thresholds
    sure = np.where(called, run.test.probabilities, 1 - run.test.probabilities).prod(1)
    for row, there, here, share, probabilities in zip(
        run.rows, run.test.targets, called, sure.tolist(), run.test.probabilities, strict=True
    ):
        names = ["|".join(np.array(task.classes)[marked]) or NONE for marked in (there, here)]
        detail = ", ".join(
            f"{name} {p:.2f}" for name, p in zip(task.classes, probabilities, strict=True)
        )
        yield (
            share,
            Choice(row["slide_id"], run.test.fold, *names, detail, bool((there == here).all())),
        )


def _risks(run: Finished) -> Iterator[tuple[float, Choice]]:
    risks = run.test.risks
    for row, risk in zip(run.rows, risks.tolist(), strict=True):
        below = float((risks < risk).mean())
        label = follow_up(float(row["time"]), bool(int(row["event"])))
        detail = f"above {100 * below:.0f} % of the fold's test slides"
        yield below, Choice(row["slide_id"], run.test.fold, label, f"risk {risk:.3g}", detail)


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
