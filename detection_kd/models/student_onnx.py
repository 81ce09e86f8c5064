"""A D2VFM student as an ONNX file: float32, or int8 for CPUs with VNNI; and such a file as one more
encoder.

Batch, height and width are free (a fixed size was not faster; a student that resizes has one), the
input is uint8 pixels and the normalisation lies in the graph, BatchNorm in the convolutions.
Post-training static quantisation after Jacob et al., CVPR 2018, as onnxruntime does it (QDQ):
weights int8 by channel, activations uint8 with MinMax ranges, since vpdpbusd multiplies uint8 by
int8 (int8 activations ran at a quarter of the speed). Only feature maps are int8, from the second
convolution to the last. The first one stays float32: it takes differences of pixels, which on
bright tiles are as small as the steps of int8. Pooling and adapter are a thousandth of the work and
stay float32, too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from detection_kd.models.onnx_export import (
    export_error,
    export_program,
    import_onnx,
    save_with_note,
)
from detection_kd.models.student import load_student_encoder
from patch_encoder.extraction.network import fold_batch_norms
from patch_encoder.models.encoders import Encoder
from patch_encoder.models.onnx_network import OnnxNetwork, open_session
from patch_encoder.models.transforms import ToInputSize
from wsi_common.config import nearest_path
from wsi_common.errors import UserError
from wsi_common.files import read_json, safe_id, sha256_file
from wsi_common.shared_weights import find_weights

logger = logging.getLogger(__name__)
OUTPUTS = ("features",)
KEY = "d2vfm"  # metadata of the file: what it is, as JSON
RECORD = "export.json"
FILES = {"onnx": "student.onnx", "int8": "student_int8.onnx"}
NOTED = {"form", "dim", "encoder", "transform"}
PASSES_MAPS_ON = ("Relu", "Clip", "MaxPool", "Add")


def export_onnx(
    module: nn.Module, tiles: UInt8[Tensor, "b 3 h w"], path: Path, note: dict[str, Any]
) -> None:
    """Write a float32 module of uint8 pixels as an ONNX file.

    Args:
        module: (B, 3, H, W) -> (B, D), in evaluation mode.
        tiles: two or more.
        path: file to write.
        note: what the file is, for its metadata.

    Raises:
        UserError: packages missing, or a module that torch cannot export.
    """
    import_onnx()
    folded = fold_batch_norms(module, tiles[:2])
    try:
        model = export_program(folded, tiles[:2], (0, 2, 3), OUTPUTS)
    except torch.onnx.OnnxExporterError:
        logger.info(
            "export: this student resizes its tiles (input_scale), so its files take tiles of "
            "%d x %d px alone",
            *tiles.shape[2:],
        )
        model = _fixed_size(folded, tiles[:2])
    save_with_note(model, path, KEY, note)


def _fixed_size(module: nn.Module, tiles: Tensor) -> Any:
    """What resizes (input_scale) is exported for one tile size."""
    try:
        return export_program(module, tiles, (0,), OUTPUTS)
    except torch.onnx.OnnxExporterError as error:
        raise export_error(error, "student") from None


def find_feature_map_nodes(graph: Any) -> list[str]:
    """Names of all convolutions but the first, and of the sums, maxima and rectifiers that pass on
    only maps.
    """
    maps: set[str] = set()
    names = []
    for node in graph.node:  # in topological order
        if node.op_type == "Conv" or (
            node.op_type in PASSES_MAPS_ON and node.input[0] in maps and _all_maps(node, maps)
        ):
            names.append(node.name)
            maps.update(node.output)
    return names[1:]


def _all_maps(node: Any, maps: set[str]) -> bool:
    return node.op_type != "Add" or all(name in maps for name in node.input)


def quantise(
    source: Path,
    path: Path,
    tiles: UInt8[Tensor, "b 3 h w"],
    note: dict[str, Any],
    narrow: bool = False,
) -> None:
    """Write the int8 form of an exported student.

    Args:
        source: the float32 file.
        path: file to write.
        tiles: calibration tiles; the ranges of all feature maps are theirs.
        note: what the file is, for its metadata.
        narrow: weights of 7 bits: CPUs without VNNI add two products in 16 bits, which 8 bits
            overflow.

    Raises:
        UserError: packages missing, or no convolution to quantise.
    """
    onnx = import_onnx()
    from onnxruntime import quantization as q

    class Tiles(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = (batch.numpy() for batch in tiles.split(4))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"pixels": batch}

    nodes = find_feature_map_nodes(onnx.load(str(source)).graph)
    if not nodes:
        raise UserError(
            f"{source.name}: expected a student with several convolutions to make int8, found none "
            "behind the first; set int8=false"
        )
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # its advice to pre-process: BatchNorm is folded, shapes are known
    try:
        q.quantize_static(
            str(source), str(path), Tiles(), quant_format=q.QuantFormat.QDQ,
            nodes_to_quantize=nodes, per_channel=True,
            reduce_range=narrow, activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
            calibrate_method=q.CalibrationMethod.MinMax,
        )  # fmt: skip
    finally:
        root.setLevel(level)
    save_with_note(onnx.load(str(path)), path, KEY, note)


def read_note(path: str | Path) -> dict[str, Any]:
    """What an exported file says of itself: `student` (the checkpoint's config), `form` (onnx,
    int8), `encoder`, `dim`.

    Raises:
        UserError: no file of `export_student`, or one that is no longer what its record says.
    """
    text = (
        open_session(path, torch.device("cpu"), optimise=False)
        .get_modelmeta()
        .custom_metadata_map.get(KEY)
    )
    if text is None:
        raise UserError(f"{path}: expected a student of export_student, found another ONNX file")
    record = Path(path).with_name(RECORD)
    if record.is_file():
        known = (
            read_json(record, "the record of export_student").get("files", {}).get(Path(path).name)
        )
        if known is not None and known != sha256_file(path):
            raise UserError(
                f"{path}: damaged: its digest is not that of {RECORD}; export it again with "
                "overwrite=true"
            )
    try:
        note = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: expected a note of export_student in its metadata, found {error}; export it "
            "again"
        ) from None
    if not (isinstance(note, dict) and note.keys() >= NOTED and note["form"] in FILES):
        raise UserError(
            f"{path}: expected a note of export_student with {', '.join(sorted(NOTED))}; export "
            "it again"
        )
    return note


def load_exported_encoder(path: str | Path, name: str, device: torch.device) -> Encoder:
    """An exported student as an encoder.

    Args:
        path: a file of `export_student`.
        name: folder name of its bags; empty: student_onnx or student_int8.
        device: where it will run.

    Raises:
        UserError: no such file, or one that cannot run there.
    """
    note = read_note(path)
    if device.type == "cuda":
        if note["form"] == "int8":
            raise UserError(
                f"{path}: int8 is for CPUs, found device={device}; take {FILES['onnx']}, or set "
                "device=cpu"
            )
        open_session(path, device)
    provenance = {
        "encoder": f"{note['encoder']}, {note['form']}",
        "weights_sha256": sha256_file(path),
        "transform": note["transform"],
    }
    return Encoder(
        name or f"student_{note['form']}",
        note["dim"],
        ToInputSize(None),
        OnnxNetwork(path, note["dim"]),
        provenance,
    )


def load_students(entries: Sequence[str], device: torch.device) -> list[Encoder]:
    """The students of a `student=` key.

    Args:
        entries: `checkpoint` or `name=checkpoint` each; a checkpoint of `train_d2vfm`, or an
            `.onnx` file of `export_student`. Without a name, a student is called student,
            student_onnx or student_int8, by the kind of its file.
        device: where they will run.

    Raises:
        UserError: no such file, or two students of one name.
    """
    encoders = []
    for entry in entries:
        name, path = split_entry(entry)
        if Path(path).suffix == ".onnx":
            encoders.append(load_exported_encoder(path, name, device))
        else:
            encoders.append(load_student_encoder(path, name or "student"))
    names = [encoder.name for encoder in encoders]
    if len(set(names)) < len(names):
        raise UserError(
            f"student: expected students of different names, found {names}; give them names: "
            "student=[a=a.pt,b=b.pt]"
        )
    return encoders


def split_entry(entry: str) -> tuple[str, str]:
    """`name=checkpoint` -> (name, checkpoint); ("", checkpoint) for a file or folder without a
    name.
    """
    name, found, path = entry.partition("=")
    if not found or find_weights(entry).is_file():
        name, path = "", entry
    if not find_weights(path).is_file():
        raise UserError(
            f"student={entry}: expected a checkpoint or name=checkpoint, found no file {path}; "
            f"{nearest_path(Path(path))}"
        )
    return safe_id(name.strip(), "student") if name else "", path


def make_student_note(config: dict[str, Any], encoder: Encoder, form: str) -> dict[str, Any]:
    """What goes into the metadata of an exported file.

    Args:
        config: the student's part of its checkpoint's config.
        encoder: the student as an encoder.
        form: onnx or int8.
    """
    return {
        "form": form,
        "dim": encoder.dim,
        "student": config,
        "student_sha256": encoder.provenance["weights_sha256"],
        "encoder": encoder.provenance["encoder"],
        "transform": encoder.provenance["transform"],
    }
