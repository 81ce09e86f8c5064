"""Break slides, bags, checkpoints, tables, settings, disks and processes on purpose, and compare
what comes of it with what has to.

    bash tools/fault_drill.sh

Every case runs a script on a small finished piece of work in a temporary folder. The exit status is
1 when a case ends otherwise than expected.
"""

from __future__ import annotations

import importlib
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fault_drill.case import Case, Outcome, run_case
from tests.fault_drill.cases import CASES
from tests.fault_drill.commands import make_template
from wsi_common.cli import launch
from wsi_common.config import key
from wsi_common.errors import UserError
from wsi_common.files import write_text

# what the scripts load when they come to it; loaded once here, for all forks
LATE = ("timm", "torchvision", "sklearn.metrics", "sklearn.model_selection", "scipy.stats")
LATE += ("matplotlib.pyplot", "pandas", "skimage.color", "skimage.filters", "skimage.morphology")
LATE += ("skimage.measure", "skimage.segmentation")


@dataclass
class Config:
    """Keys of the drill."""

    match: str = key("", "regular expression of the names of the cases; empty: all of them")
    table: str = key("", "Markdown file that gets the table; empty: none", runtime=True)


def choose_cases(pattern: str) -> list[Case]:
    """The cases whose name the pattern finds."""
    try:
        chosen = [case for case in CASES if re.search(pattern, case.name)]
    except re.error as error:
        raise UserError(f"match={pattern}: expected a regular expression, found {error}") from None
    if not chosen:
        raise UserError(f"match={pattern}: expected a part of a name, as in match=bags, found none")
    return chosen


def run_cases(cases: list[Case], root: Path) -> list[Outcome]:
    """Run cases one after the other, below `root`."""
    # loaded once, before the forks
    for script in {case.command.split()[0] for case in cases} | set(LATE):
        importlib.import_module(script)
    template, outcomes = root / "template", []
    make_template(template)
    for number, case in enumerate(cases):
        outcome = run_case(case, template, root / f"case{number}")
        outcomes.append(outcome)
        verdict = "skipped" if outcome.skipped else "; ".join(outcome.problems) or "ok"
        expected = f"{case.status} {case.line}".strip()
        print(f"{case.name} | {expected} | {outcome.status} {outcome.line} | {verdict}", flush=True)
    return outcomes


def make_table(cases: list[Case], outcomes: list[Outcome], root: Path) -> str:
    """The cases as a Markdown table."""
    lines = ["| case | expected | seen | |", "|---|---|---|---|"]
    for case, outcome in zip(cases, outcomes, strict=True):
        verdict = "skipped" if outcome.skipped else "; ".join(outcome.problems) or "ok"
        seen = shorten(outcome.line, root)
        expected = f"`{case.status}`" + (f" `{shorten(case.line, root)}`" if case.line else "")
        lines.append(f"| {case.name} | {expected} | `{outcome.status}` `{seen}` | {verdict} |")
    return "\n".join(lines) + "\n"


def shorten(line: str, root: Path) -> str:
    """A line for a cell, without folders of this machine and the time of day."""
    line = re.sub(rf"{re.escape(str(root))}/\w+/?", "", line)
    line = re.sub(r"^\d\d:\d\d:\d\d ", "", line).replace("|", " or ").replace("`", "'")
    line = re.sub(r"L{20,}", "L...", line)
    return line if len(line) < 110 else f"{line[:107]}..."


def main(config: Config) -> int:
    cases, start = choose_cases(config.match), time.perf_counter()
    # workers are forked: one thread, which a fork takes along
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="fault_drill_") as folder:
        outcomes = run_cases(cases, Path(folder))
        table = make_table(cases, outcomes, Path(folder))
    bad = sum(bool(outcome.problems) for outcome in outcomes)
    skipped = sum(outcome.skipped for outcome in outcomes)
    if config.table:
        write_text(config.table, table)
    print(
        f"{len(cases)} cases: {len(cases) - bad - skipped} as expected, {bad} not, {skipped} skipped; "
        f"{time.perf_counter() - start:.0f} s"
    )
    return int(bad > 0)


if __name__ == "__main__":
    launch(main, Config)
