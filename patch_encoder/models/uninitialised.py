"""Networks built without initial weights, for a state dict to be put in whole: no random numbers,
no second copy in memory.

Only parameters go to the meta device, and each as soon as its module has it. Buffers are computed
as ever: position tables and masks that no file holds have to be right. (accelerate's
`init_empty_weights(include_buffers=False)` is the same idea.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def skip_initialisation() -> Iterator[None]:
    """Parameters of modules that are built here have no storage."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
