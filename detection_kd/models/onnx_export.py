"""What the exports to ONNX share: the packages, torch's exporter, and a file with a note in it."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patch_encoder.models.onnx_network import open_session
from wsi_common.errors import UserError

OPSET = 20


def import_onnx() -> Any:
    """The package and its exporter, or one line that says how to get them."""
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise UserError(
            f"export: expected the packages onnx and onnxscript, found no {error.name}; "
            "pip install 'onnx>=1.18,<2' 'onnxscript>=0.5,<1'"
        ) from None
    for package in ("onnxscript", "onnx_ir"):  # a line per constant that they fold
        logging.getLogger(package).setLevel(logging.WARNING)
    return onnx


@torch.no_grad()
def export_program(
    module: nn.Module, pixels: Tensor, free: tuple[int, ...], outputs: Sequence[str]
) -> Any:
    """The ONNX model of a module of pixels (B, 3, H, W), with these dimensions of its input free;
    without names of the exporting machine's files, so that one module gives one file.

    Raises:
        torch.onnx.OnnxExporterError: torch cannot export it so.
    """
    import_onnx()
    sizes = (dict.fromkeys(free, torch.export.Dim.DYNAMIC),) if free else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between torch and its exporter
        program = torch.onnx.export(
            module, (pixels,), dynamo=True, dynamic_shapes=sizes, opset_version=OPSET,
            verbose=False,
            input_names=["pixels"], output_names=list(outputs),
        )  # fmt: skip
    assert program is not None
    model = program.model_proto  # made anew each time
    strip_names(model)
    return model


def strip_names(model: Any) -> None:
    """Remove names of files and lines of code."""
    graph = model.graph
    for part in (
        model,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
    ):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def export_error(error: Exception, what: str) -> UserError:
    """One line on what torch's exporter does not take."""
    reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    return UserError(f"export: torch cannot export this {what} to ONNX: {reason[:300]}")


def save_with_note(model: Any, path: Path, key: str, note: dict[str, Any]) -> None:
    """Write a model with a note, JSON, below `key` of its metadata."""
    onnx = import_onnx()
    onnx.helper.set_model_props(model, {key: json.dumps(note, sort_keys=True)})
    onnx.save(model, str(path))


def read_note(path: str | Path, key: str) -> dict[str, Any] | None:
    """The note of a file; None where it has none that can be read.

    Raises:
        UserError: no ONNX file.
    """
    session = open_session(path, torch.device("cpu"), optimise=False)
    text = session.get_modelmeta().custom_metadata_map.get(key)
    try:
        note = None if text is None else json.loads(text)
    except json.JSONDecodeError:
        note = None
    return note if isinstance(note, dict) else None
