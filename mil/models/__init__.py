"""Slide classifiers over a bag of tile features: `forward(features (N, D), coords (N, 2)) -> MILOutput`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from common.errors import UserError, did_you_mean
from mil.models.abmil import ABMIL
from mil.models.deform_mil import DeformMIL
from mil.models.max import MaxMIL
from mil.models.mean import MeanMIL
from mil.models.output import MILOutput
from mil.models.standardise import Standardised

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mean": MeanMIL,
    "max": MaxMIL,
    "abmil": ABMIL,
    "gated_abmil": partial(ABMIL, gated=True),
    "deform_mil": DeformMIL,
}

__all__ = ["ABMIL", "MODELS", "DeformMIL", "MILOutput", "MaxMIL", "MeanMIL", "Standardised", "build"]


def build(name: str, dim: int, classes: int, *, standardize: bool = False, **options: Any) -> nn.Module:
    """A model by name for D = `dim` features and C = `classes` classes; `options` are its constructor's."""
    if name not in MODELS:
        raise UserError(f"model '{name}': expected one of {', '.join(MODELS)}; {did_you_mean(name, MODELS)}")
    model = MODELS[name](dim, classes, **options)
    return Standardised(model, dim) if standardize else model
