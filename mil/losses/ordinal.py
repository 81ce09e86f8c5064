"""CORN: conditional ordinal regression for neural networks (Shi, Cao, Raschka, PAA 2023, arXiv
2111.08851).

K grades, K - 1 logits; sigmoid of logit k is P(y > k | y > k - 1), so that P(y > k), their product,
falls with k without shared weights. Section 3.3: logit k learns from the bags with y > k - 1 only.
Difference: a bag's loss is the sum over its tasks, which is -log P(y) exactly; the authors divide
by the number of bag-task pairs of the batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, pad


def corn_loss(logits: Float[Tensor, " k1"], grade: int) -> Float[Tensor, ""]:
    """-log P(y = grade) of one bag, in fp32."""
    asked = logits.float()[: grade + 1]  # the tasks k with grade > k - 1
    above = (torch.arange(len(asked), device=logits.device) < grade).float()
    return binary_cross_entropy_with_logits(asked, above, reduction="sum")


def corn_probabilities(logits: Float[Tensor, "s k1"]) -> Float[Tensor, "s k"]:
    """P(y = k) for K grades: differences of P(y > k)."""
    above = logsigmoid(logits.double()).cumsum(1).exp()  # P(y > k), k = 0 .. K - 2
    return (pad(above, (1, 0), value=1.0) - pad(above, (0, 1))).to(logits.dtype)
