"""Survival losses: Cox's partial likelihood and the likelihood of discrete hazards.

Cox: Cox, JRSS B 1972, as -sum_i e_i (r_i - log sum_{t_j >= t_i} exp r_j) over the number of events,
ties as Breslow (Biometrics 1974): every event of a time has all that are at risk then. Discrete
time: Zadeh and Schmid, "Bias in Cross-Entropy-Based Training of Deep Survival Networks", TPAMI
2021; sigmoid of logit j is the hazard of interval j. Difference from the copies in slide models:
through log-sigmoids, without an epsilon.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def cox_loss(
    risks: Float[Tensor, " b"], times: Float[Tensor, " b"], events: Bool[Tensor, " b"]
) -> Float[Tensor, ""]:
    """Mean over the events of their negative log partial likelihood; 0 without an event.

    Args:
        risks: log hazard ratios.
        times: until the event or the end of observation.
        events: False: censored.
    """
    risks = risks.float()
    order = torch.argsort(times, descending=True, stable=True)
    r, t, e = risks[order], times[order], events[order]
    # the last one of a time has the whole risk set of that time
    last = torch.searchsorted(-t, -t, right=True) - 1
    at_risk = torch.logcumsumexp(r, 0)[last]
    return -((r - at_risk) * e).sum() / e.sum().clamp(min=1)


def discrete_loss(
    logits: Float[Tensor, " j"], interval: int, event: bool, alpha: float = 0.0
) -> Float[Tensor, ""]:
    """Negative log likelihood of one bag.

    Args:
        logits: of the hazards.
        interval: where the event, or the end of observation, lies.
        event: -log S(interval - 1) - log h(interval); without one: -log S(interval).
        alpha: censored bags weigh 1 - alpha.
    """
    logits = logits.float()
    survived = -logsigmoid(-logits)  # -log(1 - h_j)
    if event:
        return survived[:interval].sum() - logsigmoid(logits[interval])
    return (1 - alpha) * survived[: interval + 1].sum()


def discrete_risk(logits: Float[Tensor, "s j"]) -> Float[Tensor, " s"]:
    """Minus the sum of the survival function over the intervals: higher dies earlier."""
    return -logsigmoid(-logits.float()).cumsum(1).exp().sum(1)
