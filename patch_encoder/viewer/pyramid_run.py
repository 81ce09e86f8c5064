"""The pyramids of a cohort: what is there is kept, what is missing is written by a pool of
processes, block by block over all slides.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch_encoder.cohort.failures import Failures
from patch_encoder.viewer.deep_zoom import Place, pack_places
from patch_encoder.viewer.tile_blocks import (
    PyramidJob,
    read_mark,
    write_block,
    write_upper_levels,
)
from wsi_common.files import read_json, write_json, write_text
from wsi_common.processes.pool import Lost, Raised, run_jobs
from wsi_common.progress import progress
from wsi_common.provenance import can_reuse, unknown_origin

logger = logging.getLogger(__name__)
STARTED = "made_from.json"


@dataclass(frozen=True)
class WantedPyramid:
    """A pyramid and what decides its tiles; `record` is the file that is written last."""

    slide_id: str
    job: PyramidJob
    made_from: Mapping[str, Any]

    @property
    def record(self) -> Path:
        """Where the record lies: beside the folder of the tiles."""
        return self.job.folder.with_name(f"{self.slide_id}.json")


def read_record(path: Path) -> dict[str, Any]:
    """What a finished pyramid consists of."""
    return read_json(path, "the record of a pyramid")


def is_finished(wanted: WantedPyramid, overwrite: bool) -> bool:
    """Whether the pyramid is there, made of the same slide with the same settings; what another run
    began is made ready to go on, or removed.

    Raises:
        UserError: it was made of something else, or the folder is not ours.
    """
    folder, what = wanted.job.folder, "a pyramid of other settings or of another slide"
    if can_reuse(
        wanted.record,
        lambda: read_record(wanted.record)["made_from"],
        wanted.made_from,
        what,
        overwrite=overwrite,
    ):
        return True
    started = folder / STARTED
    if folder.exists() and not started.exists():
        raise unknown_origin(folder, "files", STARTED)
    goes_on = can_reuse(
        started,
        lambda: read_json(started, "what a pyramid is made from"),
        wanted.made_from,
        what,
        overwrite=overwrite,
    )
    if not goes_on:
        wanted.record.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        write_json(started, dict(wanted.made_from))
    return False


def write_pyramids(
    wanted: Sequence[WantedPyramid], workers: int, read_timeout: float, failures: Failures
) -> None:
    """Write the pyramids that are not finished, each slide's levels as soon as its last block is
    there; slides that cannot be read are entered in `failures`.
    """
    todo: list[tuple[WantedPyramid, Place]] = []
    left: Counter[str] = Counter()
    for pyramid in wanted:
        blocks = [b for b in pyramid.job.blocks if read_mark(pyramid.job, b) is None]
        todo += [(pyramid, block) for block in blocks]
        left[pyramid.slide_id] = len(blocks)
        if not blocks:
            finish_pyramid(pyramid, failures)
    outcomes = run_jobs(_write_one, todo, workers, read_timeout)
    for number, result in progress(outcomes, "pyramids", len(todo), "blocks"):
        pyramid = todo[number][0]
        if isinstance(result, (Lost, Raised)):
            failures.add(pyramid.slide_id, result.reason)
            continue
        left[pyramid.slide_id] -= 1
        if not left[pyramid.slide_id]:
            finish_pyramid(pyramid, failures)


def _write_one(job: tuple[WantedPyramid, Place]) -> None:
    write_block(job[0].job, job[1])


def finish_pyramid(pyramid: WantedPyramid, failures: Failures) -> None:
    """Write what stands above the blocks and, last, the record; the blocks' marks go."""
    job = pyramid.job
    written = write_upper_levels(job)
    if written.unreadable:
        failures.note(pyramid.slide_id, f"{written.unreadable} tiles cannot be read and are grey")
    write_text(job.folder.with_name(f"{pyramid.slide_id}.dzi"), job.zoom.describe())
    record = {
        "made_from": dict(pyramid.made_from),
        "width": job.zoom.width,
        "height": job.zoom.height,
        "downsample": job.zoom.downsample,
        "tiles": len(written.places),
        "unreadable": written.unreadable,
        "present": pack_places(job.zoom, written.places),
    }
    write_json(pyramid.record, record)
    shutil.rmtree(job.folder / "blocks", ignore_errors=True)
