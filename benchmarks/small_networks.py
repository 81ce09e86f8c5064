"""Networks of timm on a CPU, those with depthwise convolutions above all: a training step in
bfloat16, and inference in float32 and bfloat16.

    python benchmarks/small_networks.py [--side 224] [--batch 4] [--threads 1] [--rounds 7]

A training step is a forward and a backward pass, with batch norm that is trained and with frozen
batch norm (the detector's). The baseline has torch's own autocast and timm's frozen norm; ours has
`wsi_common.device.autocast` (depthwise convolutions in float32 inside) and
`detection_kd.models.frozen_norm`. Inference is the network itself against the form of it that
extraction runs: norms folded, activations and sums within the convolutions. All take turns in one
process. Printed are median milliseconds, and how many times as fast as the baseline that is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import Call, clock, make_parser, measure_ratios
from detection_kd.models.frozen_norm import freeze_norms
from patch_encoder.extraction.network import Network
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


def list_inference(network: nn.Module, images: Tensor) -> dict[str, Call]:
    """Name -> a call of the network, plain or as extraction runs it."""
    calls: dict[str, Call] = {}
    for precision in ("fp32", "bf16"):
        fused = Network(copy.deepcopy(network), CPU, precision, len(images))

        def call_plain(precision: str = precision) -> Tensor:
            with torch.no_grad(), autocast(CPU, precision):
                return network(images)

        calls[f"plain, {precision}"] = call_plain
        calls[f"ours, {precision}"] = lambda fused=fused: fused.launch(images).features()
    return calls


def report(title: str, calls: Mapping[str, Call], baseline: str, rounds: int) -> None:
    """Print one table."""
    print(title)
    clocks = {who: partial(clock, call) for who, call in calls.items()}
    for who, (time, ratio) in measure_ratios(clocks, baseline, rounds).items():
        print(f"  {who:22} {time:8.1f} ms, {ratio:.2f} x", flush=True)


def main() -> None:
    """Print all tables."""
    options = make_parser(__doc__, side=224, batch=4, threads=1, rounds=7).parse_args()
    torch.set_num_threads(options.threads)
    images = torch.randn(options.batch, 3, options.side, options.side)
    images = images.to(memory_format=torch.channels_last)
    for name in NETWORKS:
        for norm in ("batch", "frozen"):
            network = timm.create_model(name, num_classes=0).to(memory_format=torch.channels_last)
            steps = {
                who: partial(step, each, images, context)
                for who, (each, context) in list_contestants(network, norm == "frozen").items()
            }
            report(f"{name}, training, {norm} norm", steps, BASELINE, options.rounds)
        plain = timm.create_model(name, num_classes=0).eval().to(memory_format=torch.channels_last)
        calls = list_inference(plain, images)
        report(f"{name}, inference", calls, "plain, fp32", options.rounds)


if __name__ == "__main__":
    main()
