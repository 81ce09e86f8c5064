"""The classic CUDA kernels of multi-scale deformable attention (`csrc/classic_ms_deform_attn.cu`)
as a torch function.

Built on first use by the machinery that builds the op itself, into the git-ignored `build/` beside
this file; called through a plain C interface on raw pointers and the current stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wsi_common.errors import UserError
from wsi_common.ops.native import Unit, build, cuda_command, find_nvcc, library_path

FOLDER = Path(__file__).resolve().parent
POINTERS = ("value", "shapes", "starts", "locations", "attention")
COUNTS = ("batch", "cells", "heads", "dim", "levels", "queries", "points")


class Problem(ctypes.Structure):
    """`Call` of the CUDA source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in COUNTS),
    ]


def build_kernels(folder: Path = FOLDER, architectures: Sequence[str] = ()) -> ctypes.CDLL:
    """Compile `csrc/*.cu` unless they are up to date, and load them.

    Args:
        architectures: as of `cuda_command`; empty: those of the GPUs here.

    Raises:
        UserError: no nvcc, or it failed; the message has the first error and names the log.
    """
    nvcc, reason = find_nvcc()
    if nvcc is None:
        raise UserError(f"the kernels of the benchmark cannot be built: {reason}")
    command = cuda_command(nvcc, list(architectures))
    build(
        folder,
        "benchmark",
        [Unit(source, command) for source in sorted((folder / "csrc").glob("*.cu"))],
    )
    return load_kernels(library_path(folder, "benchmark"))


def load_kernels(path: Path) -> ctypes.CDLL:
    """The library, with the result types of its functions."""
    library = ctypes.CDLL(str(path))
    library.cuda_error_text.restype = ctypes.c_char_p
    return library


def launch(library: ctypes.CDLL, function: str, like: Tensor, *arguments: Any) -> None:
    """Call a function of the library on the device and the current stream of a tensor.

    Raises:
        RuntimeError: CUDA refused the launch.
    """
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    pointers = [
        ctypes.c_void_p(item.data_ptr()) if isinstance(item, Tensor) else item for item in arguments
    ]
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        status = getattr(library, function)(*pointers, ctypes.c_void_p(stream))
    if status:
        raise RuntimeError(f"{function}: {library.cuda_error_text(status).decode()}")


class ClassicAttention:
    """Value (N, S, M, D), locations (N, Q, M, L*P, 2), weights (N, Q, M, L*P) -> (N, Q, M * D),
    float32, all contiguous.
    """

    def __init__(
        self, library: ctypes.CDLL, levels: Sequence[tuple[int, int]], points: int, device: str
    ) -> None:
        """`points` on each of the `levels` (H, W)."""
        self.library, self.points = library, points
        self.shapes = torch.tensor(levels, dtype=torch.int64)
        cells = self.shapes.prod(1)
        self.starts = (cells.cumsum(0) - cells).to(device)
        self.shapes = self.shapes.to(device)

    def __call__(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return _Function.apply(value, locations, weights, self)

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        """One launch."""
        problem = self._problem(value, locations, weights)
        out = value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
        launch(self.library, "classic_forward", value, ctypes.byref(problem), out)
        return out

    def backward(
        self, grad_out: Tensor, value: Tensor, locations: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Zeros and one launch."""
        problem, grad_out = self._problem(value, locations, weights), grad_out.contiguous()
        grads = torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights)
        launch(self.library, "classic_backward", value, ctypes.byref(problem), grad_out, *grads)
        return grads

    def _problem(self, value: Tensor, locations: Tensor, weights: Tensor) -> Problem:
        tensors = (value, self.shapes, self.starts, locations, weights)
        assert all(tensor.is_contiguous() for tensor in tensors)
        assert value.dtype == locations.dtype == weights.dtype == torch.float32
        assert max(value.numel(), locations.numel()) < 2**31, "the classic kernels count in 32 bits"
        assert locations.shape[3] == len(self.shapes) * self.points
        counts = (*value.shape, len(self.shapes), locations.shape[1], self.points)
        return Problem(*(tensor.data_ptr() for tensor in tensors), *counts)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, op: ClassicAttention
    ) -> Tensor:
        ctx.op = op
        ctx.save_for_backward(value, locations, weights)
        return op.forward(value, locations, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *ctx.op.backward(grad_out, *ctx.saved_tensors), None
