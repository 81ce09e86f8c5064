"""Bags read ahead of the device: a thread loads the next ones while this one is trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mil.datasets.bags import Sample

AHEAD = 2  # bags in flight; each is N x D x 2 or 4 bytes
Loaded = tuple[Tensor, Tensor | None]


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
    return (
        (features.pin_memory(), None if coords is None else coords.pin_memory())
        if pin
        else (features, coords)
    )


def on_device(bag: Loaded, device: torch.device) -> Loaded:
    """Float32 features and coords on the device; half precision travels as such."""
    features, coords = bag
    coords = None if coords is None else coords.to(device, non_blocking=True)
    return features.to(device, non_blocking=True).float(), coords
