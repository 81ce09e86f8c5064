"""A training step of networks with depthwise convolutions on a CPU: ours against torch's autocast.

    python benchmarks/depthwise.py [--side 224] [--batch 4] [--threads 1] [--rounds 7]

Each network of timm makes a forward and a backward pass in bfloat16 with torch's own autocast, in
bfloat16 with `wsi_common.device.autocast`, and in float32; all take turns in one process. Printed
are median milliseconds, and how many times as fast as torch's autocast that is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import clock, make_parser, measure_ratios
from wsi_common.device import autocast

NETWORKS = ("tf_efficientnet_lite0", "mobilenetv3_large_100", "convnext_atto", "resnet18")
CPU = torch.device("cpu")
BASELINE = "torch autocast, bf16"


def step(
    network: nn.Module, images: Tensor, context: Callable[[], AbstractContextManager[object]]
) -> None:
    """One forward and one backward pass."""
    network.zero_grad(set_to_none=True)
    with context():
        output = network(images)
    output.float().square().mean().backward()


def main() -> None:
    """Print a table."""
    options = make_parser(__doc__, side=224, batch=4, threads=1, rounds=7).parse_args()
    torch.set_num_threads(options.threads)
    contexts = {
        BASELINE: partial(torch.autocast, "cpu", torch.bfloat16),
        "ours, bf16": partial(autocast, CPU, "bf16"),
        "fp32": partial(autocast, CPU, "fp32"),
    }
    for name in NETWORKS:
        network = timm.create_model(name, num_classes=0).to(memory_format=torch.channels_last)
        images = torch.randn(options.batch, 3, options.side, options.side)
        images = images.to(memory_format=torch.channels_last)
        clocks = {
            who: partial(clock, partial(step, network, images, context))
            for who, context in contexts.items()
        }
        print(name)
        for who, (time, ratio) in measure_ratios(clocks, BASELINE, options.rounds).items():
            print(f"  {who:22} {time:8.1f} ms, {ratio:.2f} x")


if __name__ == "__main__":
    main()
