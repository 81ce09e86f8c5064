"""A detector without a network: what is darker than its surroundings is a box, and its size and
colour say which class it has.

It is what a table of detectors has to be read against: sets of well separated cells can be found
without learning anything about their shape.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from detection_kd.datasets.coco import DetectionSet, ImageRecord
from detection_kd.datasets.detection import read_image
from detection_kd.evaluation.coco_metrics import Prediction
from detection_kd.evaluation.froc import find_overlaps
from studies.detector_tables.dark_regions import Regions, find_regions

OVERLAP = 0.5  # IoU from which on a region is taken for the box of an annotated cell


def name_regions(regions: Regions, record: ImageRecord, background: int) -> Int[np.ndarray, " n"]:
    """The class of the annotated box that each region overlaps most, or `background`."""
    if not len(regions.boxes) or not len(record.boxes):
        return np.full(len(regions.boxes), background)
    overlap, _ = find_overlaps(regions.boxes, record.boxes)
    best = overlap.argmax(1)
    return np.where(overlap.max(1) >= OVERLAP, record.labels[best], background)


def detect_by_colour(train: DetectionSet, test: DetectionSet) -> list[Prediction]:
    """Fit a logistic regression to the regions of the training images, and use it on the test
    images; nothing is found where no region of the training images overlaps an annotated box.
    """
    from sklearn.dummy import DummyClassifier  # a while to load
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    background = len(train.categories)
    found = [find_regions(np.asarray(read_image(record))) for record in train.images]
    pairs = zip(found, train.images, strict=True)
    labels = np.concatenate([name_regions(r, record, background) for r, record in pairs])
    if not (labels < background).any():
        nothing = (np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
        return [Prediction(index, *nothing) for index in range(len(test.images))]
    features = np.concatenate([regions.features for regions in found])
    several = len(np.unique(labels)) > 1
    classifier = LogisticRegression(max_iter=1000) if several else DummyClassifier()
    model = make_pipeline(StandardScaler(), classifier).fit(features, labels)
    classes = model.classes_[model.classes_ < background]
    predictions = []
    for index, record in enumerate(test.images):
        regions = find_regions(np.asarray(read_image(record)))
        scores = np.zeros((0, len(classes)))
        if len(regions.boxes):
            scores = model.predict_proba(regions.features)[:, : len(classes)]
        # every region once for each class, as a detector's queries count
        flat = scores.reshape(-1)
        order = np.argsort(-flat, kind="stable")
        boxes, labels = np.repeat(regions.boxes, len(classes), 0), np.tile(classes, len(scores))
        predictions.append(Prediction(index, boxes[order], flat[order], labels[order]))
    return predictions
