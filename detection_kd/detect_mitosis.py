"""Find mitoses on whole slides and fields, count them, and say where they are densest.

    python -m detection_kd.detect_mitosis slides=fields localiser=student/checkpoint_best.pt
    output=mitoses

Reads: slides or pictures, a checkpoint of `train_mitosis`, and coordinates of `tile_slides` where
`coords` names them; without, tiles cover every pixel. Writes below `<output>`, per slide:
`geojson/` (for QuPath: candidates with scores, hot spots), `midog/` (JSON of the MIDOG challenge),
`points/` (a table), `coco/`; and of all slides `counts.csv`, `mitoses.html` and `failures.csv`. A
slide is the unit of resuming.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detection_kd.datasets.training_field import choose_scale
from detection_kd.evaluation.hot_spot import SHAPES
from detection_kd.evaluation.operating_point import resolve_min_score
from detection_kd.evaluation.point_matching import RADIUS_UM
from detection_kd.fields.stain import restore_field_stain
from detection_kd.mitosis_sets.case_table import CaseRow, read_case_table
from detection_kd.models.atypical import load_atypical
from detection_kd.models.cam import load_localiser
from detection_kd.whole_slides.atypical_figures import judge_figures
from detection_kd.whole_slides.field_sequence import FieldSequence
from detection_kd.whole_slides.mitosis_candidates import (
    CandidateCollector,
    detect_candidates,
    find_mpp,
)
from detection_kd.whole_slides.mitosis_count import count_mitoses
from detection_kd.whole_slides.mitosis_files import document_path, read_count, write_slide_files
from detection_kd.whole_slides.tile_pass import find_in_slides, find_unfinished
from detection_kd.whole_slides.whole_fields import UNKNOWN_MPP, FieldKeys, FieldTiling
from patch_encoder.cohort.failures import Failures
from patch_encoder.extraction.loop import ExtractSettings
from patch_encoder.tiles.coordinates import SlideJob
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import write_csv
from wsi_common.shared_weights import digest_weights_file

logger = logging.getLogger(__name__)
STAGE = "detect_mitosis"


@dataclass
class Config(FieldKeys):
    """Keys of the detection of mitoses (`dtype` and `pt` do not matter here)."""

    localiser: str = key(REQUIRED, "checkpoint of train_mitosis", path=True)
    cases: str = key(
        "",
        "table with file and, where the set does not say so, case, scanner, mpp, split, annotated",
        path=True,
    )
    tile_size: int = key(
        1024, "side of a tile, px; at the resolution of the localiser, without coords", least=32
    )
    overlap: float = key(
        0.125, "share of its side that a tile has in common with its neighbour; without coords"
    )
    batch_size: int = key(4, "items per step over all processes; tiles", runtime=True)
    min_score: str = key(
        "auto",
        "detections below this score are dropped; from the counts, they stay in the files as "
        "non-mitotic figures; auto: the checkpoint's, which its validation chose",
    )
    hot_spot_mm2: list[float] = key(
        [2.0, 2.37], "areas of the hot spots that are sought, mm2; 2.37: ten high power fields"
    )
    hot_spot_shape: str = key(
        "circle", "shape of a hot spot; rectangle: 4:3, upright", choices=SHAPES
    )
    atypical: str = key(
        "",
        "checkpoint of train_atypical; says of each mitosis whether it is atypical; empty: not "
        "asked",
        path=True,
    )
    gallery: int = key(48, "number of candidates on the page, the most doubtful ones", least=0)
    title: str = key("Mitoses", "title of the page", runtime=True)


class MitosisLimits(NamedTuple):
    """What decides what is found, with `auto` resolved."""

    scale: float
    min_score: float
    hot_spot_mm2: list[float]
    hot_spot_shape: str


def resolve(config: Config, description: dict[str, Any], jobs: Sequence[SlideJob]) -> MitosisLimits:
    """The keys' values for these slides, from the checkpoint where they are `auto`."""
    areas = list(config.hot_spot_mm2)
    if not areas or min(areas) <= 0:
        raise UserError(f"hot_spot_mm2={areas}: expected areas above 0 mm2, as [2.0,2.37]")
    if not 0 <= config.overlap < 1:
        raise UserError(f"overlap={config.overlap}: expected a share of the side below 1")
    field = {"mpp": description["mpp"], "side": description["side"], "resize": 1.0}
    scale = choose_scale("auto", field, [job.coordinates.geometry for job in jobs])
    point = {"operating_point": {"min_score": description["threshold"]}}
    return MitosisLimits(
        scale, resolve_min_score(config.min_score, point), areas, config.hot_spot_shape
    )


def find_jobs(
    config: Config,
    description: dict[str, Any],
    table: dict[str, CaseRow],
    settings: ExtractSettings,
    failures: Failures,
) -> list[SlideJob]:
    """The slides, those without a known resolution entered in `failures`."""
    mpps = {name: row.mpp for name, row in table.items()}
    tiling = FieldTiling(config.tile_size, description["mpp"], config.overlap, config.mpp, mpps)
    jobs = config.find_jobs(tiling, settings, failures)
    known = []
    for job in jobs:
        if job.mpp or job.coordinates.geometry.mpp:
            known.append(job)
        else:
            failures.add(job.slide_id, f"{UNKNOWN_MPP} or cases")
    return known


def write_summary(config: Config, jobs: Sequence[SlideJob]) -> None:
    """The table of counts and the page, of all slides that are done."""
    from detection_kd.figures.mitosis_page import write_page  # a while to load

    output = Path(config.output)
    done = [job for job in jobs if document_path(output, job.slide_id).exists()]
    counts = [read_count(output, job.slide_id) for job in done]
    if not counts:
        return
    rows = [count.row() for count in counts]
    write_csv(output / "counts.csv", list(rows[0]), rows)
    page = write_page(output, done, counts, config.gallery, config.title)
    mitoses, area = sum(c.mitoses for c in counts), sum(c.area_mm2 for c in counts)
    logger.info(
        "%s: %d mitoses in %.2f mm2 of %d slides; %s", STAGE, mitoses, area, len(counts), page
    )


def main(config: Config) -> int:
    """Detect on every slide that has no document yet; 1 when slides failed."""
    settings = config.settings()
    model, description = load_localiser(config.localiser)
    model = model.to(settings.device, memory_format=torch.channels_last).eval()
    output, failures = Path(config.output), Failures(STAGE, settings.shard.name)
    table = read_case_table(Path(config.cases)) if config.cases else {}
    jobs = find_jobs(config, description, table, settings, failures)
    limits = resolve(config, description, jobs)
    weights = {"localiser_sha256": digest_weights_file(config.localiser)}
    head = None
    if config.atypical:
        head = load_atypical(config.atypical).to(settings.device)
        weights["atypical_sha256"] = digest_weights_file(config.atypical)
    document = partial(document_path, output)
    wanted = find_unfinished(jobs, limits._asdict(), weights, settings, document)
    todo = [job for job in jobs if job.slide_id in wanted]
    logger.info("%s: %d slides, %d already done", STAGE, len(jobs), len(jobs) - len(todo))
    stain = restore_field_stain(description["stain"])
    sequence = FieldSequence(todo, stain, description["side"], description["mpp"])
    detect = partial(detect_candidates, model, limits.scale, settings)

    def collect(job: SlideJob) -> CandidateCollector:
        return CandidateCollector(job.coordinates, RADIUS_UM / find_mpp(job))

    for job, found in find_in_slides(sequence, detect, collect, settings, failures):
        if head is not None:
            try:
                judged = judge_figures(head, job, found, limits.min_score)
            except UserError as error:
                failures.add(job.slide_id, str(error))
                continue
            found = found._replace(atypical=judged)
        row = table.get(job.slide_id)
        about = {"case": row.case, "scanner": row.scanner} if row else {}
        spots = (limits.hot_spot_mm2, limits.hot_spot_shape)
        count = count_mitoses(job, found, limits.min_score, *spots, **about)
        write_slide_files(output, job, found, count, wanted[job.slide_id])
        logger.info("%s: %d mitoses, %.2f per mm2", job.slide_id, count.mitoses, count.per_mm2)
    if settings.shard.count == 1:
        # what overwrite=true did not get to replace is of other settings
        write_summary(config, [job for job in jobs if job.slide_id not in failures.slides])
    return failures.write(output)


if __name__ == "__main__":
    launch(main, Config)
