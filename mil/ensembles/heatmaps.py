"""Heatmaps of slides that an ensemble predicts: attention, and what it says of single tiles, are
means over its models. Slides of a case are drawn one by one; where the models see them as one bag,
each shows its part of the case's attention.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mil.datasets.case_bags import CaseSlide
from mil.datasets.covariates import Cells
from mil.ensembles.classifier import Classifier
from mil.ensembles.prediction_tables import PredictedSubject, read_labelled
from mil.heatmaps.cohort import Scored, draw_all, find_inputs, find_pending, finish, made_from
from mil.heatmaps.scores import TileScores, score_bag
from mil.heatmaps.settings import Drawing
from mil.heatmaps.slide import Inputs
from mil.heatmaps.sources import SlidePrediction, Source
from mil.tasks.keys import SlideKeys
from patch_encoder.cohort.failures import Failures
from wsi_common.files import sha256_bytes

logger = logging.getLogger(__name__)


def draw_predicted(
    output: Path,
    classifier: Classifier,
    predicted: Sequence[PredictedSubject],
    covariates: Mapping[str, Cells],
    bags: Mapping[str, Path],
    keys: SlideKeys,
    drawing: Drawing,
    workers: int,
    read_timeout: float,
    failures: Failures,
    *,
    overwrite: bool,
) -> None:
    """Draw every predicted slide, and write the pages.

    Args:
        output: folder of the pages.
        classifier, predicted: the models and what they say.
        covariates: slide id -> column -> cell; empty for models without.
        bags: slide id -> bag file.
        keys: where slides and coordinates are.
        drawing: settings.
        workers, read_timeout: of the processes that draw.
        failures: gets the slides that cannot be drawn.
        overwrite: draw those again that were drawn from something else.
    """
    slides = make_slides(classifier, predicted)
    source = Source(classifier.task, str(keys.slides), slides, [], classifier.title)
    inputs = find_inputs(keys, "", slides, bags)
    for judged in slides:
        if judged.slide_id not in inputs:
            place = f"a slide below {keys.slides}" if keys.slides else "coordinates of its tiles"
            failures.add(judged.slide_id, f"heatmap: expected {place}, found none")
    weights = sha256_bytes(*(member.digest.encode() for member in classifier.members))
    stamp = partial(describe_drawing, weights=weights, drawing=drawing, covariates=covariates)
    pending = find_pending(output, slides, inputs, stamp, failures, overwrite=overwrite)
    logger.info("heatmaps: %d slides, %d drawn already", len(slides), len(slides) - len(pending))
    score = partial(score_with_all, classifier=classifier, drawing=drawing, covariates=covariates)
    draw_all(output, source, Scored(pending, score), drawing, workers, read_timeout, failures)
    finish(output, source, failures, "Predicted slides")


def describe_drawing(
    judged: SlidePrediction,
    inputs: Inputs,
    weights: str,
    drawing: Drawing,
    covariates: Mapping[str, Cells],
) -> dict[str, Any]:
    """What decides a slide's files."""
    found = made_from(judged, inputs, drawing, weights)
    cells = covariates.get(judged.slide_id)
    return found if cells is None else found | {"covariates": dict(cells)}


def make_slides(
    classifier: Classifier, predicted: Sequence[PredictedSubject]
) -> list[SlidePrediction]:
    """What the pages say of every slide: what is predicted for it, or for its case."""
    task, found = classifier.task, []
    cuts = classifier.carried
    known = [one for one in predicted if one.subject.label]
    labels = {}
    if known:
        texts = task.label_texts(read_labelled(classifier, known))
        labels = {one.subject.name: text for one, text in zip(known, texts, strict=True)}
    shown = {}
    if task.positive is not None and cuts.get("threshold") is not None:
        shown = {task.positive: float(cuts["threshold"])}
    if task.several_labels and cuts.get("thresholds") is not None:
        shown = dict(zip(task.names, np.asarray(cuts["thresholds"]).tolist(), strict=True))
    weights = classifier.members[0].checkpoint
    for one in predicted:
        label = labels.get(one.subject.name, "")
        called = one.found.called if task.has_calls else ""
        numbers = tuple(one.found.mean.tolist())
        for slide in one.subject.slides:
            place = (slide, one.subject.case_id, label, called, numbers, None, "", weights)
            case = one.subject.slides if classifier.unit == "case" else ()
            found.append(SlidePrediction(*place, shown, case=tuple(case)))
    return found


def score_with_all(
    judged: SlidePrediction,
    inputs: Inputs,
    classifier: Classifier,
    drawing: Drawing,
    covariates: Mapping[str, Cells],
) -> TileScores:
    """Scores of a slide's tiles, means over the models on their common scale.

    Raises:
        UserError: a bag that cannot be used.
    """
    task = classifier.task
    name = drawing.of_class or task.likeliest(np.array(judged.predictions))
    slide, each = CaseSlide(judged.slide_id, inputs.bag, inputs.coords), []
    for member in classifier.members:
        encoded = member.encode(covariates.get(judged.slide_id))
        wanted = (drawing.value, name, classifier.device, encoded)
        each.append(score_bag(member.model, member.task, slide, *wanted, inputs.case))
    attention = np.mean([scores.attention for scores in each], axis=0)
    alone = None
    pairs = list(zip(classifier.members, each, strict=True))
    if all(scores.alone is not None for scores in each):
        scaled = [m.task.to_common_scale(s.alone, m.carried) for m, s in pairs]
        alone = np.mean(scaled, axis=0)
    predicted = np.mean([m.task.to_common_scale(s.slide, m.carried) for m, s in pairs], axis=0)
    shown = each[0].shown if alone is not None else "attention"
    return TileScores(
        each[0].coordinates,
        attention,
        alone,
        shown,
        each[0].class_name,
        slide=predicted,
        whole=np.mean([s.whole for s in each], axis=0) if inputs.case else None,
        together=each[0].together,
    )
