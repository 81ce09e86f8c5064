"""Smooth top-1 SVM loss (Berrada, Zisserman, Kumar, "Smooth Loss Functions for Deep Top-k
Classification", ICLR 2018).

Top-1 case in closed form: tau * log sum_j exp((s_j + alpha [j != y]) / tau) - s_y. As in the
authors' code, a sample whose two highest scores are further apart than tau * ln 1000 takes the hard
loss, max instead of the smooth maximum. CLAM trains its instance classifiers with it. Differences:
any number of classes and no other k, so that neither the package nor its recursion over polynomials
is needed.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

HARD_RATIO = 1000.0  # exp of the gap in units of tau from which on the loss is the hard one


def smooth_top1_svm(
    scores: Float[Tensor, "n c"], targets: Int[Tensor, " n"], alpha: float = 1.0, tau: float = 1.0
) -> Float[Tensor, ""]:
    """Mean loss of n samples.

    Args:
        scores: (n, C), C >= 2.
        targets: class indices.
        alpha: margin.
        tau: temperature; towards 0 the loss becomes the hard one.
    """
    augmented = scores + alpha
    augmented = augmented.scatter(
        1, targets[:, None], scores.gather(1, targets[:, None])
    )  # no margin for the true class
    true = scores.gather(1, targets[:, None]).squeeze(1)
    smooth = tau * torch.logsumexp(augmented / tau, dim=1) - true
    hard = augmented.amax(1) - true
    best = scores.detach().topk(2, dim=1).values
    return torch.where(best[:, 0] - best[:, 1] >= tau * math.log(HARD_RATIO), hard, smooth).mean()
