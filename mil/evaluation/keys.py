"""Keys of what judges predictions: cuts, intervals and figures."""

from __future__ import annotations

from dataclasses import dataclass

from mil.evaluation.operating import RULES
from wsi_common.config import key


@dataclass
class EvaluationKeys:
    """How predictions become calls, tables and figures."""

    threshold: str = key(
        "youden",
        "cut on two classes, chosen on validation slides: best J, or a rate to reach",
        choices=RULES,
    )
    target: float = key(
        0.95, "the rate that threshold=sensitivity or specificity has to reach on validation slides"
    )
    resamples: int = key(2000, "bootstrap resamples of the confidence intervals")
    figures: bool = key(True, "draw figures", runtime=True)
    figure_format: str = key(
        "png", "file format of the figures", choices=("png", "svg", "pdf"), runtime=True
    )
