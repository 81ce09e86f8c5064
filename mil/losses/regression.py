"""Losses of a continuous target, in units of its standard deviation.

Huber: Huber, Annals of Mathematical Statistics 1964, with the bend at one standard deviation: an
outlier pulls with constant force, where squared error lets it dominate.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import huber_loss, mse_loss

LOSSES = ("mse", "huber")


def regression_loss(
    predicted: Float[Tensor, ""], target: Float[Tensor, ""], kind: str = "mse"
) -> Float[Tensor, ""]:
    """Squared error of one bag, or Huber's, in fp32.

    Args:
        predicted, target: standardised by the training slides.
        kind: one of LOSSES.
    """
    assert kind in LOSSES, kind
    loss = mse_loss if kind == "mse" else huber_loss
    return loss(predicted.float(), target.float())
