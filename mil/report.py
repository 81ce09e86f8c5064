"""A page on a benchmark that one can send around: report.html, whole in itself, and summary.json.

    python -m mil.report benchmark=runs/benchmark output=runs/report slides=cohort/slides stages=runs/stages.json

Shows the table with its intervals, ROC curves, stage times, and for some test slides where the attention went.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common import __version__
from common.cli import launch
from common.config import REQUIRED, key
from common.errors import UserError
from common.files import read_json, write_json, write_text
from mil.ablation_figure import read_ablation
from mil.ablation_rows import signed
from mil.examples import Example, choose_slides, make_example
from mil.figures import interval_figure, roc_figure
from mil.results import Finished, number, read_finished
from patch_encoder.bags import bag_files
from patch_encoder.cohort import find_slides, read_labels
from patch_encoder.coordinates import tile_pattern_of
from patch_encoder.failures import Failures

logger = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
HEATMAPS = "heatmaps/index.html"  # of mil.heatmap with output=<output>/heatmaps
SUMMARY_KEYS = ("auc_mean", "auc_ci", "tiles_per_second", "gflops", "parameters", "dim")


@dataclass
class Config:
    """Keys of the report."""

    benchmark: str = key(REQUIRED, "folder that mil.benchmark wrote", path=True)
    output: str = key(REQUIRED, "folder that gets report.html and summary.json", runtime=True)
    slides: str = key("", "folder of slides, for the example slides; empty: none are shown", path=True)
    labels: str = key("", "labels.csv, for the mpp of slides that do not say", path=True)
    stages: str = key("", "JSON with seconds and peak memory of each stage", path=True)
    title: str = key("Slide-level results", "title of the page")
    examples_of: str = key("", "feature set whose example slides are shown; empty: the second one, or the only one")
    examples: int = key(3, "example slides called right, and as many called wrong")
    tiles: int = key(6, "tiles shown of each example slide")
    ablation: str = key("", "folder of an ablation (tools/ablation.sh), which becomes a section", path=True)


def read_runs(benchmark: Path, summary: dict[str, Any]) -> dict[str, list[Finished]]:
    """Finished runs of the headline classifier, by feature set, in order of seed and fold."""
    runs: dict[str, list[Finished]] = {}
    for name in summary["feature_sets"]:
        folders = sorted(path.parent for path in (benchmark / "runs" / name / summary["headline"]).glob("*/results.json"))
        runs[name] = [read_finished(folder, name, summary["classes"]) for folder in folders]
    return {name: sorted(found, key=lambda run: (run.seed, run.test.fold)) for name, found in runs.items() if found}


def read_stages(path: str) -> list[dict[str, Any]]:
    """`[{name, seconds, peak_mib}]` of the stages that ended, empty without a file."""
    if not path:
        return []
    content = read_json(path, "stage times")
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list):
        raise UserError(f"{path}: expected {{'stages': [{{name, seconds, peak_mib}}, ...]}}, found another shape")
    return [stage for stage in content["stages"] if stage.get("seconds") is not None]


def make_examples(
    config: Config, summary: dict[str, Any], runs: dict[str, list[Finished]], failures: Failures
) -> list[Example]:
    """Example slides of one feature set, from the first seed's runs."""
    names = list(runs)
    name = config.examples_of or names[min(1, len(names) - 1)]
    if name not in runs:
        raise UserError(f"examples_of={name}: expected one of the feature sets {', '.join(runs)}")
    first = [run for run in runs[name] if run.seed == runs[name][0].seed]
    bags = bag_files(summary["features"][name])
    slides = find_slides(config.slides, tile_pattern_of(bags.values()))
    mpps = {record.slide_id: record.mpp for record in read_labels(config.labels)} if config.labels else {}
    examples = []
    for choice in choose_slides(first, summary["classes"], config.examples):
        slide_id = choice.slide_id
        folder = Path(config.benchmark) / "runs" / name / summary["headline"] / f"seed{first[0].seed}_fold{choice.fold}"
        try:
            if slide_id not in slides or slide_id not in bags:
                raise UserError(f"expected the slide below {config.slides} and its bag in {summary['features'][name]}")
            checkpoint = folder / "checkpoint_best.pt"
            examples.append(
                make_example(choice, checkpoint, bags[slide_id], slides[slide_id], mpps.get(slide_id), config.tiles)
            )
        except UserError as error:
            failures.add(slide_id, str(error))
    return examples


def differences(summary: dict[str, Any]) -> list[tuple[str, float, list[float] | None]]:
    """(feature set, AUC difference to the first one, its interval) for the headline classifier."""
    found = {name: entry.get(summary["headline"], {}) for name, entry in summary["feature_sets"].items()}
    return [(name, e["auc_difference"], e["auc_difference_ci"]) for name, e in found.items() if "auc_difference" in e]


def page(config: Config, summary: dict[str, Any], stages: list[dict[str, Any]], failures: Failures) -> str:
    """The HTML."""
    runs = read_runs(Path(config.benchmark), summary)
    if not runs:
        raise UserError(f"{config.benchmark}: expected finished runs of the classifier '{summary['headline']}', found none")
    examples = make_examples(config, summary, runs, failures) if config.slides else []
    aucs = {name: summary["feature_sets"][name][summary["headline"]]["auc_mean"] for name in runs}
    binary = len(summary["classes"]) == 2
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": number}
    environment.globals |= {"signed": signed}
    return environment.get_template("report.html.j2").render(
        title=config.title,
        summary=summary,
        stages=stages,
        total=sum(stage["seconds"] for stage in stages),
        roc=roc_figure({name: [run.test for run in found] for name, found in runs.items()}, aucs) if binary else None,
        intervals=interval_figure(summary["feature_sets"], summary["models"]),
        differences=differences(summary),
        examples=[example for example in examples if example.choice.right],
        errors=[example for example in examples if not example.choice.right],
        examples_of=config.examples_of or list(runs)[min(1, len(runs) - 1)],
        slides_given=bool(config.slides),
        ablation=read_ablation(Path(config.ablation)) if config.ablation else None,
        heatmaps=(Path(config.output) / HEATMAPS).is_file(),
        version=__version__,
        date=time.strftime("%Y-%m-%d"),
    )


def main(config: Config) -> int:
    output = Path(config.output)
    summary = read_json(Path(config.benchmark) / "summary.json", "a benchmark's summary")
    stages = read_stages(config.stages)
    failures = Failures("report")
    write_text(output / "report.html", page(config, summary, stages, failures))
    feature_sets = {name: {key: entry[key] for key in SUMMARY_KEYS} for name, entry in summary["feature_sets"].items()}
    times = {stage["name"]: {"seconds": stage["seconds"], "peak_mib": stage.get("peak_mib")} for stage in stages}
    wall = sum(stage["seconds"] for stage in stages) if stages else None
    write_json(output / "summary.json", {"feature_sets": feature_sets, "wall_seconds": wall, "stages": times})
    logger.info("report: %s", output / "report.html")
    return failures.write(output)


if __name__ == "__main__":
    launch(main, Config)
