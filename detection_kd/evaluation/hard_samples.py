"""Which training tiles a teacher finds hard, and what is done with them: the distillation of UTS.

Source: cvblab/Mitosis-UTS, which drops every tile where teacher and annotation disagree, at the
level of the tile or at its positions. Everything here is a pure function of arrays over tiles.
Differences: a tile that scores exactly the threshold is positive everywhere; positions are matched
one to one; instead of being dropped, hard tiles may be relabelled, or all tiles weighted; only
positives may be dropped; and as many tiles may be dropped at random, which is the control without
which a gain of the filter is unproved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from wsi_common.errors import UserError

CRITERIA = ("bag", "TP", "FP", "FP_TP")
MODES = ("drop", "relabel", "soft", "random")
LEAST_LEFT = 0.1  # share of a class that a filter has to leave
MISSED, FALSE_ALARM = "teacher says negative", "teacher says positive"
OFF_TARGET, STRAY = "no detection on an annotated mitosis", "a detection off every mitosis"
AT_RANDOM = "dropped at random"


@dataclass(frozen=True)
class Filtering:
    """What becomes of every tile.

    Attributes:
        keep: whether the tile is trained on.
        weights: of its loss.
        labels: 1 or 0, that it is trained with.
        reasons: why it is hard; empty where it is not.
    """

    keep: Bool[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    reasons: list[str]


def find_hard_tiles(
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    thresholds: float | Float[np.ndarray, " n"],
    criterion: str,
    hits: Int[np.ndarray, " n"],
    strays: Int[np.ndarray, " n"],
) -> list[str]:
    """Say for each tile why it is hard; the empty text where teacher and annotation agree.

    Args:
        scores: probability of a mitosis in the tile, of the teacher.
        labels: 1 or 0, annotated.
        thresholds: from which on a tile is positive; one number, or one for each tile.
        criterion: bag, only the level of the tile; TP, a positive needs a detection on an annotated
            mitosis, too; FP, it may have no detection elsewhere; FP_TP, both.
        hits: detections on annotated mitoses, per tile.
        strays: detections elsewhere, per tile.
    """
    assert criterion in CRITERIA, criterion
    found, positive = scores >= thresholds, labels == 1
    off_target = positive & (hits == 0) & (criterion in ("TP", "FP_TP"))
    stray = positive & (strays > 0) & (criterion in ("FP", "FP_TP"))
    # the first that is true counts
    conditions = [positive & ~found, ~positive & found, off_target, stray]
    reasons = np.select(conditions, [MISSED, FALSE_ALARM, OFF_TARGET, STRAY], default="")
    return [str(reason) for reason in reasons]


def filter_tiles(
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    reasons: list[str],
    mode: str,
    *,
    positives_only: bool,
    seed: int,
) -> Filtering:
    """Decide what becomes of every tile.

    Args:
        scores: probability of a mitosis in the tile, of the teacher.
        labels: 1 or 0, annotated.
        reasons: of `find_hard_tiles`.
        mode: drop hard tiles; relabel those whose label the teacher contradicts; soft, weigh every
            tile by the teacher's probability of its label; random, drop as many of each class.
        positives_only: leave hard negatives as they are.
        seed: of the random drop.

    Raises:
        UserError: next to nothing of a class would be left.
    """
    assert mode in MODES, mode
    hard = np.array([bool(reason) for reason in reasons], bool)
    touched = hard & (labels == 1) if positives_only else hard
    keep, weights = np.ones(len(labels), bool), np.ones(len(labels))
    new_labels = labels.copy()
    if mode == "drop":
        keep = ~touched
    elif mode == "random":
        keep = ~draw_as_many(touched, labels, seed)
        reasons = ["" if kept else AT_RANDOM for kept in keep]
    elif mode == "relabel":
        contradicted = np.isin(reasons, (MISSED, FALSE_ALARM)) & touched
        new_labels = np.where(contradicted, 1 - labels, labels)
    else:
        chosen = (labels == 1) | (not positives_only)
        weights = np.where(chosen, np.where(labels == 1, scores, 1 - scores), 1.0)
    check_classes(labels, new_labels[keep])
    return Filtering(keep, weights, new_labels, reasons)


def draw_as_many(
    dropped: Bool[np.ndarray, " n"], labels: Int[np.ndarray, " n"], seed: int
) -> Bool[np.ndarray, " n"]:
    """As many tiles of each class as `dropped` has, drawn at random."""
    drawn, generator = np.zeros(len(labels), bool), np.random.default_rng(seed)
    for label in (0, 1):
        members = np.flatnonzero(labels == label)
        count = int(dropped[members].sum())
        drawn[generator.choice(members, count, replace=False)] = True
    return drawn


def check_classes(labels: Int[np.ndarray, " n"], left: Int[np.ndarray, " m"]) -> None:
    """Refuse a filter that leaves next to nothing of a class.

    Args:
        labels: of all tiles, before.
        left: labels of those that are trained on.
    """
    for label, name in ((1, "positive"), (0, "negative")):
        before, after = int((labels == label).sum()), int((left == label).sum())
        if after < max(1, LEAST_LEFT * before):
            raise UserError(
                f"filter: would leave {after} of {before} {name} tiles; use "
                "teacher_threshold=validation, positives_only=true or mode=soft, or train the "
                "teacher longer"
            )


def check_threshold(
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    thresholds: float | Float[np.ndarray, " n"],
) -> None:
    """Refuse a threshold with which the teacher tells nothing: next to every negative positive.

    With many labelled positives the threshold of the best F1 on noisy labels is such a one.
    """
    negatives = labels == 0
    called = int(((scores >= thresholds) & negatives).sum())
    if called > (1 - LEAST_LEFT) * negatives.sum():
        raise UserError(
            f"threshold: the teacher calls {called} of {negatives.sum()} negative tiles positive "
            "with it; use teacher_threshold=validation, or train the teacher longer"
        )


def audit_filter(
    filtering: Filtering, labels: Int[np.ndarray, " n"], truth: Int[np.ndarray, " n"]
) -> dict[str, Any]:
    """Count what a filter did to tiles whose labels are wrong, where the truth is known.

    Args:
        filtering: of the labels.
        labels: 1 or 0, annotated, perhaps wrong.
        truth: 1 or 0.

    Returns:
        For wrong positives, true positives, correct negatives and missed positives how many there
        are, and the share that was dropped or relabelled; and the share of wrong labels before and
        after.
    """
    changed = ~filtering.keep | (filtering.labels != labels)
    groups = {
        "wrong_positives": (labels == 1) & (truth == 0),
        "true_positives": (labels == 1) & (truth == 1),
        "correct_negatives": (labels == 0) & (truth == 0),
        "missed_positives": (labels == 0) & (truth == 1),
    }
    counts: dict[str, Any] = {}
    for name, members in groups.items():
        counts[name] = int(members.sum())
        counts[f"{name}_dropped"] = float(changed[members].mean()) if members.any() else None
    left = filtering.labels[filtering.keep]
    before, after = groups["wrong_positives"], (left == 1) & (truth[filtering.keep] == 0)
    counts["noise_before"] = float(before.sum() / max(1, (labels == 1).sum()))
    counts["noise_after"] = float(after.sum() / max(1, (left == 1).sum()))
    return counts
