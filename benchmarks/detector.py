"""The whole detector against transformers' Deformable DETR: same architecture, same weights,
interleaved in one process.

    python benchmarks/detector.py [--device cuda] [--side 800] [--json]

Two passes of the published model (ResNet-50, 6 + 6 layers, 300 queries) over one image with 20
boxes: inference, and a training step without the optimiser (forward, matching, losses of all
layers, backward). Figures are medians over rounds; in a round each contestant runs once. Losses are
not equal (transformers weighs classes by 1, not 2), their cost is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, TimmBackboneConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import clock, compare, make_parser
from detection_kd import engine
from detection_kd.datasets.detection import DetectionBatch
from detection_kd.models.backbone import Backbone
from detection_kd.models.checkpoint_import import convert_huggingface
from detection_kd.models.deformable_detr import DeformableDETR
from detection_kd.models.deformable_transformer import Architecture
from detection_kd.ops.compiled import unavailable

CLASSES, BOXES = 10, 20


def transformers_model() -> DeformableDetrForObjectDetection:
    """transformers' model with random weights."""
    backbone = TimmBackboneConfig(
        backbone="resnet50", out_indices=[2, 3, 4], use_pretrained_backbone=False
    )
    return DeformableDetrForObjectDetection(
        DeformableDetrConfig(backbone_config=backbone, num_labels=CLASSES)
    )


def our_model(theirs: DeformableDetrForObjectDetection) -> DeformableDETR:
    """Ours with the same weights."""
    model = DeformableDETR(Backbone("resnet50", "frozen"), CLASSES, Architecture())
    prefix = "model.backbone.model."
    weights = {
        f"backbone.{name.removeprefix(prefix)}": v
        for name, v in theirs.state_dict().items()
        if name.startswith(prefix)
    }
    model.load_state_dict(convert_huggingface(theirs.state_dict()) | weights, strict=True)
    return model


def make_batch(side: int, device: torch.device) -> DetectionBatch:
    """One image of side x 4/3 side px with boxes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, side, side * 4 // 3, generator=generator).to(device)
    centres, sizes = (torch.rand(BOXES, 2, generator=generator) for _ in range(2))
    boxes = torch.cat((0.2 + 0.6 * centres, 0.02 + 0.1 * sizes), -1).to(device)
    labels = torch.randint(CLASSES, (BOXES,), generator=generator).to(device)
    padding = torch.zeros(1, *images.shape[-2:], dtype=torch.bool, device=device)
    return DetectionBatch(images, padding, [boxes], [labels], [0])


def contestants(side: int, device: torch.device) -> dict[str, dict[str, Callable[[], object]]]:
    """{pass: {name: call}}."""
    theirs = transformers_model()
    ours = our_model(theirs).to(device)
    theirs.to(device)
    batch = make_batch(side, device)
    mask = (~batch.padding).long()
    annotations = [{"class_labels": batch.labels[0], "boxes": batch.boxes[0]}]

    def our_inference() -> Tensor:
        with torch.inference_mode():
            return ours.eval()(batch.images, batch.padding).boxes[-1]

    def their_inference() -> Tensor:
        with torch.inference_mode():
            return theirs.eval()(batch.images, pixel_mask=mask).pred_boxes

    def our_step() -> None:
        detections = ours.train()(batch.images, batch.padding)
        matches = engine.match_batch(detections, batch)
        backward(ours, engine.compute_batch_loss(detections, batch, matches, BOXES)[0])

    def their_step() -> None:
        backward(theirs, theirs.train()(batch.images, pixel_mask=mask, labels=annotations).loss)

    difference = (our_inference() - their_inference()).abs().max().item()
    assert difference < 1e-3, f"boxes differ by {difference}"
    return {
        "inference": {"transformers": their_inference, "ours": our_inference},
        "training step": {"transformers": their_step, "ours": our_step},
    }


def backward(model: nn.Module, loss: Tensor) -> None:
    """Gradients of every parameter."""
    model.zero_grad(set_to_none=True)
    loss.backward()


def clock_cuda(call: Callable[[], object]) -> float:
    """Milliseconds of one call until the device has finished it."""

    def finish() -> None:
        call()
        torch.cuda.synchronize()

    return clock(finish)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--side", type=int, default=800, help="short side of the image, px")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if reason := unavailable(arguments.device):
        sys.exit(f"error: {reason}")
    torch.set_num_threads(arguments.threads)
    rows = []
    for name, calls in contestants(arguments.side, torch.device(arguments.device)).items():
        medians = compare(
            calls, clock_cuda if arguments.device == "cuda" else clock, arguments.rounds
        )
        rows.append({"pass": name, **medians, "ratio": medians["transformers"] / medians["ours"]})
    if arguments.json:
        print(
            json.dumps(
                {
                    "threads": arguments.threads,
                    "torch": torch.__version__,
                    "side": arguments.side,
                    "rows": rows,
                }
            )
        )
        return
    print(f"{'pass':14} {'transformers':>14} {'ours':>12} {'ratio':>7}")
    for row in rows:
        print(
            f"{row['pass']:14} {row['transformers']:11.0f} ms {row['ours']:9.0f} ms "
            f"{row['ratio']:6.2f}x"
        )


if __name__ == "__main__":
    main()
