"""Targets by Sinkhorn-Knopp: the batch is spread evenly over the prototypes.

Caron et al., SwAV (NeurIPS 2020), section 3.1; in place of centring in DINOv2 (Oquab et al., TMLR
2024). exp(t / temperature) is scaled, in turn, to equal mass for every prototype and for every
sample. Differences from the published code: logarithms throughout, so that no logit overflows or
leaves a prototype without mass; and the constants 1 / K and 1 / B, which the last scaling cancels,
are left out.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from patch_encoder.selfdistill.losses.precision import at_least_float32
from wsi_common.distributed import all_reduce_max, all_reduce_mean


@torch.no_grad()
def sinkhorn_targets(
    teacher_logits: Float[Tensor, "t b k"], temperature: float, rounds: int = 3
) -> Float[Tensor, "t b k"]:
    """Probabilities over prototypes, balanced over all views, samples and processes.

    Args:
        teacher_logits: (T, B, K).
        temperature: of the teacher.
        rounds: how often prototypes, then samples, are scaled.
    """
    log_mass = at_least_float32(teacher_logits).flatten(0, 1) / temperature
    for _ in range(rounds):
        log_mass = log_mass - _log_mean_over_samples(log_mass)
        log_mass = log_mass.log_softmax(dim=1)
    return log_mass.exp().view_as(teacher_logits)


def _log_mean_over_samples(log_mass: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
    """Logarithm of each prototype's mean mass over the samples of all processes."""
    own = log_mass.logsumexp(dim=0)
    peak = all_reduce_max(own)
    return peak + all_reduce_mean((own - peak).exp()).log()
