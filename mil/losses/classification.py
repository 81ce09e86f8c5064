"""Losses of one bag for a class, several labels or a grade, in fp32.

Smoothing: Szegedy et al., CVPR 2016 (the true class gets 1 - e + e / C). Focal: Lin et al., ICCV
2017, equation 4 without alpha: (1 - p_t)^gamma, here for any number of classes. Differences: none;
with both, the focal weight is that of the true class.

Grades: CORN, conditional ordinal regression for neural networks (Shi, Cao, Raschka, PAA 2023, arXiv
2111.08851). K grades, K - 1 logits; sigmoid of logit k is P(y > k | y > k - 1), so that P(y > k),
their product, falls with k without shared weights. Section 3.3: logit k learns from the bags with
y > k - 1 only. Difference: a bag's loss is the sum over its tasks, which is -log P(y) exactly; the
authors divide by the number of bag-task pairs of the batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    logsigmoid,
    pad,
    softplus,
)


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


def corn_loss(logits: Float[Tensor, " k1"], grade: int) -> Float[Tensor, ""]:
    """-log P(y = grade) of one bag, in fp32."""
    asked = logits.float()[: grade + 1]  # the tasks k with grade > k - 1
    above = (torch.arange(len(asked), device=logits.device) < grade).float()
    return binary_cross_entropy_with_logits(asked, above, reduction="sum")


def corn_probabilities(logits: Float[Tensor, "s k1"]) -> Float[Tensor, "s k"]:
    """P(y = k) for K grades: differences of P(y > k)."""
    above = logsigmoid(logits.double()).cumsum(1).exp()  # P(y > k), k = 0 .. K - 2
    return (pad(above, (1, 0), value=1.0) - pad(above, (0, 1))).to(logits.dtype)
