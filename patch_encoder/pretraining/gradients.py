"""The gradients of one step of self-distillation: what the teacher says, then the student's views,
part by part where memory is short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patch_encoder.pretraining.state import DistillationState
from wsi_common.device import autocast
from wsi_common.optim import add_terms, exchange_gradients, require_finite
from wsi_common.step_timer import StepTimes

REMEDY = "lower training.lr or objective.temperature_end, or set precision=fp32"
Terms = dict[str, Tensor]


@torch.no_grad()
def ask_teacher(
    state: DistillationState,
    views: Sequence[Float[Tensor, "b c _ _"]],
    device: torch.device,
    precision: str,
) -> tuple[Float[Tensor, "t b k"], Float[Tensor, "n d"]]:
    """The teacher's logits (T, B, K) of T views, and its features (T * B, D), view by view."""
    with autocast(device, precision):
        logits, features = state.teacher(list(views))
    return logits.view(len(views), -1, logits.shape[-1]), features


def add_student_gradients(
    state: DistillationState,
    views: Sequence[Float[Tensor, "b c _ _"]],
    compute_terms: Callable[[Tensor, Tensor, slice], Terms],
    *,
    accumulate: int,
    device: torch.device,
    precision: str,
    where: str,
    times: StepTimes,
) -> Terms:
    """Add up the student's gradients over the parts of a step.

    Args:
        state: student and gradient scaler.
        views: V views of this process's items, (B, C, H, W) each.
        compute_terms: gives `loss` and its terms from the logits (V * b, K) and features (V * b, D)
            of one part, and the slice of the B items that it has.
        accumulate: parts, all of one size.
        device, precision: of the computation.
        where: epoch and step, for the error of a loss that is no number.
        times: gets the marks "forward" and "backward".

    Returns:
        The means of all terms over the parts, detached.
    """
    size = len(views[0]) // accumulate
    sums: Terms = {}
    for number in range(accumulate):
        part = slice(number * size, (number + 1) * size)
        with exchange_gradients(state.model, last=number == accumulate - 1):
            with autocast(device, precision):
                logits, features = state.model([view[part] for view in views])
            terms = compute_terms(logits, features, part)
            require_finite(terms["loss"], where, terms, remedy=REMEDY)
            times.mark("forward")
            state.scaler.scale(terms["loss"] / accumulate).backward()
            times.mark("backward")
        sums = add_terms(sums, {name: value / accumulate for name, value in terms.items()})
    return sums
