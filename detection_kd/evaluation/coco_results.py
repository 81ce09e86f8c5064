"""Detections in the results format of COCO, which pycocotools' `loadRes` and annotation tools read.

One object a detection: `image_id` and `category_id` of the annotation file, `bbox` (x, y, width,
height) in px, `score`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detection_kd.datasets.coco import DetectionSet
from detection_kd.evaluation.coco_metrics import Prediction
from wsi_common.files import write_text


def make_result_rows(
    annotated: DetectionSet, predictions: list[Prediction]
) -> list[dict[str, Any]]:
    """The rows, in the order of the annotation file's images and by falling score.

    A detector of one class for all categories of the file gives them the file's first category id:
    compare with `useCats=0`.
    """
    rows = []
    for prediction in sorted(predictions, key=lambda p: p.index):
        identifier = annotated.images[prediction.index].id
        for (x0, y0, x1, y1), score, label in zip(
            prediction.boxes, prediction.scores, prediction.labels, strict=True
        ):
            bbox = [float(v) for v in (x0, y0, x1 - x0, y1 - y0)]
            category = annotated.category_ids[int(label)]
            rows.append(
                {
                    "image_id": identifier,
                    "category_id": category,
                    "bbox": bbox,
                    "score": float(score),
                }
            )
    return rows


def write_results(path: Path, annotated: DetectionSet, predictions: list[Prediction]) -> None:
    """Write `make_result_rows` as JSON, one row a line."""
    rows = (json.dumps(row, allow_nan=False) for row in make_result_rows(annotated, predictions))
    write_text(path, "[" + ",\n".join(rows) + "]\n")
