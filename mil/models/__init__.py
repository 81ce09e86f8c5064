"""Slide classifiers over a bag of tile features: `forward(features (N, D), coords (N, 2)) ->
MILOutput`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import NoneType
from typing import Any, get_args, get_type_hints

from torch import nn

from mil.models.abmil import ABMIL
from mil.models.batch import BagCheck
from mil.models.clam import CLAM
from mil.models.deform_mil import DeformMIL
from mil.models.dsmil import DSMIL
from mil.models.dtfd import DTFD
from mil.models.fusion import ALONE, Fused, NoTiles, check_fusion
from mil.models.hipt import HIPT
from mil.models.ilra import ILRA
from mil.models.layers import Standardised
from mil.models.mean_max import MaxMIL, MeanMIL
from mil.models.mhim import MHIM, select_plain_options
from mil.models.minet import MINet
from mil.models.probes import KNNProbe, LinearProbe
from mil.models.rrt import RRT
from mil.models.transmil import TransMIL
from wsi_common.errors import UserError, did_you_mean

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
    "hipt": HIPT,
}

# fitted to all training slides at once, see mil/training/probe_fit.py
PROBES: dict[str, Callable[..., nn.Module]] = {"linear_probe": LinearProbe, "knn_probe": KNNProbe}
CLASSIFIERS = MODELS | PROBES

# what `build` hands over by itself
FIXED = ("dim", "classes", "dropout")
KINDS = {NoneType: "null"}  # as users write it


def build(
    name: str,
    dim: int,
    classes: int,
    *,
    standardize: bool = False,
    dropout: float = 0.25,
    covariates: int = 0,
    **options: Any,
) -> nn.Module:
    """A model by name for D = `dim` features and C = `classes` classes, fused with `covariates`
    encoded numbers of each slide where there are any; `options` are its constructor's.
    """
    model = _find_model(name)(dim, classes, dropout, **check_options(name, options))
    model = Standardised(model, dim) if standardize else model
    if covariates:
        check_fusion(name)
        model = Fused(model, covariates, classes, dropout)
    model.register_forward_pre_hook(BagCheck(dim), with_kwargs=True)
    return model


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model, or a UserError that names the nearest valid one."""
    return check_option(options, read_option_types(_find_model(name)), f"options of {name}")


def _find_model(name: str) -> Callable[..., nn.Module]:
    if name == ALONE:
        return NoTiles
    if name not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        raise UserError(
            f"model '{name}': expected one of {known}; {did_you_mean(name, CLASSIFIERS)}"
        )
    return CLASSIFIERS[name]


def build_plain_model(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and options of the plain model that a teacher-student model starts from; None for the
    others.
    """
    make = _find_model(name)
    is_mhim = isinstance(make, partial) and make.func is MHIM
    if not is_mhim or not options.get("teacher_init", True):
        return None
    base = make.keywords["base"]
    return base, select_plain_options(base, options)


def read_option_types(make: Callable[..., Any]) -> dict[str, Any]:
    """Name -> type of the options of a model of MODELS.

    What a partial of MODELS sets is a new default when it is a number; names and switches make the
    model what it is called and are fixed.
    """
    fixed = {*FIXED}
    if isinstance(make, partial):
        fixed |= {name for name, value in make.keywords.items() if isinstance(value, (bool, str))}
        make = make.func
    hints = get_type_hints(make.__init__)  # type: ignore[misc]
    return {name: hints[name] for name in inspect.signature(make).parameters if name not in fixed}


def check_option(
    values: Mapping[str, Any], expected: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """The values with whole numbers made floats where a float is expected; `what` names them in
    errors.

    Raises:
        UserError: an unknown name, or a value of another type.
    """
    result = {}
    for name, value in values.items():
        if name not in expected:
            raise UserError(f"{what}: unknown name '{name}'; {did_you_mean(name, expected)}")
        kind = expected[name]
        if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            value = _number(value)  # YAML 1.1 reads 1e-4 (no dot) as text
        kinds = get_args(kind) or (kind,)  # `bool | None`: or null
        if type(value) not in kinds:
            raise UserError(
                f"{what}: {name}: expected "
                f"{' or '.join(KINDS.get(k, k.__name__) for k in kinds)}, found {value!r}"
            )
        result[name] = value
    return result


def _number(value: int | str) -> float | int | str:
    try:
        return float(value)
    except ValueError:
        return value
