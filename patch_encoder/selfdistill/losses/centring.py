"""Targets of DINO by centring: what all samples share is taken off before the softmax.

Caron et al. (ICCV 2021), section 3.1 and equation 4. Centring alone drives the targets towards the
uniform distribution and the low temperature towards one prototype; together they prevent either.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from patch_encoder.selfdistill.losses.precision import at_least_float32
from wsi_common.distributed import all_reduce_mean


@torch.no_grad()
def centred_targets(
    teacher_logits: Float[Tensor, "*b k"], centre: Float[Tensor, " k"], temperature: float
) -> Float[Tensor, "*b k"]:
    """Probabilities softmax((t - c) / temperature), the centre c being that of earlier steps."""
    return ((at_least_float32(teacher_logits) - centre) / temperature).softmax(dim=-1)


@torch.no_grad()
def update_centre(
    centre: Float[Tensor, " k"], teacher_logits: Float[Tensor, "*b k"], momentum: float = 0.9
) -> Float[Tensor, " k"]:
    """The centre of the next step: momentum * c + (1 - momentum) * mean of the logits.

    The mean is over the rows of all processes, however many each has; without any row the centre
    stays. Call it after `centred_targets`: a step never sees its own mean. The centre belongs into
    the checkpoint.
    """
    rows = at_least_float32(teacher_logits).reshape(-1, teacher_logits.shape[-1])
    totals = all_reduce_mean(torch.cat([rows.sum(dim=0), rows.new_full((1,), len(rows))]))
    mean = torch.where(totals[-1] > 0, totals[:-1] / totals[-1], centre)
    return momentum * centre + (1 - momentum) * mean
