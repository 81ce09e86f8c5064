"""Hungarian matching of a crowded batch: ours against the published form, interleaved in one
process.

    python benchmarks/matching.py [--queries 1000 --boxes 500 --batch 8 --layers 6]

The published form (DETR, Deformable DETR) computes the cost of every prediction of the batch with
every box of the batch, layer by layer, and solves image by image on slices of it. Ours computes
costs within images, all layers at once, sends them to the host in one transfer with the boxes as
rows, and solves on all cores.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import clock, compare, make_parser
from detection_kd.losses.boxes import cxcywh_to_xyxy, generalized_iou
from detection_kd.losses.matcher import ALPHA, GAMMA, match_queries


def published(logits: Tensor, boxes: Tensor, labels: list[Tensor], targets: list[Tensor]) -> None:
    """Cost of (batch * queries) x (all boxes), one layer after the other."""
    all_labels, all_targets = torch.cat(labels), torch.cat(targets)
    counts = [len(target) for target in targets]
    for layer in range(len(logits)):
        probability = logits[layer].flatten(0, 1).sigmoid()
        found = boxes[layer].flatten(0, 1)
        negative = (1 - ALPHA) * probability**GAMMA * -(1 - probability + 1e-8).log()
        positive = ALPHA * (1 - probability) ** GAMMA * -(probability + 1e-8).log()
        overlap = generalized_iou(cxcywh_to_xyxy(found)[:, None], cxcywh_to_xyxy(all_targets)[None])
        cost = (
            2 * (positive - negative)[:, all_labels]
            + 5 * torch.cdist(found, all_targets, p=1)
            - 2 * overlap
        )
        cost = cost.view(*logits.shape[1:3], -1).cpu()
        for image, part in enumerate(cost.split(counts, -1)):
            linear_sum_assignment(part[image])


def main() -> None:
    parser = make_parser(__doc__, queries=1000, boxes=500, batch=8, layers=6, rounds=3, classes=10)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    torch.manual_seed(0)
    logits = torch.randn(a.layers, a.batch, a.queries, a.classes, device=a.device)
    boxes = torch.rand(a.layers, a.batch, a.queries, 4, device=a.device) * 0.5 + 0.1
    labels = [torch.randint(a.classes, (a.boxes,), device=a.device) for _ in range(a.batch)]
    targets = [torch.rand(a.boxes, 4, device=a.device) * 0.5 + 0.1 for _ in range(a.batch)]
    arguments = (logits, boxes, labels, targets)
    calls = {
        "published": partial(published, *arguments),
        "ours": partial(match_queries, *arguments),
    }
    medians = compare(calls, clock, a.rounds)
    print(
        f"{a.queries} queries x {a.boxes} boxes x batch {a.batch} x {a.layers} layers on "
        f"{a.device}:"
    )
    for name, milliseconds in medians.items():
        print(f"  {name:10} {milliseconds:8.0f} ms   {medians['published'] / milliseconds:5.1f}x")


if __name__ == "__main__":
    main()
