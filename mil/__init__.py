"""Everything between feature bags and a slide label: models, training, benchmark, ranking, report,
and prediction of other slides.

In Python, `load_classifier(path)` gives a trained classifier, whose `predict_bag(features, coords)`
judges one slide. Names are loaded when they are asked for (PEP 562): importing the package, which
every worker does, loads nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mil.ensembles.classifier import BagPrediction, Classifier, load_classifier

__all__ = ("BagPrediction", "Classifier", "load_classifier")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("mil.ensembles.classifier"), name)
    raise AttributeError(f"module 'mil' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
