"""Let a teacher find the training tiles that are hard: the step of UTS between teacher and student.

    python -m detection_kd.filter_samples data.annotations=... output=... \
        teachers=runs/uts/teacher/checkpoint_best.pt

Writes `kept.csv` with score, decision and reason of every training tile; `train_mitosis kept=`
trains a student on it. Source: UTS (cvblab/Mitosis-UTS), which drops every tile whose annotation
the teacher contradicts. Differences: the threshold is that of clean validation tiles unless
`teacher_threshold=own` asks for the published one; validation tiles are not filtered; tiles may be
scored by teachers that were not trained on them; hard tiles may also be relabelled, or all tiles
weighted; and `mode=random` drops as many at random, which a filter has to beat.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from detection_kd.engine import SMALL_BLOCK
from detection_kd.evaluation.hard_samples import (
    CRITERIA,
    MODES,
    Filtering,
    audit_filter,
    check_threshold,
    filter_tiles,
    find_hard_tiles,
)
from detection_kd.evaluation.kept_tiles import describe_tiles, digest_teachers, write_kept
from detection_kd.evaluation.tile_predictions import (
    LocaliserPredictions,
    count_hits,
    measure_bags,
    predict_tiles,
)
from detection_kd.fields.field_tiles import FieldTiles
from detection_kd.fields.stain import normalise_tiles, restore_field_stain
from detection_kd.mitosis_sets.keys import MitosisSetKeys, read_point_set
from detection_kd.mitosis_sets.splits import read_sides
from detection_kd.models.cam import WeakLocaliser, load_localiser
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, group, key
from wsi_common.device import PRECISIONS, pick_precision
from wsi_common.distributed import World, init_distributed, require_one_process
from wsi_common.errors import UserError
from wsi_common.files import read_json, sha256_file, write_json
from wsi_common.memory import reuse_large_blocks
from wsi_common.processes.pool import pick_workers
from wsi_common.provenance import can_reuse, differences

logger = logging.getLogger(__name__)
GEOMETRY = ("side", "target_mpp", "overlap")  # of the tiles of all teachers
SETTINGS = ("criterion", "teacher_threshold", "mode", "positives_only", "seed", "split_seed")


@dataclass
class Config:
    """Keys of `filter_samples`."""

    output: str = key(REQUIRED, "where the results are written; kept.csv", runtime=True)
    data: MitosisSetKeys = group(MitosisSetKeys, "the annotated data; those of the teacher")
    split_seed: int = key(0, "seed of the folds; of the split by case, that of the teacher")
    teachers: list[str] = key(
        REQUIRED,
        "checkpoints of the teacher; several with leave_out=1/n, 2/n, ...: each scores the cases "
        "that it was not trained on",
        path=True,
    )
    criterion: str = key(
        "bag",
        "which positives are hard; bag: the teacher calls the tile negative; TP: or finds none of "
        "its mitoses; FP: or finds something else; FP_TP: or either",
        choices=CRITERIA,
    )
    teacher_threshold: str = key(
        "validation",
        "threshold of the teacher; validation: best F1 on its validation tiles; own: best F1 on "
        "the labels that are filtered, as published",
        choices=("validation", "own"),
    )
    mode: str = key(
        "drop",
        "what is done; drop hard tiles, relabel those that the teacher contradicts, soft: weigh "
        "all tiles by its probability of their label, or drop as many at random (the control)",
        choices=MODES,
    )
    positives_only: bool = key(False, "leave negative tiles as they are")
    truth: str = key(
        "",
        "annotations without the errors of data.annotations; where errors were put in: audit.json "
        "then says what the filter did to them",
        path=True,
    )
    seed: int = key(42, "seed of everything that is drawn at random")
    batch_size: int = key(64, "items per step over all processes; tiles", least=1, runtime=True)
    precision: str = key(
        "auto",
        "number format of the computation; auto: bf16 where the device has it in "
        "hardware, else fp32",
        choices=PRECISIONS,
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    workers: int | None = key(
        None, "worker processes; they read tiles; null: one per core, at most 8", runtime=True
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


@dataclass(frozen=True)
class Teacher:
    """A trained localiser, and the cases that it was not trained on."""

    path: str
    model: WeakLocaliser
    described: dict[str, Any]

    def left_out(self) -> set[str]:
        """Cases of `leave_out`."""
        return set(self.described["left_out"])


def load_teachers(paths: Sequence[str]) -> list[Teacher]:
    """The teachers, which have to see tiles of the same size, resolution and stain.

    Raises:
        UserError: a missing file, another network, or teachers that do not fit together.
    """
    teachers = [Teacher(path, *load_localiser(path)) for path in paths]
    if not teachers:
        raise UserError("teachers: expected a checkpoint at least, found none")
    first = teachers[0]
    for other in teachers[1:]:
        kinds = [{name: t.described[name] for name in (*GEOMETRY, "stain")} for t in (first, other)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"teachers: expected the same tiles for all, found {first.path} and {other.path} "
                f"with {differences(*kinds)}; train them with the same settings"
            )
    return teachers


def choose_scorers(teachers: Sequence[Teacher], tiles: FieldTiles) -> Int[np.ndarray, " n"]:
    """Number of the teacher that scores each tile: the only one, or the one that was not trained
    on its case.

    Raises:
        UserError: a case that every teacher, or no single one, has left out.
    """
    if len(teachers) == 1:
        return np.zeros(len(tiles), np.int64)
    scorers = {}
    for case in sorted({field.case for field in tiles.fields}):
        own = [number for number, teacher in enumerate(teachers) if case in teacher.left_out()]
        if len(own) != 1:
            raise UserError(
                f"teachers: expected one that was not trained on case {case}, found {len(own)}; "
                f"train them with leave_out=1/{len(teachers)}, 2/{len(teachers)}, ..."
            )
        scorers[case] = own[0]
    cases = [tiles.fields[number].case for number in tiles.field.tolist()]
    return np.array([scorers[case] for case in cases], np.int64)


def score_tiles(
    teachers: Sequence[Teacher],
    tiles: FieldTiles,
    scorers: Int[np.ndarray, " n"],
    world: World,
    options: dict[str, Any],
) -> LocaliserPredictions:
    """Predictions of every tile by the teacher that scores it; `options` of `predict_tiles`."""
    places, parts = [], []
    for number, teacher in enumerate(teachers):
        own = np.flatnonzero(scorers == number)
        if len(own):
            model, label = teacher.model.to(world.device), f"teacher {number + 1}"
            places.append(own)
            parts.append(predict_tiles(model, tiles.select(own), world, label=label, **options))
    back = np.argsort(np.concatenate(places))
    scores = np.concatenate([part.scores for part in parts])[back]
    maps = np.concatenate([part.maps for part in parts])[back]
    return LocaliserPredictions(scores, maps, parts[0].cells)


def find_thresholds(
    rule: str,
    teachers: Sequence[Teacher],
    scorers: Int[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """From which score on each tile is positive.

    Args:
        rule: `teacher_threshold` of the configuration.
        teachers, scorers: who scored each tile.
        scores, labels: of the tiles.
    """
    if rule == "own":
        return np.full(len(scores), measure_bags(scores, labels)["bag_threshold"])
    return np.array([teacher.described["bag_threshold"] for teacher in teachers])[scorers]


def read_truth(config: Config, tiles: FieldTiles, overlap: float) -> Int[np.ndarray, " n"]:
    """Whether each tile holds a mitosis by the annotations without errors.

    Raises:
        UserError: they are of other fields.
    """
    ids = {field.field_id for field in tiles.fields}
    fields = read_point_set(replace(config.data, annotations=config.truth), ids)
    true = FieldTiles(fields, tiles.side, tiles.mpp, overlap)
    if true.sample_ids != tiles.sample_ids:
        raise UserError(
            f"truth={config.truth}: expected the fields of data.annotations, found "
            f"{len(fields.fields)} of {len(ids)}"
        )
    return true.labels


def summarise(
    filtering: Filtering, labels: Int[np.ndarray, " n"], thresholds: Float[np.ndarray, " n"]
) -> dict[str, Any]:
    """Counts of what becomes of both classes, for the log and for `kept.json`."""
    counts: dict[str, Any] = {"thresholds": sorted(set(thresholds.tolist()))}
    for label, name in ((1, "positives"), (0, "negatives")):
        own = labels == label
        counts[name] = int(own.sum())
        counts[f"{name}_dropped"] = int((own & ~filtering.keep).sum())
        counts[f"{name}_relabelled"] = int((own & (filtering.labels != labels)).sum())
    return counts


def main(config: Config) -> int:
    """Score the training tiles, filter them, and write the table."""
    require_one_process("filter_samples", "since scoring takes minutes")
    world, teachers = init_distributed(config.device), load_teachers(config.teachers)
    (fields,) = read_sides(config.data, config.split_seed, ("train",))
    described = teachers[0].described
    tiles = FieldTiles(fields, *(described[name] for name in GEOMETRY))
    precision = pick_precision(config.precision, world.device)
    settings = {name: getattr(config, name) for name in SETTINGS} | {"precision": precision}
    wanted = {"data": describe_tiles(tiles), "teachers": digest_teachers(config.teachers)}
    wanted |= {"settings": settings, "truth": sha256_file(config.truth) if config.truth else None}
    output = Path(config.output)
    record = output / "kept.json"

    def read() -> dict[str, Any]:
        found = read_json(record, "the record of a filter")
        return {name: found.get(name) for name in wanted}

    if can_reuse(record, read, wanted, "another filter", overwrite=config.overwrite):
        logger.info("%s: finished; nothing to do", record)
        return 0
    scorers = choose_scorers(teachers, tiles)
    if world.device.type == "cpu":
        reuse_large_blocks(SMALL_BLOCK)  # activations; the kernel would clear them in every batch
    coloured = normalise_tiles(tiles, restore_field_stain(described["stain"]))
    options = {"batch_size": config.batch_size, "workers": pick_workers(config.workers)}
    options |= {"precision": precision}
    predictions = score_tiles(teachers, coloured, scorers, world, options)
    scores, labels = predictions.scores, tiles.labels
    thresholds = find_thresholds(config.teacher_threshold, teachers, scorers, scores, labels)
    check_threshold(scores, labels, thresholds)
    hits, strays = count_hits(tiles, predictions, thresholds)
    reasons = find_hard_tiles(scores, labels, thresholds, config.criterion, hits, strays)
    chosen = {"positives_only": config.positives_only, "seed": config.seed}
    filtering = filter_tiles(scores, labels, reasons, config.mode, **chosen)
    summary = summarise(filtering, labels, thresholds)
    if config.truth:
        true = read_truth(config, tiles, described["overlap"])
        audit = audit_filter(filtering, labels, true)
        write_json(output / "audit.json", audit)
        logger.info("audit: %s", json.dumps(audit))
    write_kept(output, tiles, scores, filtering, wanted | {"summary": summary})
    logger.info("%s: %s", output / "kept.csv", json.dumps(summary))
    return 0


if __name__ == "__main__":
    launch(main, Config)
