"""What a grading network costs: operations, bytes kept in training, patches per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from detection_kd.models.grading_trunks import trace_shape
from detection_kd.models.low_resolution import GradingNetwork
from wsi_common.device import autocast
from wsi_common.memory import reuse_large_blocks


@dataclass(frozen=True)
class NetworkCost:
    """Cost per patch.

    Attributes:
        gflop: 10^9 operations of the trunk; a product and a sum are two.
        kept_mib: activations that a training step keeps for its backward pass, MiB.
        per_second: patches that are graded per second, without reading them.
    """

    gflop: float
    kept_mib: float
    per_second: float


def count_gflop(network: GradingNetwork) -> float:
    """10^9 operations of one patch in the trunk; nothing is computed."""
    scale = network.scale
    return count_trunk(network.trunk, scale.side if network.keys.enlarged else scale.own_side)[0]


def count_trunk(trunk: nn.Module, side: int) -> tuple[float, int]:
    """Operations of an image of `side` px in a trunk, in 10^9, a product and a sum being two; and
    the side of its map.
    """
    with FlopCounterMode(display=False) as counter:
        shape = trace_shape(trunk, side)
    return counter.get_total_flops() / 1e9, shape[-1]


def count_kept_bytes(known: Iterable[Tensor], compute: Callable[[], object]) -> int:
    """Bytes of activations that a computation keeps for its backward pass.

    Args:
        known: tensors that are there anyway, such as weights.
        compute: the forward pass, whose result nobody needs.
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}
    alive = []  # as long as it is, its address is nobody else's

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(kept.values())


def count_loss_bytes(network: GradingNetwork, pixels: Tensor) -> int:
    """Bytes that the cross-entropy of a batch keeps for its backward pass."""
    labels = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)
    return count_kept_bytes(
        network.parameters(), lambda: F.cross_entropy(network(pixels).logits, labels)
    )


def measure_costs(
    networks: Mapping[str, GradingNetwork],
    batch: int,
    rounds: int,
    device: torch.device,
    precision: str,
) -> dict[str, NetworkCost]:
    """The cost of every network, which take turns in each round; medians over rounds.

    Args:
        networks: by name.
        batch: patches at a time.
        rounds: after one that is not counted.
        device, precision: of the computation.
    """
    if device.type == "cpu":
        reuse_large_blocks()  # as where slides are graded
    pixels, times = {}, {name: list[float]() for name in networks}
    for name, network in networks.items():
        side = network.scale.own_side
        images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
        pixels[name] = images.to(device, memory_format=torch.channels_last)
        network.to(device, memory_format=torch.channels_last).eval()
    for _ in range(rounds + 1):
        for name, network in networks.items():
            start = time.perf_counter()
            with torch.inference_mode(), autocast(device, precision):
                network(pixels[name]).logits.cpu()  # waits for the device
            times[name].append(time.perf_counter() - start)
    return {
        name: NetworkCost(
            count_gflop(network),
            count_loss_bytes(network, pixels[name]) / batch / 2**20,
            batch / median(times[name][1:]),
        )
        for name, network in networks.items()
    }
