"""Encode every tile of a cohort with D2VFM students: one feature bag per slide and student.

    python -m detection_kd.extract_student slides=... coords=... \
        student=runs/d2vfm/checkpoint_best.pt output=runs/features

Tiles keep their native size (no resize), as TS2G-KD extracts. A student that `export_student` wrote
(`.onnx`, float32 or int8) is run by onnxruntime, in the precision of its file.

Several students (`student=[a=runs/a/checkpoint_best.pt,b=runs/b/checkpoint_best.pt]`) get the bags
that each of them would get alone, to the last bit. Those with the same trunk share one pass over
the tiles: reading, decoding and the trunk are nearly all of an extraction, so that thirty adapters
of a study cost little more than one.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from detection_kd.models.shared_trunk import SharedTrunk, TrunkMember, group_by_trunk
from detection_kd.models.student_onnx import load_students, split_entry
from patch_encoder.cohort.disk_space import check_room, explain_full_disk
from patch_encoder.cohort.failures import Failures
from patch_encoder.extraction.bag_assembly import Assembly
from patch_encoder.extraction.bag_targets import BagFolder
from patch_encoder.extraction.keys import CoordsKeys, FeatureKeys
from patch_encoder.extraction.loop import (
    ExtractSettings,
    bag_provenance,
    cohort_jobs,
    encoded,
    extract,
    is_done,
    tile_batches,
)
from patch_encoder.extraction.network import Network
from patch_encoder.extraction.tile_batches import TileSequence
from patch_encoder.models.encoders import Encoder
from patch_encoder.tiles.coordinates import SlideJob
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.device import pick_device
from wsi_common.errors import UserError
from wsi_common.progress import Progress

logger = logging.getLogger(__name__)
STAGE = "extract_student"


@dataclass
class Config(CoordsKeys, FeatureKeys):
    """Keys of student extraction (published: batches of 16, fp32)."""

    student: list[str] = key(
        REQUIRED,
        "checkpoint of train_d2vfm; or an .onnx file of export_student; several as name=checkpoint",
    )

    def settings(self) -> ExtractSettings:
        """The settings of the extraction loop. An exported student decides its precision itself."""
        exported = [
            path for entry in self.student if (path := split_entry(entry)[1]).endswith(".onnx")
        ]
        if len(self.student) > 1 and (exported or self.engine != "local"):
            raise UserError(
                f"student={self.student} engine={self.engine}: expected checkpoints and "
                "engine=local for several students; extract the others one by one"
            )
        if not exported:
            return super().settings()
        if self.compile:
            raise UserError(
                f"compile=true: {exported[0]} is run by onnxruntime, not compiled; set "
                "compile=false"
            )
        if self.precision not in ("auto", "fp32"):
            raise UserError(
                f"precision={self.precision}: {exported[0]} has its own; set precision=auto"
            )
        return replace(super().settings(), precision="fp32")


def build_model(config: Config) -> list[Encoder]:
    """The students of this configuration."""
    if not config.student:
        raise UserError("student=[]: expected at least one checkpoint")
    return load_students(config.student, pick_device(config.device))


def encode_together(
    group: list[TrunkMember], jobs: list[SlideJob], output: Path, settings: ExtractSettings
) -> list[Failures]:
    """One pass over the slides that lack a bag; the failures of each student.

    Raises:
        UserError: a bag of another provenance is there, or the features do not fit on the disk.
    """
    encoders = [member.encoder for member in group]
    folders = [output / encoder.name for encoder in encoders]
    pairs = list(zip(encoders, folders, strict=True))
    todo = [job for job in jobs if not all(is_done(job, *pair, settings) for pair in pairs)]
    names = ", ".join(encoder.name for encoder in encoders)
    logger.info(
        "%s: %s: %d slides, %d already done", STAGE, names, len(jobs), len(jobs) - len(todo)
    )
    module = SharedTrunk(group)
    check_room(output, todo, sum(module.dims), settings.dtype, settings.pt)
    network = Network(
        module, settings.device, settings.precision, settings.batch_size, settings.compiler
    )
    sequence = TileSequence(todo, encoders[0].transform, settings.stain)
    failures = [Failures(STAGE, settings.shard.name) for _ in group]
    with ExitStack() as stack:
        stack.enter_context(explain_full_disk(output))
        batches = stack.enter_context(closing(tile_batches(sequence, settings)))
        bar = stack.enter_context(Progress("features of students", len(sequence), "tiles"))
        assemblies = []
        for (encoder, folder), failed in zip(pairs, failures, strict=True):
            provenance = [bag_provenance(encoder, job.coordinates, settings) for job in todo]
            target = BagFolder(folder, settings.dtype, pt=settings.pt)
            assembly = Assembly(
                todo, provenance, target, failed, max_bad_tiles=settings.max_bad_tiles
            )
            assemblies.append(stack.enter_context(closing(assembly)))
        for batch, features in encoded(batches, network, settings.dtype) if todo else ():
            for assembly, columns in zip(assemblies, module.columns, strict=True):
                assembly.take(batch, features[:, columns])
            bar.advance(sum(count for _, count in batch.counted))
    return failures


def extract_together(config: Config, students: list[Encoder], settings: ExtractSettings) -> int:
    """Encode a cohort with several students, trunk by trunk; returns the exit status."""
    groups = group_by_trunk([TrunkMember(student, student.model.network) for student in students])  # type: ignore[arg-type]
    cohort = Failures(STAGE, settings.shard.name)
    jobs = cohort_jobs(
        config.slides, config.coords, config.labels, cohort, settings.shard, settings.selection
    )
    status, start = 0, time.perf_counter()
    for group in groups:
        failures = encode_together(group, jobs, Path(config.output), settings)
        for member, failed in zip(group, failures, strict=True):
            for row in cohort.rows:
                failed.add(row["slide"], row["error"])
            status = max(status, failed.write(Path(config.output) / member.encoder.name))
    seconds = time.perf_counter() - start
    logger.info("%s: %d students in %d passes, %.1f s", STAGE, len(students), len(groups), seconds)
    return status


def main(config: Config) -> int:
    settings = config.settings()  # refuses before any student is loaded
    students = build_model(config)
    if len(students) > 1:
        return extract_together(config, students, settings)
    return extract(
        students[0], config.slides, config.coords, config.labels, config.output, settings
    )


if __name__ == "__main__":
    launch(main, Config)
