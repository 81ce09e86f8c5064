"""What a trained slide classifier says of bags: whole ones read ahead of the device, very large
ones block by block.

A bag that takes more than WHOLE_BYTES as float32 is streamed (mil/training/streaming.py) where the
model allows it, wherever the bag
lies: what is predicted does not depend on how much of a cohort fits into memory. Streaming computes
in float32, since sums over hundreds of blocks would lose digits in bfloat16.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.device import autocast
from mil.models import Standardised
from mil.training.prefetch import Loadable, on_device, prefetch
from mil.training.streaming import BLOCK, can_stream, stream
from patch_encoder.bags.bag import StoredBag

logger = logging.getLogger(__name__)
WHOLE_BYTES = 128 << 20  # 32,768 tiles of 1,024 features


class Held:
    """A bag in memory as a source of blocks."""

    def __init__(self, features: Float[Tensor, "n d"]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def blocks(self, tiles: int = 0) -> Iterator[Tensor]:
        """Features in order."""
        return iter(self.features.split(tiles or BLOCK))

    def rows(self, index: Int[Tensor, " k"]) -> Tensor:
        """Features of some tiles."""
        return self.features[index]


@torch.inference_mode()
def predict(
    model: nn.Module,
    samples: Sequence[Loadable],
    device: torch.device,
    precision: str = "fp32",
    whole: int | None = None,
) -> Float[Tensor, "s c"]:
    """Logits (S, C) of the samples, on the CPU.

    Args:
        model: on the device.
        samples: bags in memory or on disk.
        device: where to compute.
        precision: of whole bags; streamed ones are float32.
        whole: bytes of float32 features up to which a bag is read whole; None: WHOLE_BYTES.
    """
    model.eval()
    large = [is_streamed(model, sample.features, whole) for sample in samples]
    loaded = prefetch(
        [(sample, None) for sample, streams in zip(samples, large, strict=True) if not streams],
        device,
    )
    logits = []
    for sample, streams in zip(samples, large, strict=True):
        if streams:
            logits.append(stream(model, source_of(sample.features), device).logits)
            continue
        _, bag = next(loaded)
        with autocast(device, precision):
            logits.append(model(*on_device(bag, device)).logits.float())
    return torch.stack([row.cpu() for row in logits])


def is_streamed(model: nn.Module, features: Any, whole: int | None = None) -> bool:
    """Whether a bag is too large to be read whole, and the model can do without; says once if it
    cannot.
    """
    whole = WHOLE_BYTES if whole is None else whole
    if float_bytes(features) <= whole:
        return False
    if not can_stream(model):
        say_whole(name_of(model), whole)
    return can_stream(model)


def float_bytes(features: Any) -> int:
    """Bytes of a bag's features as float32."""
    tiles, width = features.shape
    return 4 * tiles * width


def source_of(features: Tensor | StoredBag) -> Held | StoredBag:
    """A bag as blocks."""
    return features if isinstance(features, StoredBag) else Held(features)


def name_of(model: nn.Module) -> str:
    """The class of the model inside."""
    return type(model.model if isinstance(model, Standardised) else model).__name__


@cache
def say_whole(name: str, whole: int) -> None:
    """Once a process: large bags are a matter of memory with this model."""
    logger.warning(
        "%s: bags of more than %d MiB as float32 are read whole to be predicted, with memory in "
        "proportion to their tiles: the "
        "model is no reduction over tiles that could be streamed",
        name,
        whole >> 20,
    )
