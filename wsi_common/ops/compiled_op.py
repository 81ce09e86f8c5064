"""A compiled operator with its gradient: loading it, telling torch about it, pinning its kernels,
and when it is taken.

For operators that give gradients to values, sampling locations and attention weights, computed in
float32 (float64 for float64 values). What they do not compute, second derivatives and forward mode,
is an error and never a silent zero. A package's `ops/compiled.py` holds what is its own: the
schema's shapes, what is saved for the gradient, the call.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from wsi_common.errors import UserError
from wsi_common.ops.native import library_path, load_library

logger = logging.getLogger(__name__)
AUTOCAST = (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA)
AUTOCAST_SET = torch._C.DispatchKeySet(AUTOCAST[0]) | torch._C.DispatchKeySet(AUTOCAST[1])
BACKENDS = ("auto", "compiled", "reference")
Door = TypeVar("Door", bound=Callable[..., Any])


@dataclass
class CompiledOp:
    """One operator and its backward, `<namespace>::<name>` and `<namespace>::<name>_backward`.

    Attributes:
        ops: folder whose libraries hold schema and kernels.
        namespace, name: of the operator.
        variable: environment variable that chooses between the compiled op and the reference.
        fake_forward, fake_backward: empty results from the arguments.
        save: (ctx, inputs, output), what the gradient needs.
        backward: (ctx, gradient of the result) -> gradients of all inputs.
        autocast: the operator under autocast.
    """

    ops: Path
    namespace: str
    name: str
    variable: str
    fake_forward: Callable[..., Tensor]
    fake_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    save: Callable[..., None]
    backward: Callable[..., tuple[Tensor | None, ...]]
    autocast: Callable[..., Tensor]
    _reasons: dict[str, str | None] = field(default_factory=dict)
    _library: torch.library.Library | None = None  # registrations live as long as this does

    def unavailable(self, device_type: str) -> str | None:
        """Why the compiled op cannot run on "cpu" or "cuda"; None where it can. Loads it on the
        first call.
        """
        if device_type not in self._reasons:
            self._reasons[device_type] = self._load(device_type)
        return self._reasons[device_type]

    def choose_kernels(self, name: str) -> str | None:
        """Pin the CPU kernels to "avx512", "avx2" or "baseline", for tests and measurements; "auto"
        undoes it.

        Returns:
            The name in force, None where this processor does not have it.
        """
        assert self.unavailable("cpu") is None
        choose = getattr(
            ctypes.CDLL(str(library_path(self.ops, "cpu"))), f"{self.name}_choose_kernels"
        )
        choose.restype = ctypes.c_char_p
        found = choose(name.encode())
        return found.decode() if found else None

    def _load(self, device_type: str) -> str | None:
        if device_type not in {"cpu", "cuda"}:
            return f"there is no compiled kernel for {device_type}"
        if device_type == "cuda":
            return self.unavailable("cpu") or load_library(library_path(self.ops, "cuda"))
        reason = load_library(library_path(self.ops, "cpu"))
        if reason is None:
            self._register()
        return reason

    def _register(self) -> None:
        forward = f"{self.namespace}::{self.name}"
        torch.library.register_fake(forward, self.fake_forward)
        torch.library.register_fake(f"{forward}_backward", self.fake_backward)
        self._library = torch.library.Library(self.namespace, "IMPL")
        self._register_gradient(self.name, self.backward, self.save)
        self._register_gradient(f"{self.name}_backward", self._refuse_second_derivative, None)
        for key in AUTOCAST:
            self._library.impl(self.name, self.autocast, key.name)

    def _register_gradient(
        self,
        name: str,
        backward: Callable[..., tuple[Tensor | None, ...]],
        save: Callable[..., None] | None,
    ) -> None:
        """`torch.library.register_autograd`, whose kernel drops the tangents of forward mode where
        no input requires a gradient; here they are an error.
        """
        operator = getattr(getattr(torch.ops, self.namespace), name).default
        kernel = make_autograd_impl(operator, Info(backward, save))

        def without_tangents(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
            if has_tangent(inputs):
                raise NotImplementedError(
                    f"{self.namespace}::{name}: the compiled op has no forward-mode derivative; "
                    f"set {self.variable}=reference"
                )
            return kernel(keyset, *inputs)

        assert self._library is not None
        self._library.impl(name, without_tangents, "Autograd", with_keyset=True)

    def _refuse_second_derivative(self, ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(
            f"{self.namespace}::{self.name}: the compiled op can be differentiated once; set "
            f"{self.variable}=reference for second derivatives"
        )


def has_tangent(inputs: tuple[Any, ...]) -> bool:
    """Whether forward-mode differentiation is under way through any of these tensors."""
    if forward_ad._current_level < 0:
        return False
    return any(
        isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
        for value in inputs
    )


def constant(function: Door) -> Door:
    """`torch.compiler.assume_constant_result`, without loading torch._dynamo for it, which takes as
    long as torch does.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def compute_dtype(value: Tensor) -> torch.dtype:
    """What is computed in, and the dtype of locations and weights."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def empty_gradients(
    value: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward returns, contiguous and unwritten."""
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(value, dtype=compute_dtype(value), memory_format=contiguous),
        torch.empty_like(locations, memory_format=contiguous),
        torch.empty_like(weights, memory_format=contiguous),
    )


def bound_of(grad_out: Tensor, value: Tensor, weights: Tensor) -> Tensor | None:
    """A scalar that no contribution to the values' gradient exceeds, where CUDA has to add up
    deterministically; else None.
    """
    if (
        value.is_cuda
        and torch.are_deterministic_algorithms_enabled()
        and grad_out.numel()
        and weights.numel()
    ):
        return grad_out.abs().amax().to(weights.dtype) * weights.abs().amax()
    return None


def below_autocast() -> AbstractContextManager[object]:
    """What is called in this context is not cast once more."""
    return torch._C._ExcludeDispatchKeyGuard(AUTOCAST_SET)


def takes_compiled(
    asked: str | None,
    variable: str,
    device_type: str,
    unavailable: Callable[[str], str | None],
    what: str,
) -> bool:
    """Whether a door goes to its compiled op; a reference in its place is warned of once.

    Args:
        asked: one of BACKENDS; None: what the environment's `variable` says, else auto.
        variable: name in the environment.
        device_type: "cpu", "cuda", ...
        unavailable: the op's.
        what: the operator for people.

    Raises:
        UserError: the backend is unknown, or `compiled` and the op is not there.
    """
    name = "backend" if asked else variable
    backend = asked or os.environ.get(variable, "auto")
    if backend not in BACKENDS:
        raise UserError(f"{name}={backend}: expected one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return False
    reason = unavailable(device_type)
    if reason and backend == "compiled":
        raise UserError(f"{name}=compiled: {reason}")
    if reason:
        warn_once(what, reason)
    return reason is None


@cache
def warn_once(what: str, reason: str) -> None:
    """Say why the reference is taken."""
    logger.warning("%s runs in plain PyTorch, many times slower: %s", what, reason)
