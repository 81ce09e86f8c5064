"""Compare detected mitoses with annotated ones: per field, case and scanner, with intervals.

    python -m detection_kd.evaluate_mitosis detections=runs/mitoses data.annotations=MIDOG.json
    data.images=images data.cases=cases.csv split_side=test output=evaluation

Reads: the output of `detect_mitosis`, or detections of another algorithm (JSON of the MIDOG
challenge, or a table). Writes a run directory with `results.json`, `fields.csv`, `cases.csv`,
`scanners.csv`, `transfer.csv` (the threshold of each scanner on the others), `curves.png` and
`overlays/`. A detection within 7.5 um of a mitosis finds it, one to one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection_kd.evaluation.operating_point import resolve_min_score
from detection_kd.evaluation.point_matching import (
    RADIUS_UM,
    Counts,
    compute_published_rates,
    count_many_to_many,
)
from detection_kd.evaluation.point_metrics import (
    ScoredField,
    choose_threshold,
    count_fields,
    measure_fields,
    measure_groups,
    transfer_thresholds,
)
from detection_kd.mitosis_sets.keys import MitosisSetKeys, read_point_set
from detection_kd.mitosis_sets.point_set import PointSet
from detection_kd.mitosis_sets.splits import SPLITS, read_sides
from detection_kd.whole_slides.detected_points import (
    DetectedPoints,
    find_threshold,
    list_detection_files,
    read_detections,
    score_fields,
)
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, group, identity, key
from wsi_common.distributed import init_distributed, require_one_process
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes, sha256_file, write_csv
from wsi_common.run import open_run

logger = logging.getLogger(__name__)
ALL = "all"
COUNTS = ("fields", "cases", "mitoses", "hits", "false_positives", "misses")
MEASURES = ("f1", "precision", "recall", "false_positives_per_mm2", "average_precision", "froc")


@dataclass
class Config:
    """Keys of `evaluate_mitosis`."""

    detections: str = key(
        REQUIRED,
        "what was found; output of detect_mitosis, a folder of <field>.json (points of "
        "grand-challenge, mm), or a table file,x,y,score (px)",
        path=True,
    )
    output: str = key(REQUIRED, "where the results are written; a run directory", runtime=True)
    data: MitosisSetKeys = group(MitosisSetKeys, "the annotated data; fields")
    split_side: str = key("test", "side of the split that is looked at", choices=(*SPLITS, ALL))
    split_seed: int = key(0, "seed of the folds; of the split by case where the data has none")
    min_score: str = key(
        "auto",
        "detections below this score are dropped; in counts and rates; auto: those that the "
        "detections do not call mitotic figures",
    )
    radius_um: float = key(RADIUS_UM, "um within which a detection finds a mitosis")
    resamples: int = key(2000, "bootstrap resamples of the confidence intervals")
    seed: int = key(0, "seed of everything that is drawn at random")
    overlays: int = key(
        12, "number of images to draw with their boxes; fields, those with most errors", least=0
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def read_fields(config: Config) -> PointSet:
    """The annotated fields of the split."""
    if config.split_side == ALL:
        return read_point_set(config.data).select(lambda field: field.annotated)
    return read_sides(config.data, config.split_seed, (config.split_side,))[0]


def resolve_threshold(asked: str, detected: Sequence[DetectedPoints]) -> float:
    """The score that is asked for, or where the detections' own names divide them."""
    return find_threshold(detected) if asked == "auto" else resolve_min_score(asked, {})


def summarise(fields: list[ScoredField], threshold: float, config: Config) -> dict[str, Any]:
    """Content of results.json but for the digests."""
    options = {
        "radius": config.radius_um,
        "resamples": config.resamples,
        "seed": config.seed,
    }
    groups = {
        "by_scanner": measure_groups(fields, lambda field: field.scanner, threshold, **options),
        # a case alone has no interval
        "by_case": measure_groups(
            fields, lambda field: field.case, threshold, **options | {"resamples": 0}
        ),
    }
    published = count_fields(fields, threshold, count_many_to_many, config.radius_um).sum(0)
    counts = Counts(*published.tolist())
    best = choose_threshold(fields, config.radius_um)
    return {
        "min_score": threshold,
        **measure_fields(fields, threshold, **options),
        **groups,
        "published": counts._asdict() | compute_published_rates(counts),
        "best_min_score_here": best.threshold,
        "best_f1_here": best.f1,
        "transfer": transfer_thresholds(fields, config.radius_um),
        "settings": identity(config),
    }


def write_tables(folder: Path, fields: list[ScoredField], results: dict[str, Any]) -> None:
    """Write the tables by field, case and scanner, and of thresholds on other scanners."""
    counts = count_fields(fields, results["min_score"], radius=results["settings"]["radius_um"])
    about = ("field", "case", "scanner")
    rows = [
        dict(zip(about, (field.field_id, field.case, field.scanner), strict=True))
        | dict(zip(("hits", "false_positives", "misses"), row.tolist(), strict=True))
        | {"mitoses": len(field.truth), "area_mm2": field.area_mm2}
        for field, row in zip(fields, counts, strict=True)
    ]
    write_csv(folder / "fields.csv", list(rows[0]), rows)
    for first in ("case", "scanner"):
        rows = [{first: name} | flatten(values) for name, values in results[f"by_{first}"].items()]
        write_csv(folder / f"{first}s.csv", list(rows[0]), rows)
    rows = [
        {"chosen_on": scanner, "min_score": values["threshold"]}
        | {f"f1_on_{other}": f1 for other, f1 in values["f1"].items()}
        for scanner, values in results["transfer"].items()
    ]
    write_csv(folder / "transfer.csv", list(rows[0]), rows)


def flatten(measures: dict[str, Any]) -> dict[str, Any]:
    """Counts, and every measure with the ends of its interval, as cells of a row."""
    row = {name: measures[name] for name in COUNTS}
    for name in MEASURES:
        low, high = measures[f"{name}_ci"] or ("", "")
        row |= {name: measures[name], f"{name}_ci_low": low, f"{name}_ci_high": high}
    return row


def describe(name: str, measures: dict[str, Any]) -> str:
    """One line: F1 with its interval, precision and recall."""
    low, high = measures["f1_ci"] or (float("nan"), float("nan"))
    interval = f" [{low:.3f}, {high:.3f}]" if measures["f1_ci"] else ""
    return (
        f"{name}: F1 {measures['f1']:.3f}{interval}, precision {measures['precision']:.3f}, recall "
        f"{measures['recall']:.3f}, AP {measures['average_precision']:.3f}; {measures['mitoses']} "
        f"mitoses in {measures['fields']} fields of {measures['cases']} cases"
    )


def main(config: Config) -> int:
    """Measure, and write tables and figures; finished work is left alone."""
    from detection_kd.figures.mitosis_evaluation import write_mitosis_figures  # a while to load

    require_one_process("evaluate_mitosis", "start it without torchrun")
    if config.radius_um <= 0:
        raise UserError(f"radius_um={config.radius_um}: expected a distance above 0 um")
    world, source = init_distributed("cpu"), Path(config.detections)
    digests = [sha256_file(path) for path in list_detection_files(source)]
    inputs = {
        "detections": sha256_bytes("".join(digests).encode()),
        "annotations": sha256_annotations(Path(config.data.annotations)),
    }
    run = open_run(config.output, config, world, inputs=inputs, overwrite=config.overwrite)
    if run.results is not None:
        logger.info("%s: finished evaluation, F1 %.3f; nothing to do", run.path, run.results["f1"])
        return 0
    annotated = read_fields(config)
    detected = read_detections(source, annotated)
    threshold = resolve_threshold(config.min_score, list(detected.values()))
    fields = score_fields(annotated, detected)
    results = summarise(fields, threshold, config)
    write_tables(run.path, fields, results)
    images = {f.field_id: f.path for f in annotated.fields if f.path.exists()}
    options = (threshold, config.radius_um, config.overlays)
    write_mitosis_figures(run.path, fields, images, *options)
    run.finish(results | {f"{name}_sha256": digest for name, digest in inputs.items()})
    for name, measures in {config.split_side: results, **results["by_scanner"]}.items():
        logger.info("%s", describe(name or "unknown scanner", measures))
    return 0


def sha256_annotations(path: Path) -> str:
    """Digest of a file of annotations, or of all files of a folder of them."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return sha256_bytes("".join(sha256_file(file) for file in files).encode())


if __name__ == "__main__":
    launch(main, Config)
