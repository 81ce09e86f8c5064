"""A page on a benchmark that one can send around: report.html, whole in itself, and summary.json.

    python -m mil.report benchmark=runs/benchmark output=runs/report slides=cohort/slides
    stages=runs/stages.json

Shows the table with its intervals, the figures that the task names, stage times, and for some test
slides where the attention went.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mil.evaluation.benchmark_folder import (
    choose_feature_set,
    find_features,
    read_summary,
    read_task,
)
from mil.evaluation.runs import (
    COST_KEYS,
    FinishedRun,
    format_number,
    read_benchmark_runs,
    read_side,
)
from mil.evaluation.task_tables import per_label_rows
from mil.figures.by_task import FIGURES
from mil.figures.example_slides import (
    Choice,
    Example,
    ExampleSlide,
    Group,
    choose_slides,
    make_example,
    pick_slides,
)
from mil.figures.report import draw_intervals
from mil.tasks.base import Task
from mil.tasks.keys import SlideKeys
from mil.tasks.prediction_table import SLIDE_TABLE
from patch_encoder.bags.paths import list_bags
from patch_encoder.cohort.failures import Failures
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.figures import svg_uri
from wsi_common.files import read_json, write_json, write_text
from wsi_common.pages import fill_template

logger = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
HEATMAPS = "heatmaps/index.html"  # of mil.heatmap with output=<output>/heatmaps


@dataclass
class Config(SlideKeys):
    """Keys of the report."""

    benchmark: str = key(REQUIRED, "folder that mil.benchmark wrote", path=True)
    output: str = key(
        REQUIRED, "where the results are written; report.html and summary.json", runtime=True
    )
    stage_times: str = key("", "JSON with seconds and peak memory of each stage", path=True)
    title: str = key("Slide-level results", "title of the page")
    examples_of: str = key(
        "", "feature set whose example slides are shown; empty: the best by the headline metric"
    )
    features: str = key(
        "", "folder of feature bags; of examples_of; empty: those of the benchmark", path=True
    )
    example_slides: int = key(
        3,
        "example slides called right, and as many called wrong; for survival the highest and "
        "lowest risks, for regression the largest and smallest errors",
    )
    example_tiles: int = key(6, "tiles shown per example slide")


@dataclass(frozen=True)
class Picture:
    """A figure of the page: data URI, what it is, and its caption."""

    uri: str
    what: str
    caption: str


def read_runs(benchmark: Path, summary: dict[str, Any], task: Task) -> dict[str, list[FinishedRun]]:
    """Read the finished runs of the headline classifier, by feature set."""
    runs: dict[str, list[FinishedRun]] = {}
    for run in read_benchmark_runs(benchmark, summary, [summary["headline"]], task):
        runs.setdefault(run.feature_set, []).append(run)
    return runs


def read_stages(path: str) -> list[dict[str, Any]]:
    """`[{name, seconds, peak_mib}]` of the stages that ended, empty without a file."""
    if not path:
        return []
    content = read_json(path, "stage times")
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list):
        raise UserError(
            f"{path}: expected {{'stages': [{{name, seconds, peak_mib}}, ...]}}, found another "
            "shape"
        )
    return [stage for stage in content["stages"] if stage.get("seconds") is not None]


def make_examples(
    config: Config,
    summary: dict[str, Any],
    task: Task,
    runs: dict[str, list[FinishedRun]],
    failures: Failures,
) -> list[Group[Example]]:
    """Example slides of one feature set, from the first seed's runs; none without slides. Of cases
    one slide each is shown.
    """
    if not config.slides:
        return []
    unit = summary.get("unit", "slide")
    name = config.examples_of or choose_feature_set(summary, summary["headline"], task)
    if name not in runs:
        raise UserError(f"examples_of={name}: expected one of the feature sets {', '.join(runs)}")
    first = [run for run in runs[name] if run.seed == runs[name][0].seed]
    folder = find_features(Path(config.benchmark), summary, name, config.features)
    bags = list_bags(folder)
    slides, mpps = config.find_slides(bags)
    grid = Path(config.benchmark) / "runs" / name / summary["headline"]

    def list_slides(choice: Choice, run_folder: Path) -> tuple[list[str], int]:
        if unit == "slide":
            return [choice.slide_id], 0
        run = next(run for run in first if run.test.fold == choice.fold)
        by_slide = read_side(run_folder, name, task, "test", SLIDE_TABLE)
        assert by_slide is not None, run_folder
        return pick_slides(choice.slide_id, run, by_slide, unit, task)

    def make(choice: Choice) -> Example | None:
        try:
            run_folder = grid / f"seed{first[0].seed}_fold{choice.fold}"
            names, count = list_slides(choice, run_folder)
            for slide_id in names:
                if slide_id not in slides or slide_id not in bags:
                    raise UserError(
                        f"expected slide {slide_id} below {config.slides} and its bag in {folder}"
                    )
            files = [ExampleSlide(one, bags[one], slides[one], mpps.get(one)) for one in names]
            checkpoint = run_folder / "checkpoint_best.pt"
            found = make_example(choice, checkpoint, files, config.example_tiles, config.coords)
            return replace(found, slides=count)
        except UserError as error:
            failures.add(choice.slide_id, str(error))
            return None

    return [
        Group(group.title, group.none, [made for choice in group.slides if (made := make(choice))])
        for group in choose_slides(first, task, config.example_slides)
    ]


def differences(
    summary: dict[str, Any], metric: str
) -> list[tuple[str, float, list[float] | None]]:
    """(feature set, difference to the first one, its interval) for the headline classifier."""
    found = []
    for name, entry in summary["feature_sets"].items():
        values, key = entry.get(summary["headline"], {}), f"{metric}_difference"
        if values.get(key) is not None:
            found.append((name, values[key], values[f"{key}_ci"]))
    return found


def pictures(
    summary: dict[str, Any], task: Task, runs: dict[str, list[FinishedRun]]
) -> list[Picture]:
    """The figures of the task, then the intervals that every task has."""
    headline, metric, name = summary["headline"], task.headline, task.title(task.headline)
    protocol = summary["protocol"]
    drawn = []
    for spec in task.report_figures:
        figure = FIGURES[spec.drawing](runs, task, protocol["resamples"], protocol["split_seed"])
        assert figure is not None, spec
        caption = spec.caption.format(headline=headline)
        drawn.append(Picture(svg_uri(figure), spec.title, caption))
    sets, models = summary["feature_sets"], summary["models"]
    intervals = draw_intervals(sets, models, metric, name, task.chance)
    what = f"{name} with confidence intervals"
    caption = f"Mean test {name} with its 95 % confidence interval."
    return [*drawn, Picture(intervals, what, caption)]


def page(
    config: Config, summary: dict[str, Any], stages: list[dict[str, Any]], failures: Failures
) -> str:
    """The HTML."""
    task = read_task(summary)
    runs = read_runs(Path(config.benchmark), summary, task)
    if not runs:
        raise UserError(
            f"{config.benchmark}: expected finished runs of the classifier "
            f"'{summary['headline']}', found none"
        )
    examples = make_examples(config, summary, task, runs, failures)
    labels: list[dict[str, Any]] = []
    if task.several_labels:
        protocol = summary["protocol"]
        every = [run for found in runs.values() for run in found]
        labels = per_label_rows(every, task, protocol["resamples"], protocol["split_seed"])
    return fill_template(
        TEMPLATES,
        "report.html.j2",
        filters={"number": format_number, "known": known},
        title=config.title,
        summary=summary,
        task=task,
        metric=task.title(task.headline),
        columns=[(name, task.title(name)) for name in task.brief],
        score=task.title(task.score),
        labels=labels,
        stages=stages,
        total=sum(stage["seconds"] for stage in stages),
        pictures=pictures(summary, task, runs),
        differences=differences(summary, task.headline),
        examples=examples,
        examples_of=config.examples_of or choose_feature_set(summary, summary["headline"], task),
        heatmaps=(Path(config.output) / HEATMAPS).is_file(),
        date=time.strftime("%Y-%m-%d"),
    )


def known(value: float | None, form: str = "%.3f") -> str:
    """A number in a cell, `-` when there is none."""
    return "-" if value is None else form % value


def main(config: Config) -> int:
    output = Path(config.output)
    summary = read_summary(Path(config.benchmark))
    stages = read_stages(config.stage_times)
    failures = Failures("report")
    write_text(output / "report.html", page(config, summary, stages, failures))
    metric = summary.get("metric", "auc")
    kept = (f"{metric}_mean", f"{metric}_ci", *reversed(COST_KEYS))
    feature_sets = {
        name: {key: entry[key] for key in kept} for name, entry in summary["feature_sets"].items()
    }
    measured = ("seconds", "peak_mib")
    times = {stage["name"]: {key: stage.get(key) for key in measured} for stage in stages}
    wall = sum(stage["seconds"] for stage in stages) if stages else None
    content = {"feature_sets": feature_sets, "wall_seconds": wall, "stages": times}
    write_json(output / "summary.json", content)
    logger.info("report: %s", output / "report.html")
    return failures.write(output)


if __name__ == "__main__":
    launch(main, Config)
