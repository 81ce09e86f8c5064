"""Compare graders at several resolutions: how well they grade, what they cost, and what they look
at.

    python -m detection_kd.evaluate_resolution runs=runs/at_plus output=runs/at_plus/comparison

Reads every finished run of `train_resolution_kd` below `runs`; runs that differ in seed and fold
alone are one arm. Writes arms.csv (metrics with intervals by case, and costs; and what colour alone
reaches at the same ratios), differences.csv (each distillation minus the labels alone, run by run
with the same seed and fold, and the share of the gap to the teacher that it closes), two_speed.csv
(kappa against the share of patches that the teacher grades), resolution.png, attention.png and
resolution.html.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from detection_kd.evaluation.grading_metrics import (
    METRICS,
    GradedRun,
    compare_arms,
    grade_metrics,
    summarise_arm,
)
from detection_kd.graded_patches.patch_pixels import PatchPixels
from detection_kd.grading.arms import PLAIN, ArmName, GraderRun, group_arms, read_runs
from detection_kd.grading.colour_baseline import (
    grade_by_colour,
    name_colour,
    read_settings,
    read_split_of,
)
from detection_kd.grading.network_cost import NetworkCost, measure_costs
from detection_kd.grading.two_speed import mix_speeds
from detection_kd.models.low_resolution import load_grading_network
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.device import PRECISIONS, pick_device, pick_precision
from wsi_common.files import write_csv
from wsi_common.metrics.run_bootstrap import interval_columns

logger = logging.getLogger(__name__)
KAPPA = "kappa_quadratic"
MOST_SHOWN = 5  # networks whose attention is drawn
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
Arms = Mapping[ArmName, Sequence[GraderRun]]
Row = dict[str, Any]


@dataclass
class Config:
    """Keys of `evaluate_resolution`."""

    runs: str = key(REQUIRED, "folder of finished runs; at any depth below it", path=True)
    output: str = key(REQUIRED, "where the results are written; tables and pictures", runtime=True)
    resamples: int = key(2000, "bootstrap resamples of the confidence intervals", least=1)
    seed: int = key(0, "seed of everything that is drawn at random")
    batch_size: int = key(16, "items per step over all processes; patches, of the speed", least=1)
    rounds: int = key(
        5, "timed rounds, of which the median counts; networks take turns in them", least=1
    )
    attention: int = key(4, "test patches whose attention maps are drawn; 0: none", least=0)
    colour: bool = key(
        True,
        "also grade by 33 colour numbers per patch, at every ratio; false, with attention=0: no "
        "patch is read",
    )
    precision: str = key(
        "auto",
        "number format of the computation; auto: bf16 where the device has it in "
        "hardware, else fp32; losses are always fp32",
        choices=PRECISIONS,
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    title: str = key("Resolutions", "title of the page", runtime=True)


def tabulate_arms(arms: Arms, costs: Mapping[str, NetworkCost], config: Config) -> list[Row]:
    """One line per arm: what it is, its metrics with intervals by case, its costs, which are named
    by the arm without a teacher. Last comes what colour alone reaches at each ratio.
    """
    rows = []
    for arm, runs in arms.items():
        row = describe_arm(arm, [run.graded for run in runs], config)
        rows.append(row | asdict(costs[str(arm.plain)]))
    free: Row = dict.fromkeys(field.name for field in fields(NetworkCost))
    for ratio in sorted({arm.ratio for arm in arms}) if config.colour else ():
        graded = grade_by_colour((run for runs in arms.values() for run in runs), ratio)
        rows.append(describe_arm(name_colour(ratio), graded, config) | free)
    return rows


def describe_arm(arm: ArmName, graded: Sequence[GradedRun], config: Config) -> Row:
    """Name and metrics of an arm."""
    summary = summarise_arm(graded, config.resamples, config.seed)
    row: Row = {**arm._asdict(), "runs": len(graded)}
    for name in METRICS:
        row |= interval_columns(summary, name) | {f"{name}_std": summary[f"{name}_std"]}
    return row


def tabulate_differences(arms: Arms, config: Config) -> list[Row]:
    """One line per distillation and metric: its arm minus the labels alone, in the runs of seeds
    and folds that both have.
    """
    rows = []
    for arm, runs in arms.items():
        if arm.terms == PLAIN or arm.plain not in arms:
            continue
        pairs = pair_runs(runs, arms[arm.plain])
        if not pairs:
            continue
        ours, theirs = ([pair[side].graded for pair in pairs] for side in (0, 1))
        for metric in METRICS:
            found = compare_arms(ours, theirs, config.resamples, config.seed, metric)
            low, high = found.seeds or (None, None)
            row: Row = {**arm._asdict(), "metric": metric, "pairs": len(pairs)}
            row |= {"difference": found.value, "seeds_ci_low": low, "seeds_ci_high": high}
            low, high = found.cases.ci or (None, None)
            row |= {"cases_ci_low": low, "cases_ci_high": high, "cases_p": found.cases.p}
            rows.append(row | {"gap_closed": measure_gap(arms, pairs, metric)})
    return rows


def pair_runs(
    first: Sequence[GraderRun], second: Sequence[GraderRun]
) -> list[tuple[GraderRun, GraderRun]]:
    """Runs of the same seed and fold."""
    others = {(run.graded.seed, run.graded.fold): run for run in second}
    pairs = [(run, others.get((run.graded.seed, run.graded.fold))) for run in first]
    return [(run, other) for run, other in pairs if other is not None]


def find_teachers(arms: Arms, runs: Sequence[GraderRun]) -> list[GraderRun] | None:
    """The run that each of these learned from; None where one of them is not there."""
    plain = [run for own in arms.values() for run in own if run.arm.terms == PLAIN]
    found = [next((run for run in plain if run.digest == wanted.teacher), None) for wanted in runs]
    return None if None in found else found  # type: ignore[return-value]


def measure_gap(
    arms: Arms, pairs: Sequence[tuple[GraderRun, GraderRun]], metric: str
) -> float | None:
    """Share of the way from the labels alone to the teachers; None without these, or a way."""
    teachers = find_teachers(arms, [run for run, _ in pairs])
    if teachers is None:
        return None
    values = [
        np.mean([grade_metrics(run.graded)[metric][0] for run in runs])
        for runs in ([run for run, _ in pairs], [run for _, run in pairs], teachers)
    ]
    ours, labels, top = map(float, values)
    return (ours - labels) / (top - labels) if top > labels else None


def tabulate_two_speed(arms: Arms) -> list[Row]:
    """One line per distillation and share of the test patches that its teacher grades again, the
    least sure ones: mean kappa, and relative to the teacher's.
    """
    rows = []
    for arm, runs in arms.items():
        teachers = find_teachers(arms, runs) if arm.terms != PLAIN else None
        if teachers is None or any(
            run.patches != teacher.patches for run, teacher in zip(runs, teachers)
        ):
            continue
        top = float(np.mean([grade_metrics(teacher.graded)[KAPPA][0] for teacher in teachers]))
        for share in SHARES:
            kappas = []
            for run, teacher in zip(runs, teachers, strict=True):
                mixed = mix_speeds(run.probabilities, teacher.probabilities, share).argmax(1)
                kappas.append(grade_metrics(replace(run.graded, predicted=mixed))[KAPPA][0])
            kappa = float(np.mean(kappas))
            relative = kappa / top if top > 0 else None
            rows.append({**arm._asdict(), "share": share, KAPPA: kappa, "of_teacher": relative})
    return rows


def read_test_patches(run: GraderRun) -> PatchPixels:
    """The test patches of a run, from the data that its checkpoint names."""
    settings = read_settings(run)
    return PatchPixels(read_split_of(run, settings).test, settings["tile_size"])


def group_confusions(arms: Arms) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Grades, and share of each true grade's patches by called grade, of all runs of an arm."""
    found = {}
    for arm, runs in arms.items():
        counts = np.sum([run.graded.counts for run in runs], axis=0)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        found[str(arm)] = (runs[0].grades, shares)
    return found


def choose_shown(arms: Arms, count: int) -> tuple[list[str], PatchPixels | None]:
    """Arms whose attention is drawn, a teacher first and then what learned from it, and the test
    patches; none where there is no such pair.
    """
    students = [own[0] for arm, own in arms.items() if arm.terms != PLAIN]
    teachers = find_teachers(arms, students[:1]) if students and count else None
    if not teachers:
        return [], None
    own = [run for run in students if run.teacher == students[0].teacher]
    plain = [own[0].arm.plain] if own[0].arm.plain in arms else []
    names = [teachers[0].arm, *plain, *(run.arm for run in own)]
    return [str(name) for name in names[:MOST_SHOWN]], read_test_patches(teachers[0])


def main(config: Config) -> int:
    """Write the tables, the pictures and the page."""
    from detection_kd.figures.resolution import draw_attention, draw_pareto, write_page

    runs = read_runs(config.runs)
    arms = group_arms(runs)
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    networks = {str(arm): load_grading_network(own[0].checkpoint) for arm, own in arms.items()}
    # a network costs the same whatever it has learned from
    kinds = {str(arm.plain): networks[str(arm)] for arm in arms}
    costs = measure_costs(kinds, config.batch_size, config.rounds, device, precision)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    tables = {
        "arms": tabulate_arms(arms, costs, config),
        "differences": tabulate_differences(arms, config),
        "two_speed": tabulate_two_speed(arms),
    }
    for name, rows in tables.items():
        path = output / f"{name}.csv"
        path.unlink(missing_ok=True)  # that of an earlier comparison
        if rows:
            write_csv(path, list(rows[0]), rows)
    figures = {"resolution": draw_pareto(tables["arms"], output / "resolution.png")}
    shown, pixels = choose_shown(arms, config.attention)
    if pixels is not None:
        own = {name: networks[name] for name in shown}
        path = output / "attention.png"
        figures["attention"] = draw_attention(own, pixels, config.attention, device, path)
    page = write_page(output, config.title, tables, figures, group_confusions(arms))
    logger.info("%d runs in %d arms; %s", len(runs), len(arms), page)
    return 0


if __name__ == "__main__":
    launch(main, Config)
