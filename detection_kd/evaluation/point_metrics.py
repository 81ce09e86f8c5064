"""How well figures are found: F1, average precision, FROC, and more, with intervals by case.

All of it comes from one table: every detection with its score and whether it is a hit. Hits are
those of `point_matching.find_hits`, so that at every cut of the scores there are as many as a
one-to-one matching of the detections above the cut finds. Fields of one case are not independent:
intervals draw cases (wsi_common.metrics.bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from detection_kd.evaluation.froc import RATES
from detection_kd.evaluation.point_matching import RADIUS_UM, Counts, count_one_to_one, find_hits
from wsi_common.metrics.bootstrap import interval, resample_patients, spread
from wsi_common.metrics.ranking import counts_above, ratio

RESAMPLES = 1000
CHUNK = 2**20  # weights of detections that are held at a time


@dataclass(frozen=True)
class ScoredField:
    """An annotated field with what was found in it.

    Attributes:
        field_id, case, scanner: of the field.
        area_mm2: of the field, for rates per mm2; NaN: unknown, and they are NaN, too.
        found: (x, y) of the detections, um.
        scores: of the detections, 0..1.
        truth: (x, y) of the annotated mitoses, um.
    """

    field_id: str
    case: str
    scanner: str
    area_mm2: float
    found: Float[np.ndarray, "n 2"]
    scores: Float[np.ndarray, " n"]
    truth: Float[np.ndarray, "m 2"]

    def above(self, threshold: float) -> ScoredField:
        """The field with the detections of at least this score."""
        kept = self.scores >= threshold
        return replace(self, found=self.found[kept], scores=self.scores[kept])


class Operating(NamedTuple):
    """A threshold on scores, and the F1 that it has where it was chosen."""

    threshold: float
    f1: float


class DetectionTable(NamedTuple):
    """The detections of several fields: score, hit or not, and number of the field of each."""

    scores: Float[np.ndarray, " n"]
    hits: Bool[np.ndarray, " n"]
    fields: Int[np.ndarray, " n"]


def tabulate_detections(fields: Sequence[ScoredField], radius: float = RADIUS_UM) -> DetectionTable:
    """Put the detections of all fields in one table."""
    scores = [np.zeros(0), *(field.scores for field in fields)]
    hits = [find_hits(field.found, field.truth, field.scores, radius) for field in fields]
    numbers = np.repeat(np.arange(len(fields)), [len(field.scores) for field in fields])
    return DetectionTable(
        np.concatenate(scores), np.concatenate([np.zeros(0, bool), *hits]), numbers
    )


def choose_threshold(fields: Sequence[ScoredField], radius: float = RADIUS_UM) -> Operating:
    """The score from which on detections have the highest F1 over all fields together.

    Detections have to come from `peaks.find_candidates`, which are the same at every threshold.

    Returns:
        The threshold, half-way to the next lower score (so that rounding the last bit of a score
        changes nothing), and its F1; infinity and 0 where nothing is hit.
    """
    table = tabulate_detections(fields, radius)
    truth = sum(len(field.truth) for field in fields)
    scores = np.unique(table.scores)[::-1]
    if not table.hits.any():
        return Operating(np.inf, 0.0)
    hits, false = (counts[0] for counts in counts_above(table.hits, table.scores))
    f1 = 2 * hits / (hits + false + truth)
    best = int(f1.argmax())
    lower = scores[best + 1] if best + 1 < len(scores) else scores[best]
    return Operating(float((scores[best] + lower) / 2), float(f1[best]))


def count_fields(
    fields: Iterable[ScoredField],
    threshold: float,
    count: Callable[..., Counts] = count_one_to_one,
    radius: float = RADIUS_UM,
) -> Int[np.ndarray, "fields 3"]:
    """Hits, false positives and misses of every field at a threshold, as `count` matches them."""
    rows = [count(item.found, item.truth, radius) for item in (f.above(threshold) for f in fields)]
    return np.array(rows, np.int64).reshape(-1, 3)


def compute_rates(counts: Float[np.ndarray, "... 3"]) -> dict[str, np.ndarray]:
    """F1, precision and recall of (hits, false positives, misses); NaN where nothing decides."""
    hits, false, misses = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    return {
        "f1": ratio(2 * hits, 2 * hits + false + misses),
        "precision": ratio(hits, hits + false),
        "recall": ratio(hits, hits + misses),
    }


class DetectionCurve(NamedTuple):
    """What every cut of the scores gives, from none to all detections, for B weightings of fields.

    Attributes:
        hits, false: weight of hits and false positives, (B, cuts + 1).
        truth: weight of the annotated mitoses, (B, 1).
        area: weighted mm2 of the fields, (B, 1).
    """

    hits: np.ndarray
    false: np.ndarray
    truth: np.ndarray
    area: np.ndarray

    def average_precision(self) -> np.ndarray:
        """Area under precision over recall as a sum of steps, (B,); figures that no detection hits
        count as never recalled. NaN without mitoses.
        """
        hits, false = self.hits[:, 1:], self.false[:, 1:]
        steps = np.diff(self.hits, axis=1) * np.nan_to_num(ratio(hits, hits + false))
        return ratio(steps.sum(1), self.truth[:, 0])

    def sensitivity_at(self, rate: float) -> np.ndarray:
        """The greatest recall of any cut with at most `rate` false positives per mm2, (B,)."""
        allowed = self.false <= rate * self.area + 1e-9
        recall = ratio((self.hits * allowed).max(1), self.truth[:, 0])
        return np.where(np.isnan(self.area[:, 0]), np.nan, recall)

    def froc(self) -> np.ndarray:
        """Mean recall at `RATES` false positives per mm2, (B,)."""
        return np.mean([self.sensitivity_at(rate) for rate in RATES], axis=0)


def compute_curve(
    fields: Sequence[ScoredField],
    table: DetectionTable,
    weights: Float[np.ndarray, "b fields"] | None = None,
) -> DetectionCurve:
    """Hits and false positives at every cut; without weights every field counts once, B = 1."""
    weights = np.ones((1, len(fields))) if weights is None else weights
    hits = false = np.zeros((len(weights), 0))
    if len(table.scores):
        hits, false = counts_above(table.hits, table.scores, weights[:, table.fields])
    truth = weights @ np.array([len(field.truth) for field in fields], np.float64)
    area = weights @ np.array([field.area_mm2 for field in fields], np.float64)
    padded = (np.pad(counts, ((0, 0), (1, 0))) for counts in (hits, false))
    return DetectionCurve(*padded, truth[:, None], area[:, None])


def measure_fields(
    fields: Sequence[ScoredField],
    threshold: float,
    radius: float = RADIUS_UM,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything about these fields at a threshold and over all of them.

    Returns:
        Counts (`fields`, `cases`, `mitoses`, `hits`, `false_positives`, `misses`) and for `f1`,
        `precision`, `recall`, `false_positives_per_mm2`, `average_precision`, `froc` their value
        and `<name>_ci`, the 95 % interval [low, high] over cases; None where there are too few.
    """
    cases = np.array([field.case for field in fields])
    table, counts = (
        tabulate_detections(fields, radius),
        count_fields(fields, threshold, radius=radius),
    )
    plain = _measure(fields, table, counts, np.ones((1, len(fields))))
    weights = (
        resample_patients(cases, resamples, (seed,)) if resamples else np.ones((0, len(cases)))
    )
    size = max(1, CHUNK // max(1, len(table.scores)))
    drawn = [
        _measure(fields, table, counts, weights[start : start + size])
        for start in range(0, resamples, size)
    ]
    freedom = len(np.unique(cases)) - 1
    hits, false, misses = counts.sum(0).tolist()
    result: dict[str, Any] = {"fields": len(fields), "cases": freedom + 1, "mitoses": hits + misses}
    result |= {"hits": hits, "false_positives": false, "misses": misses}
    for name, value in plain.items():
        samples = np.concatenate([np.zeros(0), *(part[name] for part in drawn)])
        top = np.inf if name == "false_positives_per_mm2" else 1.0
        result[name] = float(value[0])
        result[f"{name}_ci"] = interval(spread(samples, float(value[0]), freedom), (0, top))[0]
    return result


def _measure(
    fields: Sequence[ScoredField],
    table: DetectionTable,
    counts: Int[np.ndarray, "fields 3"],
    weights: Float[np.ndarray, "b fields"],
) -> dict[str, np.ndarray]:
    """The measures of every weighting, (B,) each."""
    total, curve = weights @ counts, compute_curve(fields, table, weights)
    rates = compute_rates(total)
    rates["false_positives_per_mm2"] = ratio(total[:, 1], curve.area[:, 0])
    return rates | {"average_precision": curve.average_precision(), "froc": curve.froc()}


def measure_groups(
    fields: Sequence[ScoredField],
    key: Callable[[ScoredField], str],
    threshold: float,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """`measure_fields` of every group of fields with the same key, by rising key."""
    groups = sorted({key(field) for field in fields})
    return {
        name: measure_fields([f for f in fields if key(f) == name], threshold, **options)
        for name in groups
    }


def transfer_thresholds(
    fields: Sequence[ScoredField], radius: float = RADIUS_UM
) -> dict[str, dict[str, Any]]:
    """F1 on the fields of each scanner at the threshold that is best on those of another.

    Returns:
        Scanner that it was chosen on -> `threshold`, and `f1` by scanner.
    """
    scanners = sorted({field.scanner for field in fields})
    groups = {name: [field for field in fields if field.scanner == name] for name in scanners}
    table = {}
    for name, group in groups.items():
        threshold = choose_threshold(group, radius).threshold
        f1 = {
            other: float(compute_rates(count_fields(rest, threshold, radius=radius).sum(0))["f1"])
            for other, rest in groups.items()
        }
        table[name] = {"threshold": threshold, "f1": f1}
    return table
