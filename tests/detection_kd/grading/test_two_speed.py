"""The teacher on the tiles that the student is least sure of."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import entropy

from detection_kd.grading.two_speed import choose_least_sure, measure_doubt, mix_speeds
from wsi_common.errors import UserError

STUDENT = np.array([[0.98, 0.01, 0.01], [0.4, 0.3, 0.3], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])


def test_doubt_is_relative_entropy() -> None:
    expected = entropy(STUDENT, axis=1) / np.log(3)
    np.testing.assert_allclose(measure_doubt(STUDENT), expected, atol=1e-9)
    assert measure_doubt(np.full((1, 3), 1 / 3))[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("share", "chosen"),
    [(0, []), (0.24, []), (0.25, [1]), (0.5, [1, 3]), (0.75, [0, 1, 3]), (1, [0, 1, 2, 3])],
)
def test_at_most_the_share_is_chosen_least_sure_first(share: float, chosen: list[int]) -> None:
    assert np.flatnonzero(choose_least_sure(STUDENT, share)).tolist() == chosen
    teacher = np.full_like(STUDENT, -1.0)
    mixed = mix_speeds(STUDENT, teacher, share)
    assert np.flatnonzero((mixed == -1).all(1)).tolist() == chosen
    rest = np.setdiff1d(range(4), chosen)
    assert (mixed[rest] == STUDENT[rest]).all()


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UserError, match=r"expected a share, 0 <= teacher_share <= 1"):
        choose_least_sure(STUDENT, share)
