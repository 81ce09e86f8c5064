"""A detector as an ONNX file: the same detections, in batches of any size, on slides too; and what
is refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

from detection_kd import export_detector
from detection_kd.engine import post_process
from detection_kd.models import detector_onnx
from detection_kd.models.backbone import Backbone
from detection_kd.models.deformable_detr import DeformableDETR, describe_detector
from detection_kd.models.deformable_transformer import Architecture, Detections
from detection_kd.models.detector_onnx import DetectorGraph, OnnxDetector
from detection_kd.whole_slides.detector_file import normalise_pixels, open_detector
from tests.helpers import ROOT
from wsi_common.checkpoint import load_checkpoint, save_checkpoint
from wsi_common.cli import run
from wsi_common.errors import UserError
from wsi_common.shared_weights import write_shared_weights

SIZES = Architecture(
    32, 2, 32, 1, 1, levels=2, queries=6, box_refine=True, two_stage=True, mixed_selection=True
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random detector of two classes, as a file and as a shared folder, and three pictures."""
    path = tmp_path_factory.mktemp("export")
    torch.manual_seed(2)
    model = DeformableDETR(Backbone("resnet18", "batch"), 2, SIZES)
    for parameter in model.parameters():  # heads start at 0: every box would be the same
        parameter.data += 0.02 * torch.randn_like(parameter)
    described = describe_detector(model, ["cell", "lesion"])
    described |= {"training": {"augmentation": {"eval_size": 64}}}
    described |= {"operating_point": {"min_score": 0.01}}
    save_checkpoint(path / "detector.pt", model=model.state_dict(), config=described, epoch=1)
    write_shared_weights(path / "shared", load_checkpoint(path / "detector.pt"))
    (path / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 70)).save(path / "images" / f"{number}.png")
    return path


def export(folder: Path, output: Path, *changes: str) -> int:
    keys = [f"detector={folder}/shared", f"images={folder}/images", f"output={output}"]
    words = [*keys, "check_images=3", "width=96", *changes]
    return run(export_detector.main, export_detector.Config, words)


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    output = folder / "exported"
    # the checks of shapes compare the free batch with the traced one, which makes it a constant
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert export(folder, output) == 0
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    return output


@pytest.mark.process
def test_the_file_detects_what_the_detector_does(folder: Path, exported: Path) -> None:
    record = json.loads((exported / "export_detector.json").read_text())
    assert record["size"] == [64, 96] and record["agreement"]["iou"] >= 0.99
    assert record["agreement"]["score"] <= 0.002 and list(record["files"]) == ["detector.onnx"]
    assert str(ROOT).encode() not in (exported / "detector.onnx").read_bytes()
    model, description = open_detector(folder / "detector.pt")
    network, noted = open_detector(exported / "detector.onnx")
    assert isinstance(network, OnnxDetector)
    assert noted["categories"] == description["categories"]
    assert noted["operating_point"] == description["operating_point"]
    assert noted["batch"] == 0, "any"
    for count in (1, 3):
        pixels = torch.randint(0, 255, (count, 3, 64, 96), dtype=torch.uint8)
        padding = torch.zeros(count, 64, 96, dtype=torch.bool)
        with torch.no_grad():
            ours = model.eval()(normalise_pixels(pixels), padding)
            theirs = network(normalise_pixels(pixels), padding)
        assert theirs.logits.shape == (1, count, 6, 2)
        for own, other in zip(
            *(post_process(found, [(96, 64)] * count, 12) for found in (ours, theirs)), strict=True
        ):
            assert np.allclose(own[0], other[0], atol=0.05)  # px
            assert np.allclose(own[1], other[1], atol=1e-4)
            assert np.array_equal(own[2], other[2])
    with pytest.raises(UserError, match="96 x 64 px, for which it was exported, found 64 x 64"):
        network(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))


@pytest.mark.process
def test_a_finished_export_is_left_alone(folder: Path, exported: Path) -> None:
    before = (exported / "detector.onnx").stat().st_mtime_ns
    assert export(folder, exported) == 0
    assert (exported / "detector.onnx").stat().st_mtime_ns == before
    assert export(folder, exported, "height=96") == 2  # another export
    damaged = exported / "detector.onnx"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    assert export(folder, exported) == 2
    damaged.write_bytes(content)


def test_graph_in_pytorch_is_the_detector(folder: Path) -> None:
    """The exported form is compared with the operator that is used elsewhere."""
    model, _ = open_detector(folder / "detector.pt")
    pixels = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        scores, boxes = DetectorGraph(model)(pixels)
        padding = torch.zeros(2, 64, 64, dtype=torch.bool)
        found = model.eval()(normalise_pixels(pixels), padding)
    assert torch.allclose(scores, found.logits[-1].sigmoid(), atol=1e-5)
    (own, *_), _ = post_process(found, [(64, 64)] * 2, 12)
    near = torch.isclose(boxes[0] * 64, torch.from_numpy(own)[:, None], atol=1e-2)
    assert near.all(-1).any(1).all()


def test_where_no_batch_can_be_free_pictures_are_run_one_by_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, notes = [], []

    def export_program(
        graph: object, pixels: torch.Tensor, free: tuple[int, ...], _: object
    ) -> str:
        asked.append((len(pixels), free))
        if free:
            raise torch.onnx.OnnxExporterError("specialised")
        return "model"

    class Session:
        def run(self, names: object, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            pixels = inputs["pixels"]
            assert len(pixels) == 1
            value = np.full((1, 2, 1), pixels.mean(), np.float32)
            return [value, value.repeat(4, 2)]

    monkeypatch.setattr(detector_onnx, "export_program", export_program)
    monkeypatch.setattr(detector_onnx, "save_with_note", lambda *given: notes.append(given[3]))
    model, _ = open_detector(folder / "detector.pt")
    pixels = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 64, 64)
    detector_onnx.export_detector(model, pixels, tmp_path / "x.onnx", {"size": [64, 64]})
    assert asked == [(detector_onnx.TRACED, (0,)), (1, ())] and notes[0]["batch"] == 1
    monkeypatch.setattr(detector_onnx, "read_note", lambda path, key: notes[0])
    monkeypatch.setattr(detector_onnx, "open_session", lambda path, device: Session())
    scores, boxes = OnnxDetector(tmp_path / "x.onnx").run(pixels)
    assert scores[:, 0, 0].tolist() == [0, 1, 2] and boxes.shape == (3, 2, 4)


class Shifted(torch.nn.Module):
    """A detector whose boxes or scores are off."""

    def __init__(self, model: torch.nn.Module, boxes: float, logits: float) -> None:
        super().__init__()
        self.model, self.boxes, self.logits = model, boxes, logits

    def forward(self, images: torch.Tensor, padding: torch.Tensor) -> Detections:
        found = self.model(images, padding)
        return Detections(found.logits + self.logits, found.boxes + self.boxes)


@pytest.mark.parametrize(("boxes", "logits"), [(0.01, 0.0), (0.0, 0.5)])
def test_other_detections_are_an_error(folder: Path, boxes: float, logits: float) -> None:
    model = open_detector(folder / "detector.pt")[0].eval()
    pixels = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    same = export_detector.compare_detections(model, Shifted(model, 0, 0), pixels)
    assert same == {"iou": 1.0, "score": 0.0}
    with pytest.raises(UserError, match="nothing was written"):
        export_detector.compare_detections(model, Shifted(model, boxes, logits), pixels)


def test_what_cannot_be_exported_is_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export(folder, tmp_path / "out", "check_images=4") == 2
    assert "found 3" in capsys.readouterr().err
    assert export(folder, tmp_path / "out", "width=16") == 2
    content = load_checkpoint(folder / "detector.pt")
    del content["config"]["training"]
    bare = tmp_path / "bare.pt"
    save_checkpoint(bare, model=content["model"], config=content["config"], epoch=1)
    assert export(folder, tmp_path / "out", f"detector={bare}") == 2
    assert "eval_size" in capsys.readouterr().err
    (tmp_path / "x.onnx").write_bytes(b"none")
    with pytest.raises(UserError, match=r"x\.onnx"):
        open_detector(tmp_path / "x.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export(folder, tmp_path / "out") == 2
    assert "pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
