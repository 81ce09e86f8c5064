"""Encode a cohort with many D2VFM students at once: those of one trunk share its pass over the
tiles.

    python -m detection_kd.extract_students students='[a=runs/a/checkpoint_best.pt,
    b=runs/b/checkpoint_best.pt]' \\
        slides=... coords=... output=runs/features

Writes the bags that `extract_student` would write for each of them, to the last bit,
`<output>/<name>/h5_files/<slide>.h5`. Reading, decoding and the trunk are nearly all of an
extraction, so that thirty adapters of a study cost little more than one. A student whose trunk was
trained (`unfreeze`) is encoded alone. A slide that has all its bags is skipped.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from common.cli import launch
from common.config import REQUIRED, key
from common.errors import UserError
from common.files import safe_id
from common.progress import Progress
from detection_kd.models.shared_trunk import Member, SharedTrunk, by_trunk
from detection_kd.models.student import student_encoder
from patch_encoder.cohort.disk_space import check_room, full_disk_explained
from patch_encoder.cohort.failures import Failures
from patch_encoder.extraction.bag_assembly import Assembly
from patch_encoder.extraction.keys import FeatureKeys
from patch_encoder.extraction.loop import (
    ExtractSettings,
    bag_provenance,
    cohort_jobs,
    encoded,
    is_done,
    tile_batches,
)
from patch_encoder.extraction.network import Network
from patch_encoder.extraction.tile_batches import SlideJob, TileSequence

logger = logging.getLogger(__name__)
STAGE = "extract_students"


@dataclass
class Config(FeatureKeys):
    """Keys of the extraction of several students; the rest is that of every extraction."""

    students: list[str] = key(REQUIRED, "students, name=checkpoint of train_d2vfm")

    def settings(self) -> ExtractSettings:
        """The same, without what a pass for many encoders does not have."""
        if self.engine != "local":
            raise UserError(
                f"engine={self.engine}: expected local for several students at once; take "
                "extract_student for Ray"
            )
        return super().settings()


def build_model(config: Config) -> list[list[Member]]:
    """The students, those of one trunk together."""
    members = []
    for entry in config.students:
        name, found, path = entry.partition("=")
        if not found or not path:
            raise UserError(f"students: expected name=checkpoint, found '{entry}'")
        encoder = student_encoder(path, safe_id(name.strip(), "student"))
        members.append(Member(encoder, encoder.model.network))  # type: ignore[arg-type]
    names = [member.encoder.name for member in members]
    if not members or len(set(names)) < len(names):
        raise UserError(f"students: expected one or more of different names, found {names}")
    return by_trunk(members)


def encode_together(
    group: list[Member], jobs: list[SlideJob], output: Path, settings: ExtractSettings
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
    limits = {"dtype": settings.dtype, "pt": settings.pt, "max_bad_tiles": settings.max_bad_tiles}
    failures = [Failures(STAGE, settings.shard.name) for _ in group]
    with ExitStack() as stack:
        stack.enter_context(full_disk_explained(output))
        batches = stack.enter_context(closing(tile_batches(sequence, settings)))
        bar = stack.enter_context(Progress("features of students", len(sequence), "tiles"))
        assemblies = []
        for (encoder, folder), failed in zip(pairs, failures, strict=True):
            provenance = [bag_provenance(encoder, job.coordinates, settings) for job in todo]
            assemblies.append(
                stack.enter_context(closing(Assembly(todo, provenance, folder, failed, **limits)))
            )
        for batch, features in encoded(batches, network, settings.dtype) if todo else ():
            for assembly, columns in zip(assemblies, module.columns, strict=True):
                assembly.take(batch, features[:, columns])
            bar.advance(sum(count for _, count in batch.counted))
    return failures


def main(config: Config) -> int:
    settings = config.settings()  # refuses before any student is loaded
    groups = build_model(config)
    cohort = Failures(STAGE, settings.shard.name)
    jobs = cohort_jobs(config.slides, config.coords, config.labels, cohort, settings.shard)
    status, start = 0, time.perf_counter()
    for group in groups:
        failures = encode_together(group, jobs, Path(config.output), settings)
        for member, failed in zip(group, failures, strict=True):
            for row in cohort.rows:
                failed.add(row["slide"], row["error"])
            status = max(status, failed.write(Path(config.output) / member.encoder.name))
    count = sum(len(group) for group in groups)
    logger.info(
        "%s: %d students in %d passes, %.1f s",
        STAGE,
        count,
        len(groups),
        time.perf_counter() - start,
    )
    return status


if __name__ == "__main__":
    launch(main, Config)
