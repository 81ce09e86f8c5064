"""The table of the study: F1 with intervals by slide, differences from the references on the same
fields, and what each filter did to labels whose truth is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studies.filter_tables.rows import AGAIN, TEACHER
from studies.filter_tables.scores import FieldScores, pool
from wsi_common.files import write_csv, write_json, write_text
from wsi_common.markdown import format_table
from wsi_common.metrics.bootstrap import interval, resample_patients, spread
from wsi_common.metrics.run_bootstrap import (
    format_difference,
    format_with_interval,
    paired_difference,
)

BOOTSTRAP_SEED = 2024
AUDITED = {
    "wrong_positives_dropped": "wrong positives",
    "true_positives_dropped": "true positives",
    "correct_negatives_dropped": "correct negatives",
    "noise_after": "noise left",
}


@dataclass(frozen=True)
class RowScores:
    """A row: what its networks find, one per seed, and what its filter did, one per seed."""

    scores: Sequence[FieldScores]
    audits: Sequence[Mapping[str, Any]]


def make_table(
    rows: Mapping[str, RowScores], references: Sequence[str], resamples: int
) -> list[dict[str, Any]]:
    """One line per row.

    Fields of all seeds are pooled, and slides are drawn with all of their fields of all seeds; the
    same draws for all rows, so that differences are paired.

    Args:
        rows: name -> scores of the same fields, seed by seed.
        references: rows that the others are compared with, where they are there.
        resamples: bootstrap resamples.
    """
    pooled = {name: pool(row.scores) for name, row in rows.items()}
    cases = next(iter(pooled.values())).cases
    assert all((other.cases == cases).all() for other in pooled.values())
    weights = resample_patients(cases, resamples, (BOOTSTRAP_SEED,))
    freedom = len(np.unique(cases)) - 1
    values = {name: float(scores.f1()[0]) for name, scores in pooled.items()}
    drawn = {name: spread(s.f1(weights), values[name], freedom) for name, s in pooled.items()}
    lines = []
    for name, row in rows.items():
        hits, false, misses = pooled[name].counts.sum(0).tolist()
        line: dict[str, Any] = {"row": name, "seeds": len(row.scores), "f1": values[name]}
        line |= {"f1_ci": interval(drawn[name], (0.0, 1.0))[0], "hits": hits, "false": false}
        line |= {"misses": misses, "bag_auc": pooled[name].bag_auc}
        for other in (other for other in references if other in rows and other != name):
            found = paired_difference(values[name] - values[other], drawn[name], drawn[other])
            line |= {f"minus_{other}": found.value, f"minus_{other}_ci": found.ci}
            pairs = zip(row.scores, rows[other].scores, strict=True)
            line[f"above_{other}"] = sum(bool(a.f1()[0] > b.f1()[0]) for a, b in pairs)
        for measure in AUDITED:
            known = [audit[measure] for audit in row.audits if audit.get(measure) is not None]
            line[measure] = float(np.mean(known)) if known else None
        lines.append(line)
    return lines


def write_tables(
    output: Path, lines: Sequence[Mapping[str, Any]], references: Sequence[str]
) -> None:
    """Write filter_study.csv and .json (all figures) and filter_study.md (to read)."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    write_csv(output / "filter_study.csv", columns, [dict(line) for line in lines])
    write_json(output / "filter_study.json", list(lines))
    shown = [name for name in references if any(f"minus_{name}" in line for line in lines)]
    head = ["row", "F1", *(f"minus {_read(name)}" for name in shown), "hits / false / misses"]
    head += ["AUC of fields", *(f"{text}, %" for text in AUDITED.values())]
    body = [_describe(line, shown) for line in lines]
    write_text(output / "filter_study.md", format_table(head, body) + "\n")


def _describe(line: Mapping[str, Any], references: Sequence[str]) -> list[str]:
    cells = [_read(line["row"]), format_with_interval(line["f1"], line["f1_ci"])]
    for name in references:
        value, ci = line.get(f"minus_{name}"), line.get(f"minus_{name}_ci")
        if value is None:
            cells.append("-")
            continue
        cells.append(f"{format_difference(value, ci)} {line[f'above_{name}']}/{line['seeds']}")
    cells += [f"{line['hits']} / {line['false']} / {line['misses']}", f"{line['bag_auc']:.3f}"]
    shares = (line[measure] for measure in AUDITED)
    return cells + ["-" if share is None else f"{100 * share:.0f}" for share in shares]


def _read(name: str) -> str:
    return name.replace("_", " ")


REFERENCES = (TEACHER, AGAIN, "random_drop")
