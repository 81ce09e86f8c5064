"""Cross-entropy of one bag with label smoothing and focal weight; sigmoid cross-entropy for several
labels at once.

Smoothing: Szegedy et al., CVPR 2016 (the true class gets 1 - e + e / C). Focal: Lin et al., ICCV
2017, equation 4 without alpha: (1 - p_t)^gamma, here for any number of classes. Differences: none;
with both, the focal weight is that of the true class.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus


def class_loss(
    logits: Float[Tensor, " c"], target: int, smoothing: float = 0.0, focal: float = 0.0
) -> Float[Tensor, ""]:
    """Cross-entropy of one bag, in fp32."""
    aim = torch.tensor([target], device=logits.device)
    loss = cross_entropy(logits.float()[None], aim, label_smoothing=smoothing)
    if focal:
        loss = loss * (1 - logits.float().softmax(0)[target]) ** focal
    return loss


def label_loss(
    logits: Float[Tensor, " l"],
    target: Float[Tensor, " l"],
    weights: Float[Tensor, " l"] | None = None,
    smoothing: float = 0.0,
    focal: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean over the labels of their binary cross-entropy, in fp32.

    Args:
        logits: one a label.
        target: 1 where the bag has the label.
        weights: of the positives.
        smoothing: targets move by half of it towards 1/2.
        focal: gamma.
    """
    logits, target = logits.float(), target.float()
    aim = target * (1 - smoothing) + smoothing / 2
    losses = binary_cross_entropy_with_logits(logits, aim, pos_weight=weights, reduction="none")
    if focal:
        # 1 - p_t = sigmoid(-s) for positives, sigmoid(s) for negatives
        losses = losses * torch.exp(-focal * softplus(logits * (2 * target - 1)))
    return losses.mean()
