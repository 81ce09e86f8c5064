"""Applies a trained slide classifier to bags: whole ones are read ahead of the device, very large
ones block by block.

A bag that takes more than WHOLE_BYTES as float32 is streamed (mil/training/streaming.py) where the
model allows it, in memory or on disk alike: predictions do not depend on how much of a cohort fits
into memory. Streaming computes in float32, since sums over hundreds of blocks would lose digits in
bfloat16.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mil.datasets.bags import Sample
from mil.models.fusion import Fused
from mil.models.layers import inner_model
from mil.training.streaming import can_stream, stream
from patch_encoder.bags.bag import Bag
from patch_encoder.tiles.slide_grid import SlideGrid
from wsi_common.device import autocast
from wsi_common.distributed import unwrap

logger = logging.getLogger(__name__)
WHOLE_BYTES = 128 << 20  # 32,768 tiles of 1,024 features
AHEAD = 2  # bags in flight; each is N x D x 2 or 4 bytes
Loaded = tuple[Tensor, Tensor | None]


@torch.inference_mode()
def predict(
    model: nn.Module,
    samples: Sequence[Sample],
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
    marked = [(sample, is_streamed(model, sample.bag, whole)) for sample in samples]
    loaded = prefetch([(sample, None) for sample, streams in marked if not streams], device)
    logits = []
    for sample, streams in marked:
        if streams:
            covariates = sample.covariates
            logits.append(stream(model, sample.bag, device, covariates=covariates).logits)
            continue
        _, bag = next(loaded)
        with autocast(device, precision):
            output = model(*on_device(bag, device), **side_inputs(model, sample))
            logits.append(output.logits.float())
    return torch.stack([row.cpu() for row in logits])


def side_inputs(model: nn.Module, sample: Sample) -> dict[str, SlideGrid | Tensor | None]:
    """The further arguments of a model: `grid` where it lays tiles on their slide's grid
    (DeformMIL; the bags' grids of other models are never looked for), and `covariates` where it is
    fused with them.
    """
    bare = unwrap(model)
    takes_grid = getattr(inner_model(bare), "takes_grid", False)
    found: dict[str, SlideGrid | Tensor | None] = {"grid": sample.grid} if takes_grid else {}
    return found | ({"covariates": sample.covariates} if isinstance(bare, Fused) else {})


def is_streamed(model: nn.Module, bag: Bag, whole: int | None = None) -> bool:
    """Whether a bag is too large to be read whole, and the model can do without; logs once if it
    cannot.
    """
    whole = WHOLE_BYTES if whole is None else whole
    if 4 * bag.shape[0] * bag.shape[1] <= whole:  # as float32
        return False
    if not can_stream(model):
        say_whole(type(inner_model(model)).__name__, whole)
    return can_stream(model)


@cache
def say_whole(name: str, whole: int) -> None:
    """Once a process: large bags are a matter of memory with this model."""
    logger.warning(
        "%s: bags of more than %d MiB as float32 are read whole to be predicted, with memory in "
        "proportion to their tiles: the model is no reduction over tiles that could be streamed",
        name,
        whole >> 20,
    )


def prefetch(
    bags: Iterable[tuple[Sample, Tensor | None]], device: torch.device
) -> Iterator[tuple[Sample, Loaded]]:
    """(sample, loaded bag) for every (sample, tiles), in order; an error of the thread is raised
    here.

    Bags that are in memory are handed on without a thread, unless a GPU wants them in pinned
    memory.
    """
    bags = list(bags)
    pin = device.type == "cuda"
    if not pin and all(sample.bag.features is not None for sample, _ in bags):
        yield from ((sample, sample.load(tiles)) for sample, tiles in bags)
        return
    with ThreadPoolExecutor(1) as pool:
        pending: deque[tuple[Sample, Future[Loaded]]] = deque()
        for sample, tiles in bags:
            pending.append((sample, pool.submit(_load, sample, tiles, pin)))
            if len(pending) > AHEAD:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


def _load(sample: Sample, tiles: Tensor | None, pin: bool) -> Loaded:
    features, coords = sample.load(tiles)
    if not pin:
        return features, coords
    return features.pin_memory(), None if coords is None else coords.pin_memory()


def on_device(bag: Loaded, device: torch.device) -> Loaded:
    """Float32 features and coords on the device; half precision travels as such."""
    features, coords = bag
    coords = None if coords is None else coords.to(device, non_blocking=True)
    return features.to(device, non_blocking=True).float(), coords
