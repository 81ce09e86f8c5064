"""Slide classifiers over a bag of tile features: `forward(features (N, D), coords (N, 2)) ->
MILOutput`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from common.errors import UserError, did_you_mean
from mil.models.abmil import ABMIL
from mil.models.bag_check import BagCheck
from mil.models.batch import forward_bags, forward_padded
from mil.models.clam import CLAM
from mil.models.deform_mil import DeformMIL
from mil.models.dsmil import DSMIL
from mil.models.dtfd import DTFD
from mil.models.ilra import ILRA
from mil.models.max import MaxMIL
from mil.models.mean import MeanMIL
from mil.models.mhim import MHIM, select_plain_options
from mil.models.minet import MINet
from mil.models.options import check_option, read_option_types
from mil.models.output import MILOutput, Packed, Stream, Target
from mil.models.rrt import RRT
from mil.models.standardise import Standardised
from mil.models.transmil import TransMIL

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mean": MeanMIL,
    "max": MaxMIL,
    "abmil": ABMIL,
    "gated_abmil": partial(ABMIL, gated=True),
    "multihead_abmil": partial(ABMIL, heads=4),
    "minet_instance": partial(MINet, level="instance"),
    "minet_embedding": partial(MINet, level="embedding"),
    "minet_deep": partial(MINet, level="deep"),
    "minet_residual": partial(MINet, level="residual"),
    "dsmil": DSMIL,
    "clam_sb": partial(CLAM, branches=False),
    "clam_mb": partial(CLAM, branches=True),
    "transmil": TransMIL,
    "mhim_abmil": partial(MHIM, base="abmil"),
    "mhim_dsmil": partial(MHIM, base="dsmil"),
    "mhim_transmil": partial(MHIM, base="transmil", random=0.0, low=0.8, high=0.03, ema_final=1.0),
    "dtfd": DTFD,
    "ilra": ILRA,
    "rrt": RRT,
    "deform_mil": DeformMIL,
}

__all__ = [
    "ABMIL",
    "CLAM",
    "DSMIL",
    "DTFD",
    "ILRA",
    "MHIM",
    "MODELS",
    "RRT",
    "DeformMIL",
    "MILOutput",
    "MINet",
    "MaxMIL",
    "MeanMIL",
    "Packed",
    "Standardised",
    "Stream",
    "Target",
    "TransMIL",
    "build",
    "build_plain_model",
    "check_options",
    "forward_bags",
    "forward_padded",
]


def build(
    name: str,
    dim: int,
    classes: int,
    *,
    standardize: bool = False,
    dropout: float = 0.25,
    **options: Any,
) -> nn.Module:
    """A model by name for D = `dim` features and C = `classes` classes; `options` are its
    constructor's.
    """
    model = MODELS[_known(name)](dim, classes, dropout, **check_options(name, options))
    model = Standardised(model, dim) if standardize else model
    model.register_forward_pre_hook(BagCheck(dim), with_kwargs=True)
    return model


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model, or a UserError that names the nearest valid one."""
    return check_option(options, read_option_types(MODELS[_known(name)]), f"options of {name}")


def _known(name: str) -> str:
    if name not in MODELS:
        raise UserError(
            f"model '{name}': expected one of {', '.join(MODELS)}; {did_you_mean(name, MODELS)}"
        )
    return name


def build_plain_model(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and options of the plain model that a teacher-student model starts from; None for the
    others.
    """
    make = MODELS[_known(name)]
    if (
        not isinstance(make, partial)
        or make.func is not MHIM
        or not options.get("teacher_init", True)
    ):
        return None
    base = make.keywords["base"]
    return base, select_plain_options(base, options)
