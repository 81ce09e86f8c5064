"""From the share of each growth pattern in a needle biopsy to its Gleason score and ISUP grade
group.

Sources. Score: the primary pattern is the most extensive one and the secondary pattern the highest
one of the others, in whatever amount; a lower pattern of less than 5 % of the tumour is left out
(Epstein et al., "The 2005 ISUP consensus conference on Gleason grading of prostatic carcinoma", Am
J Surg Pathol 29(9), 2005, needle biopsies; kept by the 2014 conference). Groups 1 to 5: Epstein et
al., "The 2014 ISUP consensus conference on Gleason grading of prostatic carcinoma", Am J Surg
Pathol 40(2), 2016.

A pathologist trusts every pattern that they report. A grade map has wrong patches, and one of them
would raise the score; `least_share` leaves such traces out and is no part of the published rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LIMITED = 0.05
"""Share of the tumour below which a lower pattern is left out."""


@dataclass(frozen=True)
class GleasonScore:
    """The score of one biopsy.

    Attributes:
        primary, secondary: patterns 3 to 5; 0 and 0 where there is no tumour.
    """

    primary: int
    secondary: int

    @property
    def total(self) -> int:
        """The Gleason score, 6 to 10; 0 without tumour."""
        return self.primary + self.secondary

    @property
    def isup_group(self) -> int:
        """ISUP grade group 1 to 5; 0 without tumour."""
        if self.total == 7:
            return 2 if self.primary == 3 else 3
        return {0: 0, 6: 1, 8: 4, 9: 5, 10: 5}[self.total]

    def __str__(self) -> str:
        if not self.total:
            return "no tumour"
        return f"{self.primary}+{self.secondary}={self.total}, ISUP group {self.isup_group}"


def score_biopsy(areas: Mapping[int, float], least_share: float = 0.0) -> GleasonScore:
    """Score a needle biopsy by the area of each pattern.

    Args:
        areas: pattern (3, 4 or 5) -> its area, in whatever unit; benign tissue is not among them.
        least_share: patterns of less than this share of the tumour are taken for errors.

    Returns:
        the score; among patterns of equal area the higher one is the primary one.
    """
    assert areas.keys() <= {3, 4, 5} and min(areas.values(), default=0) >= 0, areas
    assert 0 <= least_share <= 1 / 3, least_share
    tumour = sum(areas.values())
    if not tumour:
        return GleasonScore(0, 0)
    shares = {
        pattern: area / tumour
        for pattern, area in areas.items()
        if area > 0 and area / tumour >= least_share
    }
    primary = max(shares, key=lambda pattern: (shares[pattern], pattern))
    others = [
        pattern
        for pattern, share in shares.items()
        if pattern > primary or (pattern < primary and share >= LIMITED)
    ]
    return GleasonScore(primary, max(others, default=primary))
