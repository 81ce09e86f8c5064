"""A training step of networks on a CPU in bfloat16: ours against torch's autocast and timm's norms.

    python benchmarks/trunk_step.py [--side 224] [--batch 4] [--threads 1] [--rounds 7]

Each network of timm makes a forward and a backward pass, with batch norm that is trained and with
frozen batch norm (the detector's). The baseline has torch's own autocast and timm's frozen norm;
ours has `wsi_common.device.autocast` (depthwise convolutions in float32 inside) and
`detection_kd.models.frozen_norm`. All take turns in one process. Printed are median milliseconds,
and how many times as fast as the baseline that is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import clock, make_parser, measure_ratios
from detection_kd.models.frozen_norm import freeze_norms
from wsi_common.device import autocast

NETWORKS = ("tf_efficientnet_lite0", "mobilenetv3_large_100", "convnext_atto", "resnet50")
CPU = torch.device("cpu")
BASELINE = "torch and timm, bf16"
Context = Callable[[], AbstractContextManager[object]]


def step(network: nn.Module, images: Tensor, context: Context) -> None:
    """One forward and one backward pass."""
    network.zero_grad(set_to_none=True)
    with context():
        output = network(images)
    output.float().square().mean().backward()


def list_contestants(network: nn.Module, frozen: bool) -> dict[str, tuple[nn.Module, Context]]:
    """Name -> network and autocast."""
    theirs, ours = network, network
    if frozen:
        theirs = freeze_batch_norm_2d(copy.deepcopy(network))
        ours = freeze_norms(copy.deepcopy(network))
    return {
        BASELINE: (theirs, partial(torch.autocast, "cpu", torch.bfloat16)),
        "ours, bf16": (ours, partial(autocast, CPU, "bf16")),
        "fp32": (ours, partial(autocast, CPU, "fp32")),
    }


def main() -> None:
    """Print a table."""
    options = make_parser(__doc__, side=224, batch=4, threads=1, rounds=7).parse_args()
    torch.set_num_threads(options.threads)
    images = torch.randn(options.batch, 3, options.side, options.side)
    images = images.to(memory_format=torch.channels_last)
    for name in NETWORKS:
        for norm in ("batch", "frozen"):
            network = timm.create_model(name, num_classes=0).to(memory_format=torch.channels_last)
            clocks = {
                who: partial(clock, partial(step, each, images, context))
                for who, (each, context) in list_contestants(network, norm == "frozen").items()
            }
            print(f"{name}, {norm} norm")
            for who, (time, ratio) in measure_ratios(clocks, BASELINE, options.rounds).items():
                print(f"  {who:22} {time:8.1f} ms, {ratio:.2f} x")


if __name__ == "__main__":
    main()
