"""How deep the parameters of a network lie whose stages have no known names: by the strides of the
maps that its layers take and give in one pass over a small picture.

The largest part of the network that keeps the stride of its maps, or halves its maps once, is of
one stage: that of most of its layers. A part that begins at the picture itself is the stem.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

LAST_STAGE = 4  # of stem and strides 4, 8, 16, 32
DEEPEST = 32  # px; what runs behind it, as a pyramid on top of a trunk, is of the last stage


class LayerCall(NamedTuple):
    """A layer that was called, with the strides of what it took and gave; 0: not known."""

    name: str
    before: int
    after: int


def find_stages(
    network: nn.Module, size: tuple[int, int], run: Callable[[], Any]
) -> dict[str, int]:
    """Stage 0 (stem), 1 (stride 4) ... 4 (stride 32) of every parameter; those of layers that are
    not called are of the last one.

    Args:
        network: the layers are its modules without children.
        size: height and width of the picture, px, that `run` shows to the network.
        run: one forward pass.
    """
    calls = _watch(network, size, run)
    known: dict[str, int | None] = {}

    def of_part(name: str) -> int | None:
        if name not in known:
            own = [call for call in calls if f"{call.name}.".startswith(f"{name}.")]
            known[name] = _find_stage_of_part(own)
        return known[name]

    found = {}
    for name, _ in network.named_parameters():
        steps = name.split(".")[:-1]
        parts = (".".join(steps[:length]) for length in range(1, len(steps) + 1))
        stages = (stage for part in parts if (stage := of_part(part)) is not None)
        found[name] = next(stages, LAST_STAGE)
    return found


def _find_stage_of_part(calls: list[LayerCall]) -> int | None:
    """Stage of a part of the network by the calls of its layers; None: it spans several."""
    strides = [call.after for call in calls if call.after]
    if not strides:
        return None
    before, after = calls[0].before or strides[0], strides[-1]
    if before == 1 and after <= 4:
        return 0
    if len(strides) > 1 and after // before not in (1, 2):
        return None
    counts = Counter(strides)
    most = max(counts, key=lambda stride: (counts[stride], stride))
    return max(0, min(LAST_STAGE, int(math.log2(most)) - 1))


def _watch(network: nn.Module, size: tuple[int, int], run: Callable[[], Any]) -> list[LayerCall]:
    """The layers in the order in which they are called."""
    calls: list[LayerCall] = []
    deepest = 0

    def note(name: str, given: tuple[Any, ...], output: Any) -> None:
        nonlocal deepest
        before, after = _find_stride(given[0] if given else None, size), _find_stride(output, size)
        if deepest >= DEEPEST:
            before = after = DEEPEST
        deepest = max(deepest, after)
        calls.append(LayerCall(name, before, after))

    handles = [
        module.register_forward_hook(lambda _, given, output, name=name: note(name, given, output))
        for name, module in network.named_modules()
        if not any(module.children())
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _find_stride(value: Any, size: tuple[int, int]) -> int:
    """Stride of a map (B, C, H, W) or (B, H, W, C), or of tokens (B, N, C); 0: none of these."""
    if not isinstance(value, Tensor) or value.ndim not in (3, 4):
        return 0
    for stride in (1, 2, 4, 8, 16, 32):
        height, width = size[0] // stride, size[1] // stride
        if value.ndim == 3 and value.shape[1] == height * width:
            return stride
        if (height, width) in (tuple(value.shape[2:]), tuple(value.shape[1:3])):
            return stride
    return 0
