"""The table of the classical MIL sets: accuracies of the repeats, published figures beside them,
and the bar.

Published figures are recalled, not read from the papers: mi-Net, MI-Net and their kin (Wang et al.
2018), ABMIL (Ilse et al. 2018, table 1), DSMIL (Li et al. 2021). DSMIL's authors' code reports the
best test accuracy over all epochs, at a threshold tuned on the test fold: it is no figure to
compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mil.classic.recipes import SIMPLE

SETS = ("musk1", "musk2", "fox", "tiger", "elephant")
PUBLISHED: dict[str, tuple[float, ...]] = {
    "mi_net": (0.889, 0.858, 0.613, 0.824, 0.858),
    "mi_net_embedding": (0.887, 0.859, 0.622, 0.830, 0.862),
    "mi_net_deep": (0.894, 0.874, 0.630, 0.845, 0.872),
    "mi_net_residual": (0.898, 0.873, 0.619, 0.836, 0.857),
    "abmil": (0.892, 0.858, 0.615, 0.839, 0.868),
    "gated_abmil": (0.900, 0.863, 0.603, 0.845, 0.857),
    "dsmil": (0.932, 0.930, 0.729, 0.869, 0.925),
}
HEADER = ("method", "set", "accuracy_mean", "accuracy_std", "repeats", "published")
NEAR = 0.03  # how far ABMIL may be from its published figure


@dataclass(frozen=True)
class ClassicRow:
    """Accuracy of a method on a set: the mean over folds, one value a repeat."""

    method: str
    name: str
    repeats: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.repeats))

    @property
    def std(self) -> float:
        """Over repeats; 0 with one."""
        return float(np.std(self.repeats, ddof=1)) if len(self.repeats) > 1 else 0.0

    @property
    def published(self) -> float | None:
        return PUBLISHED[self.method][SETS.index(self.name)] if self.method in PUBLISHED else None

    def record(self) -> dict[str, object]:
        """A line of table.csv."""
        published = "" if self.published is None else self.published
        numbers = (f"{self.mean:.4f}", f"{self.std:.4f}", len(self.repeats), published)
        return dict(zip(HEADER, (self.method, self.name, *numbers), strict=True))


def compute_accuracy(correct: np.ndarray, masks: np.ndarray) -> float:
    """Mean over folds of the share of test bags that are right.

    Args:
        correct: bool (B,), each bag by the model of the fold that tests it.
        masks: bool (K, B), test bags of each fold.
    """
    return float(np.mean([correct[mask].mean() for mask in masks]))


def judge_methods(rows: Sequence[ClassicRow]) -> list[tuple[bool, str]]:
    """(met, line) for every deep row against the better simple one, and for ABMIL against its
    published figure.
    """
    found = {(row.method, row.name): row for row in rows}
    verdicts = []
    for row in rows:
        simple = [found[name, row.name] for name in SIMPLE if (name, row.name) in found]
        if row.method in SIMPLE or not simple:
            continue
        best = max(simple, key=lambda other: other.mean)
        met = row.mean >= best.mean - row.std
        line = (
            f"{row.method} on {row.name}: {row.mean:.3f} +- {row.std:.3f}, {best.method} "
            f"{best.mean:.3f} +- {best.std:.3f}"
        )
        within = "within one standard deviation of the better simple row or above"
        verdicts.append((met, f"{line}: {'not ' * (not met)}{within}"))
        if row.method == "abmil" and row.published is not None:
            near = abs(row.mean - row.published) <= NEAR
            line = f"{row.method} on {row.name}: {row.mean:.3f}, published {row.published:.3f}"
            verdicts.append((near, f"{line}: {'not ' * (not near)}within {NEAR}"))
    return verdicts


def make_markdown(rows: Sequence[ClassicRow], sets: Sequence[str]) -> str:
    """`accuracy +- std (published)` by method and set."""
    found: Mapping[tuple[str, str], ClassicRow] = {(row.method, row.name): row for row in rows}
    lines = [f"| method | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    for method in dict.fromkeys(row.method for row in rows):
        cells = [_format_cell(found.get((method, name))) for name in sets]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _format_cell(row: ClassicRow | None) -> str:
    if row is None:
        return "-"
    published = f" ({row.published:.3f})" if row.published is not None else ""
    return f"{row.mean:.3f} +- {row.std:.3f}{published}"
