"""The Gleason score of a needle biopsy by hand-worked cases."""

from __future__ import annotations

import pytest

from detection_kd.evaluation.gleason import score_biopsy


@pytest.mark.parametrize(
    ("areas", "score", "group"),
    [
        ({}, (0, 0), 0),
        ({3: 0.0, 4: 0.0}, (0, 0), 0),
        ({3: 7.0}, (3, 3), 1),
        ({3: 60, 4: 40}, (3, 4), 2),
        ({3: 98, 4: 2}, (3, 4), 2),  # a higher pattern counts in whatever amount
        ({3: 40, 4: 60}, (4, 3), 3),
        ({3: 4, 4: 96}, (4, 4), 4),  # a lower one of less than 5 % does not
        ({3: 5, 4: 95}, (4, 3), 3),
        ({3: 50, 4: 50}, (4, 3), 3),  # equal areas: the higher pattern is the primary one
        ({3: 90, 5: 10}, (3, 5), 4),
        ({3: 10, 5: 90}, (5, 3), 4),
        ({3: 60, 4: 30, 5: 10}, (3, 5), 4),  # most extensive and highest, not the second by area
        ({3: 30, 4: 60, 5: 10}, (4, 5), 5),
        ({3: 30, 4: 10, 5: 60}, (5, 4), 5),
        ({3: 10, 4: 4, 5: 86}, (5, 3), 4),
        ({5: 1}, (5, 5), 5),
    ],
)
def test_hand_worked_biopsies(areas: dict[int, float], score: tuple[int, int], group: int):
    found = score_biopsy(areas)
    assert (found.primary, found.secondary) == score
    assert found.isup_group == group and found.total == sum(score)


def test_traces_are_left_out_on_request():
    areas = {3: 97.0, 5: 3.0}
    assert str(score_biopsy(areas)) == "3+5=8, ISUP group 4"
    assert str(score_biopsy(areas, least_share=0.05)) == "3+3=6, ISUP group 1"
    assert str(score_biopsy({})) == "no tumour"
