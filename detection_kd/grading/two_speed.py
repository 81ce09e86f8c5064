"""Two speeds: everything is graded at low resolution, and the tiles that this is least sure of once
more by the teacher.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from wsi_common.errors import UserError


def measure_doubt(probabilities: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
    """Entropy relative to that of equal probabilities: 0 is sure, 1 is a guess."""
    safe = np.clip(probabilities, 1e-12, 1)
    return -(safe * np.log(safe)).sum(1) / np.log(probabilities.shape[1])


def choose_least_sure(
    probabilities: Float[np.ndarray, "n c"], share: float
) -> Bool[np.ndarray, " n"]:
    """The rows with the most doubt: at most `share` of all, of equal ones the first.

    Raises:
        UserError: a share that is none.
    """
    if not 0 <= share <= 1:
        raise UserError(f"teacher_share={share}: expected a share, 0 <= teacher_share <= 1")
    count = int(share * len(probabilities) + 1e-9)
    chosen = np.zeros(len(probabilities), bool)
    chosen[np.argsort(-measure_doubt(probabilities), kind="stable")[:count]] = True
    return chosen


def mix_speeds(
    student: Float[np.ndarray, "n c"], teacher: Float[np.ndarray, "n c"], share: float
) -> Float[np.ndarray, "n c"]:
    """The student's probabilities, with the teacher's on the `share` of rows least sure."""
    return np.where(choose_least_sure(student, share)[:, None], teacher, student)
