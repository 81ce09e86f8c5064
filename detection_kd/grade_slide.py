"""Grade whole biopsies at low resolution: a map of grades, the share of each, and where the grades
are Gleason patterns the Gleason score and ISUP group.

    python -m detection_kd.grade_slide slides=biopsies grader=student/checkpoint_best.pt
    teacher_checkpoint=teacher/checkpoint_best.pt teacher_share=0.2 output=graded

Reads: slides, a checkpoint of `train_resolution_kd`, and coordinates of `tile_slides` where
`coords` names them; without, tiles cover every pixel. With a teacher there are two speeds: the
tiles of which the student is least sure are graded once more at full resolution. Writes below
`<output>`, per slide: `maps/` (the slide in the grades' colours, a pyramid), `geojson/` (regions
for QuPath), `tiles/` (a table) and `grades/` (what they were made with); and of all slides
`grades.csv`, `grades.html` and `failures.csv`. A slide is the unit of resuming. A summary of a map
is no diagnosis.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from detection_kd.models.low_resolution import GradingNetwork, load_grading_network
from detection_kd.whole_slides.grade_files import (
    SlideGrade,
    document_path,
    read_slide_grade,
    summarise_slide,
    write_slide_files,
)
from detection_kd.whole_slides.grade_map import make_grade_map
from detection_kd.whole_slides.tile_grades import (
    GradeCollector,
    TileGrades,
    ask_teacher,
    average_tile,
    grade_tiles,
    read_at,
)
from detection_kd.whole_slides.tile_pass import (
    find_in_slides,
    find_unfinished,
)
from detection_kd.whole_slides.whole_fields import FieldKeys, FieldTiling
from patch_encoder.cohort.failures import Failures
from patch_encoder.extraction.loop import ExtractSettings
from patch_encoder.extraction.tile_batches import TileSequence
from patch_encoder.slides import open_slide
from patch_encoder.tiles.coordinates import SlideJob
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import write_csv
from wsi_common.shared_weights import digest_weights_file

logger = logging.getLogger(__name__)
STAGE = "grade_slide"


@dataclass
class Config(FieldKeys):
    """Keys of the grading of slides (`dtype` and `pt` do not matter here)."""

    grader: str = key(REQUIRED, "checkpoint of a grading network", path=True)
    teacher_checkpoint: str = key(
        "", "checkpoint of the teacher; for the tiles that the grader is least sure of", path=True
    )
    teacher_share: float = key(0.2, "share of a slide's tiles that the teacher grades again")
    overlap: float = key(
        0.5, "share of its side that a tile has in common with its neighbour; without coords"
    )
    min_tissue: float = key(0.3, "smallest share of a tile that has to be tissue; to be graded")
    least_share: float = key(
        0.02,
        "share of the tumour below which a Gleason pattern is taken for an error of the map; 0: "
        "none, as a pathologist's",
    )
    title: str = key("Grades", "title of the page", runtime=True)


def load_networks(config: Config) -> tuple[GradingNetwork, GradingNetwork | None]:
    """The network of low resolution, and the teacher where there is one.

    Raises:
        UserError: no resolution in um is known, or a teacher that does not go with the grader.
    """
    grader = load_grading_network(config.grader)
    teacher = load_grading_network(config.teacher_checkpoint) if config.teacher_checkpoint else None
    if grader.scale.mpp is None:
        raise UserError(
            f"grader={config.grader}: expected the um per px of its patches, found none; train it "
            "with target_mpp="
        )
    if teacher is not None:
        ours, theirs = grader.scale, teacher.scale
        if (teacher.grades, theirs.side, theirs.mpp) != (grader.grades, ours.side, ours.mpp):
            raise UserError(
                f"teacher_checkpoint={config.teacher_checkpoint}: expected grades "
                f"{','.join(grader.grades)} of {ours.side} px at {ours.mpp:g} um, found "
                f"{','.join(teacher.grades)} of {theirs.side} px at {theirs.mpp}; give the "
                "grader's own teacher"
            )
    return grader, teacher


def check(config: Config) -> None:
    """Raise UserError on a number that is none of its kind."""
    for name, most in (("min_tissue", 1), ("teacher_share", 1), ("least_share", 1 / 3)):
        value = getattr(config, name)
        if not 0 <= value <= most:
            raise UserError(f"{name}={value}: expected 0 to {most:.3g}")


def find_jobs(
    config: Config, grader: GradingNetwork, settings: ExtractSettings, failures: Failures
) -> list[SlideJob]:
    """The slides at the grader's resolution, those that cannot be read so in `failures`."""
    scale = grader.scale
    tiling = FieldTiling(scale.own_side, scale.own_mpp, config.overlap, config.mpp, {})
    jobs = []
    for job in config.find_jobs(tiling, settings, failures):
        try:
            jobs.append(read_at(job, scale))
        except UserError as error:
            failures.add(job.slide_id, str(error))
    return jobs


def grade_slide(
    config: Config,
    grader: GradingNetwork,
    job: SlideJob,
    found: TileGrades,
    info: dict[str, object],
) -> SlideGrade:
    """Map and files of a slide whose tiles are graded."""
    kept, geometry = found.tissue >= config.min_tissue, job.coordinates.geometry
    with open_slide(job.path, job.mpp, geometry.tile_pattern) as slide:
        grade_map = make_grade_map(
            job.coordinates.coords, geometry.patch_size_level0, (slide.width, slide.height),
            found.probabilities, kept,
        )  # fmt: skip
        mpp = job.mpp or geometry.mpp
        grade = summarise_slide(
            job, mpp, grader.grades, grade_map, kept, found, config.least_share
        )  # fmt: skip
        write_slide_files(
            Path(config.output), slide, job, found, kept, grade_map, grade, info
        )  # fmt: skip
    return grade


def write_summary(config: Config, jobs: Sequence[SlideJob]) -> None:
    """The table and the page of all slides that are done."""
    from detection_kd.figures.grade_page import write_page  # a while to load

    output = Path(config.output)
    done = [job for job in jobs if document_path(output, job.slide_id).exists()]
    grades = [read_slide_grade(output, job.slide_id) for job in done]
    if not grades:
        return
    rows = [grade.row() for grade in grades]
    write_csv(output / "grades.csv", list(rows[0]), rows)
    logger.info(
        "%s: %d slides; %s", STAGE, len(grades), write_page(output, done, grades, config.title)
    )


def main(config: Config) -> int:
    """Grade every slide that has no document yet; 1 when slides failed."""
    check(config)
    settings = config.settings()
    grader, teacher = load_networks(config)
    grader.to(settings.device)
    output, failures = Path(config.output), Failures(STAGE, settings.shard.name)
    jobs = find_jobs(config, grader, settings, failures)
    limits = {"min_tissue": config.min_tissue, "least_share": config.least_share}
    weights = {"grader_sha256": digest_weights_file(config.grader)}
    if teacher is not None:
        teacher.to(settings.device)
        limits["teacher_share"] = config.teacher_share
        weights["teacher_sha256"] = digest_weights_file(config.teacher_checkpoint)
    wanted = find_unfinished(jobs, limits, weights, settings, partial(document_path, output))
    todo = [job for job in jobs if job.slide_id in wanted]
    logger.info("%s: %d slides, %d already done", STAGE, len(jobs), len(jobs) - len(todo))
    grade = partial(grade_tiles, grader, settings)
    sequence = TileSequence(todo, partial(average_tile, grader.scale.own_side))
    for job, found in find_in_slides(
        sequence, grade, lambda _: GradeCollector(), settings, failures
    ):
        try:
            if teacher is not None:
                kept = found.tissue >= config.min_tissue
                found = ask_teacher(
                    teacher, job, found, kept, config.teacher_share, settings, failures
                )
            if found is not None:
                result = grade_slide(config, grader, job, found, wanted[job.slide_id])
                logger.info("%s: %.1f mm2, %s", job.slide_id, result.area_mm2, result.score)
        except UserError as error:
            failures.add(job.slide_id, str(error))
    if settings.shard.count == 1:
        # what overwrite=true did not get to replace is of other settings
        write_summary(config, [job for job in jobs if job.slide_id not in failures.slides])
    return failures.write(output)


if __name__ == "__main__":
    launch(main, Config)
