"""One pass over the tiles of many slides, whatever is looked for in them.

Batches fill across slides, what is found in the tiles of a slide is collected until its last tile
is through, and a slide with an unreadable tile fails alone. A slide is the unit of resuming: its
document says what it was made with, and is written last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from patch_encoder.cohort.failures import Failures
from patch_encoder.extraction.loop import ExtractSettings, tile_batches
from patch_encoder.extraction.tile_batches import TileBatch, TileSequence
from patch_encoder.tiles.coordinates import SlideJob
from wsi_common.files import read_json
from wsi_common.memory import reuse_large_blocks
from wsi_common.progress import Progress
from wsi_common.provenance import can_reuse

Found = TypeVar("Found")
In = TypeVar("In", contravariant=True)
Out = TypeVar("Out", covariant=True)
Result = TypeVar("Result")


class TileCollector(Protocol[In, Out]):
    """Collects what was found in the tiles of one slide, which come in order."""

    def add(self, found: In) -> None:
        """Enter the next tile's."""

    def merge(self) -> Out:
        """What the slide holds, once all its tiles are entered."""


def find_in_slides(
    sequence: TileSequence,
    detect: Callable[[Tensor, Sequence[SlideJob]], Sequence[Found]],
    collect: Callable[[SlideJob], TileCollector[Found, Result]],
    settings: ExtractSettings,
    failures: Failures,
) -> Iterator[tuple[SlideJob, Result]]:
    """Every slide with what it holds as soon as its last tile is through; slides with a broken
    tile are left out.

    Args:
        sequence: the tiles of all slides, transformed by `to_tensor`.
        detect: what a batch of tiles uint8 (B, 3, H, W), of these slides, holds, per tile.
        collect: an empty collector for a slide.
        settings: of the pass.
        failures: gets the slides with broken tiles.
    """
    jobs = sequence.jobs
    collectors: dict[int, TileCollector[Found, Result]] = {}
    counts, broken = [0] * len(jobs), set[int]()
    if settings.device.type == "cpu":
        reuse_large_blocks()  # activations; the kernel would clear them anew for every batch
    with Progress("detections", len(sequence), "tiles") as bar:
        for batch in tile_batches(sequence, settings):
            broken |= _enter_failures(batch, jobs, failures)
            if batch.items is not None:
                owners = batch.slides.tolist()
                tiles = detect(batch.items, [jobs[index] for index in owners])
                for index, found in zip(owners, tiles, strict=True):
                    if index not in broken:
                        if index not in collectors:
                            collectors[index] = collect(jobs[index])
                        collectors[index].add(found)
            for index, count in batch.counted:
                bar.advance(count)
                counts[index] += count
                if counts[index] == len(jobs[index].coordinates.coords):
                    collector = collectors.pop(index, None)
                    if collector is not None and index not in broken:
                        yield jobs[index], collector.merge()


def _enter_failures(batch: TileBatch, jobs: Sequence[SlideJob], failures: Failures) -> set[int]:
    """The slides whose tiles could not be read, now in the list of failures."""
    for bad in batch.failures:
        failures.add(jobs[bad.slide].slide_id, bad.error)
    return {bad.slide for bad in batch.failures}


def to_tensor(tile: np.ndarray) -> Tensor:
    """uint8 (3, H, W); scaled and normalised on the device."""
    return torch.from_numpy(np.ascontiguousarray(tile.transpose(2, 0, 1)))


def make_provenance(
    limits: Mapping[str, Any], weights: Mapping[str, str], job: SlideJob, precision: str
) -> dict[str, Any]:
    """What decides what is found on a slide.

    Args:
        limits: settings of the detection.
        weights: digest of the network, by its name in the document.
        job: the slide and its tiles.
        precision: of the computation.
    """
    return {
        **limits,
        "precision": precision,
        **weights,
        "coordinates": job.coordinates.digest(),
        "slide_fingerprint": job.slide_fingerprint,
    }


def find_unfinished(
    jobs: Sequence[SlideJob],
    limits: Mapping[str, Any],
    weights: Mapping[str, str],
    settings: ExtractSettings,
    document: Callable[[str], Path],
) -> dict[str, dict[str, Any]]:
    """The slides that have no document yet, by id, with what decides what is found on each.

    Args:
        jobs: all slides.
        limits, weights: as for `make_provenance`.
        settings: of the pass.
        document: path of the COCO document of a slide id.

    Raises:
        UserError: a document was made with other inputs or settings, and is not overwritten.
    """
    wanted = {
        job.slide_id: make_provenance(limits, weights, job, settings.precision) for job in jobs
    }
    return {
        slide_id: info
        for slide_id, info in wanted.items()
        if not is_done(document(slide_id), info, settings.overwrite)
    }


def is_done(path: Path, wanted: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether a slide's COCO document is there, for the same inputs and settings."""
    return can_reuse(
        path,
        lambda: read_json(path, "detections of a slide").get("info", {}),
        wanted,
        "detections of another run",
        overwrite=overwrite,
    )
