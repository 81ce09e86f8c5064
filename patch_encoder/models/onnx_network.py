"""An ONNX file as a torch module, run by onnxruntime: on the CPU, or on CUDA without a copy through
the host.

The module is its path: pickled (Ray, spawned processes) it travels without weights, and the session
is made in the process that computes, with the first batch, on as many threads as torch has. Pixels
go in as uint8 (B, 3, H, W), features come out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from wsi_common.errors import UserError

REQUIREMENT = "onnxruntime>=1.20,<2"


def import_onnxruntime() -> Any:
    """The package, or one line that says how to get it."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            f"ONNX: expected the package onnxruntime, found none; pip install '{REQUIREMENT}'"
        ) from None
    return onnxruntime


class OnnxNetwork(nn.Module):
    """uint8 pixels (B, 3, H, W) -> (B, D), by a file with one input and one output.

    Args:
        path: the ONNX file.
        dim: D.

    Raises:
        UserError: no such file, or one that onnxruntime cannot read.
    """

    def __init__(self, path: str | Path, dim: int) -> None:
        super().__init__()
        self.path, self.dim = str(Path(path).absolute()), dim
        self._session: Any = None
        self._device: torch.device | None = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_session": None, "_device": None}

    def forward(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """(B, 3, H, W) -> (B, D)."""
        pixels = pixels.contiguous()
        if self._session is None or self._device != pixels.device:
            self._session, self._device = open_session(self.path, pixels.device), pixels.device
        name = self._check_input(pixels)
        if pixels.device.type == "cpu":
            (features,) = self._session.run(None, {name: pixels.numpy()})
            return torch.from_numpy(features)
        return self._run_on_cuda(name, pixels)

    def _check_input(self, pixels: Tensor) -> str:
        """The input's name, when the file takes tiles of this size."""
        source = self._session.get_inputs()[0]
        if any(
            isinstance(side, int) and side != found
            for side, found in zip(source.shape[2:], pixels.shape[2:])
        ):
            raise UserError(
                f"{self.path}: expected tiles of {source.shape[3]} x {source.shape[2]} px, for "
                "which it was exported, found "
                f"{pixels.shape[3]} x {pixels.shape[2]}; export the student on these tiles"
            )
        return source.name

    def _run_on_cuda(self, name: str, pixels: Tensor) -> Tensor:
        """In place on the device, in torch's own stream: nothing waits for the host."""
        features = torch.empty(len(pixels), self.dim, device=pixels.device)
        binding, where = self._session.io_binding(), ("cuda", pixels.device.index or 0)
        binding.bind_input(name, *where, np.uint8, tuple(pixels.shape), pixels.data_ptr())
        output = self._session.get_outputs()[0].name
        binding.bind_output(output, *where, np.float32, tuple(features.shape), features.data_ptr())
        self._session.run_with_iobinding(binding)
        return features


def open_session(path: str | Path, device: torch.device, *, optimise: bool = True) -> Any:
    """A session of onnxruntime.

    Args:
        path: the ONNX file.
        device: CPU or CUDA.
        optimise: rewrite the graph for speed; a look at the file does without.

    Raises:
        UserError: no such file, a file that onnxruntime cannot read, CUDA without a provider for
            it.
    """
    runtime = import_onnxruntime()
    if not Path(path).is_file():
        raise UserError(f"{path}: expected an ONNX file, found no file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # threads that wait sleep: the decoding processes need the cores, and spinning cost a tenth of
    # the speed
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors; they are raised as well
    if not optimise:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return runtime.InferenceSession(
            str(path), options, providers=_choose_providers(runtime, device)
        )
    except _list_load_errors(runtime) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(
            f"{path}: expected an ONNX file, onnxruntime cannot read it: {reason}; export it again"
        ) from None


def _choose_providers(runtime: Any, device: torch.device) -> list[Any]:
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        raise UserError(
            f"device={device}: onnxruntime {runtime.__version__} has no CUDA; pip install "
            "onnxruntime-gpu, or set device=cpu"
        )
    stream = str(torch.cuda.current_stream(device).cuda_stream)
    return [
        ("CUDAExecutionProvider", {"device_id": device.index or 0, "user_compute_stream": stream})
    ]


def _list_load_errors(runtime: Any) -> tuple[type[Exception], ...]:
    """What onnxruntime raises over a file: its classes share no base below Exception."""
    state = runtime.capi.onnxruntime_pybind11_state
    names = (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
    return (RuntimeError, *(getattr(state, name) for name in names if hasattr(state, name)))
