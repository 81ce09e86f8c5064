"""Survival: Harrell's concordance index (Harrell et al., JAMA 1982), for B weightings of S slides
at a time.

A pair of slides is comparable when the one with the earlier time had its event: then it should have
the higher risk. With equal times, an event comes before a censoring; two events at one time are not
comparable. Equal risks count half. There is no weighting by the probability of censoring (Uno's
form); the value depends on the censoring of the cohort.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mil.datasets.labels import LabelledSlides
from mil.models.output import Target
from mil.tasks.base import Array, Names, NumberTask, ReadTargets, Row
from mil.tasks.prediction_table import read_numbers
from mil.tasks.records import FigureSpec, RunPredictions, Verdict, rank_places
from mil.tasks.slide_targets import chosen_records, present_names
from patch_encoder.cohort.labels import SlideRecord, read_rows
from wsi_common.errors import UserError
from wsi_common.files import safe_id
from wsi_common.metrics.ranking import ratio

EVENTS = ("censored", "event")
COLUMNS = ("case_id", "slide_id", "time", "event")


@dataclass(frozen=True)
class RiskPredictions(RunPredictions):
    """Risks of slides whose patients were followed.

    Attributes:
        times: (S,), to the event or to the end of the follow-up.
        events: bool (S,), False where the follow-up ended first (censored).
        risks: (S,), higher is earlier; only their order counts.
    """

    times: np.ndarray
    events: np.ndarray
    risks: np.ndarray

    @property
    def strata(self) -> np.ndarray:
        """Whether there was an event."""
        return self.events.astype(np.int64)


def concordance_index(
    times: np.ndarray, events: np.ndarray, risks: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Share of comparable pairs whose risks are in the right order, (B,), NaN without such pairs.

    Memory and time grow with S^2; 5,000 slides need 0.4 GB.
    """
    later = (times[:, None] < times[None, :]) | (
        (times[:, None] == times[None, :]) & ~events[None, :]
    )
    comparable = (events[:, None] & later).astype(np.float64)  # (S, S): row before column
    right = comparable * (
        (risks[:, None] > risks[None, :]) + 0.5 * (risks[:, None] == risks[None, :])
    )
    weights = weights.astype(np.float64)
    return ratio(((weights @ right) * weights).sum(1), ((weights @ comparable) * weights).sum(1))


def average_by_case(cases: np.ndarray, risks: np.ndarray) -> np.ndarray:
    """Mean risk of every patient's slides, patients in sorted order."""
    _, index = np.unique(cases, return_inverse=True)
    return np.bincount(index, risks) / np.bincount(index)


def evaluate_risks(
    run: RiskPredictions, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """C-index and the share of patients with an event, each (B,).

    A patient counts once, with the mean risk of their slides and the mean of their weights.
    """
    weights = np.ones((1, len(run.times))) if weights is None else weights
    _, first, index = np.unique(run.cases, return_index=True, return_inverse=True)
    share = np.eye(len(first))[index] / np.bincount(index)  # (S, P)
    events, weights = run.events[first], weights @ share
    return {
        "c_index": concordance_index(run.times[first], events, run.risks @ share, weights),
        "event_share": ratio(weights @ events, weights.sum(1)),
    }


@dataclass(frozen=True)
class SurvivalTask(NumberTask):
    """What both survival tasks share: the answer is a risk."""

    stratified_by = "event"
    score = "c_index"
    metrics = ("c_index", "event_share")
    shown = ("c_index",)
    cards = ("c_index",)
    chosen = ("val_c_index",)
    titles = {"c_index": "C-index"}  # noqa: RUF012
    tables = ("risk_groups",)
    figures = ("survival",)
    page_figures = ("survival",)
    common_scale = False
    alone = "risk"
    label_word = ""
    label_heading = "follow-up"
    miss_heading = "higher than"
    order_note = "The highest risks come first"
    repeats_note = '"higher than" is the mean over its runs'
    example_groups = ("Highest risk", "Lowest risk")
    label_columns = ("time", "event")
    call_column = "risk_group"
    value_names = ("risk",)
    cell_names = ("time", "event", "risk")
    report_figures = (
        FigureSpec(
            "survival",
            "survival of the risk halves",
            "Kaplan-Meier curves of the test patients of {headline}: those above the median risk "
            "of the validation patients, in most of the runs that tested them, and the others. "
            "Bands: 95 % (Greenwood, log-log); ticks: end of the observation.",
        ),
    )
    cut_note = (
        "None for the C-index: the share of pairs of slides whose risks are in the order of their "
        "events. The halves of the risk are cut at the median of the fold's validation patients."
    )

    @classmethod
    def read_targets(
        cls, path: str | Path, subset: Names, positive: str | None, grades: Names
    ) -> ReadTargets:
        """A slide's stratum is whether it had an event."""
        found = read_follow_up(Path(path))
        records = chosen_records(path, [record for record, _ in found], subset)
        times = {record.slide_id: time for record, time in found}
        values = {r.slide_id: (times[r.slide_id], float(r.label == EVENTS[1])) for r in records}
        slides = LabelledSlides(tuple(records), present_names(path, records, EVENTS))
        return slides, cls(), values

    def compute_score(self, values: np.ndarray, targets: np.ndarray) -> float:
        ones = np.ones((1, len(targets)))
        return float(concordance_index(targets[:, 0], targets[:, 1] > 0, values[:, 0], ones)[0])

    def make_predictions(
        self, run: RunPredictions, targets: Sequence[Target], values: Array, cuts: Mapping[str, Any]
    ) -> RiskPredictions:
        followed = np.stack([np.asarray(target) for target in targets])
        return RiskPredictions(
            run.fold, run.cases, followed[:, 0], followed[:, 1] > 0, values[:, 0]
        )

    def cells(self, run: RiskPredictions) -> list[dict[str, object]]:
        columns = (run.times.tolist(), run.events.tolist(), run.risks.tolist())
        return [
            {"time": repr(time), "event": int(event), "risk": repr(risk)}
            for time, event, risk in zip(*columns, strict=True)
        ]

    def read_predictions(self, path: str | Path, fold: int, rows: Sequence[Row]) -> RiskPredictions:
        cases = np.array([row["case_id"] for row in rows])
        times, events, risks = read_numbers(path, rows, self.cell_names)
        if (times < 0).any() or not np.isin(events, (0, 1)).all():
            raise UserError(
                f"{path}: expected times of 0 or more and events of 0 or 1, found others"
            )
        return RiskPredictions(fold, cases, times, events == 1, risks)

    def carry_over(self, val: RiskPredictions) -> dict[str, Any]:
        """Mean and standard deviation of the risks of the validation patients, and their median on
        the scale that these make.
        """
        risks = average_by_case(val.cases, val.risks)
        scale = float(risks.std()) or 1.0
        centre = float(risks.mean())
        cut = (float(np.median(risks)) - centre) / scale
        return {"centre": centre, "scale": scale, "cut": cut}

    def to_common_scale(self, values: Array, carried: Mapping[str, Any]) -> Array:
        """Standard deviations above the mean of the model's validation patients: risks of two
        models have no scale in common.
        """
        return (values - carried["centre"]) / carried["scale"] if carried else values

    def call_values(self, values: Array, carried: Mapping[str, Any]) -> list[str]:
        """Higher or lower than the median of the validation patients; '' where it is not known."""
        if not carried:
            return [""] * len(values)
        return ["higher" if risk > carried["cut"] else "lower" for risk in values[:, 0]]

    evaluate = staticmethod(evaluate_risks)

    def label_texts(self, run: RiskPredictions) -> list[str]:
        pairs = zip(run.times, run.events, strict=True)
        return [f"{'event at' if event else 'no event until'} {time:g}" for time, event in pairs]

    def values(self, run: RiskPredictions) -> np.ndarray:
        return run.risks[:, None]

    def places(self, run: RiskPredictions) -> list[float | None]:
        return rank_places(run.risks)

    def verdicts(self, run: RiskPredictions) -> list[Verdict]:
        """Risks of two folds have no common scale, so that places within a fold are compared."""
        found = zip(self.label_texts(run), run.risks.tolist(), rank_places(run.risks), strict=True)
        return [
            Verdict(
                place,
                label,
                f"risk {risk:.3g}",
                f"above {100 * place:.0f} % of the fold's test slides",
            )
            for label, risk, place in found
        ]

    def repeated_rank(self, rank: float, runs: int) -> str:
        return f"{100 * rank:.0f} % on average over {runs} runs"

    def describe(self, values: np.ndarray, called: str) -> str:
        return f"risk {values[0]:.3g}"

    @property
    def question(self) -> str:
        return f"survival ({self.kind}): the higher the risk, the earlier the event"

    def status(self, label: str, right: bool | None) -> str:
        if not label:
            return "unknown"
        return "event" if label.startswith("event") else "no event"

    def miss(self, row: Mapping[str, Any]) -> float:
        """The place of the risk among the slides of its run."""
        return -1.0 if row["place"] is None else row["place"]

    def miss_text(self, row: Mapping[str, Any]) -> str:
        return "" if row["place"] is None else f"{100 * row['place']:.0f} %"


def read_follow_up(path: Path) -> list[tuple[SlideRecord, float]]:
    """Rows of the table with `censored` or `event` as their label, and their times."""
    found: list[tuple[SlideRecord, float]] = []
    for line, row in read_rows(path, COLUMNS):
        where = f"{path} line {line} (slide {row['slide_id']})"
        if not row["case_id"]:
            raise UserError(f"{where}: expected a case_id, found an empty cell")
        try:
            time = float(row["time"])
        except ValueError:
            time = math.nan
        if not (math.isfinite(time) and time > 0):
            raise UserError(
                f"{where}: expected a time > 0 to the event or the end of observation, found "
                f"'{row['time']}'"
            )
        if row["event"] not in ("0", "1"):
            raise UserError(
                f"{where}: expected event 1 (it happened) or 0 (censored), found '{row['event']}'"
            )
        label, slide = EVENTS[int(row["event"])], safe_id(row["slide_id"])
        found.append((SlideRecord(row["case_id"], slide, label, row.get("split") or None), time))
    repeated = [name for name, n in Counter(r.slide_id for r, _ in found).items() if n > 1]
    if repeated:
        raise UserError(
            f"{path}: expected each slide once, found '{repeated[0]}' more than once; remove the "
            "extra rows"
        )
    follow_up: dict[str, tuple[float, str, str]] = {}
    for record, time in found:
        known = follow_up.setdefault(record.case_id, (time, record.label, record.slide_id))
        if known[:2] != (time, record.label):
            raise UserError(
                f"{path}: case {record.case_id}: expected one time and event per patient, found "
                f"{known[0]:g} ({known[1]}) on slide {known[2]} and {time:g} ({record.label}) on "
                f"slide {record.slide_id}"
            )
    return found
