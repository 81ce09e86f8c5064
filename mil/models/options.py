"""Options of a model, checked by name and type against its constructor: an unknown one names the
nearest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import NoneType
from typing import Any, get_args, get_type_hints

from common.errors import UserError, did_you_mean

# what `build` hands over by itself
FIXED = ("dim", "classes", "dropout")
KINDS = {NoneType: "null"}  # as users write it


def read_option_types(make: Callable[..., Any]) -> dict[str, Any]:
    """Name -> type of the options of a model of MODELS.

    What a partial of MODELS sets is a new default when it is a number; names and switches make the
    model what it is called and are fixed.
    """
    preset: set[str] = set()
    if isinstance(make, partial):
        preset, make = (
            {name for name, value in make.keywords.items() if isinstance(value, (bool, str))},
            make.func,
        )
    hints = get_type_hints(make.__init__)  # type: ignore[misc]
    names = list(inspect.signature(make).parameters)
    return {name: hints[name] for name in names if name not in preset and name not in FIXED}


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
