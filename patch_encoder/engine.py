"""The extraction loop that every encoder shares: decode in workers, encode on the device, one atomic file a slide.

Batches fill across slide boundaries, so that small slides do not waste the device; memory holds the slides in flight
only. The slide is the unit of resuming: a killed run leaves whole bags and no halves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from common import __version__
from common.device import autocast
from common.differences import differences
from common.errors import UserError
from common.files import atomic_path
from common.progress import Progress
from patch_encoder.bags import bag_header, write_bag
from patch_encoder.cohort import find_slides, locate, read_labels
from patch_encoder.coordinates import Coordinates, read_coordinates, tile_pattern_of
from patch_encoder.datasets.tiles import SlideJob, TileBatch, TileSequence, collate
from patch_encoder.failures import Failures
from patch_encoder.models.encoders import Encoder

logger = logging.getLogger(__name__)
STAGE = "extract_features"
COMPARED = ("encoder", "weights_sha256", "transform", "precision", "dtype", "coordinates")


@dataclass(frozen=True)
class ExtractSettings:
    """How to run, and in which precision.

    Attributes:
        device, precision: resolved names (`cpu`, `cuda:0`; `fp32`, `bf16`, `fp16`).
        batch_size: tiles a batch.
        workers: decoding processes; 0 decodes in the main process.
        dtype: float16 or float32 on disk.
        pt: write `pt_files/<slide_id>.pt` as well.
        overwrite: replace bags of another provenance.
    """

    device: torch.device
    precision: str
    batch_size: int
    workers: int
    dtype: str = "float32"
    pt: bool = False
    overwrite: bool = False


def cohort_jobs(slides: str, coords: str, labels: str, failures: Failures) -> list[SlideJob]:
    """One job per slide of the cohort that has tiles; the others are entered in `failures`.

    Args:
        slides: folder of slides.
        coords: folder of coordinates files (`coords/` or its parent).
        labels: labels.csv, or empty for every slide that is found.
        failures: gets slides without coordinates or without tissue.
    """
    folder = Path(coords) / "coords" if (Path(coords) / "coords").is_dir() else Path(coords)
    pattern = tile_pattern_of(folder.glob("[!.]*.h5"))
    records = read_labels(labels) if labels else []
    paths = locate(records, slides, pattern) if records else find_slides(slides, pattern)
    mpps = {record.slide_id: record.mpp for record in records}
    jobs = []
    for slide_id, path in paths.items():
        try:
            coordinates = read_coordinates(folder / f"{slide_id}.h5")
        except UserError as error:
            failures.add(slide_id, str(error))
            continue
        if len(coordinates.coords) == 0:
            failures.add(slide_id, "no tissue: 0 tiles; remove the slide from labels.csv or loosen the tissue settings")
            continue
        jobs.append(SlideJob(slide_id, path, coordinates, mpps.get(slide_id) or coordinates.geometry.mpp or None))
    return jobs


def bag_provenance(encoder: Encoder, coordinates: Coordinates, settings: ExtractSettings) -> dict[str, str]:
    """What decides a bag's numbers, plus the software version."""
    return encoder.provenance | {
        "precision": settings.precision,
        "dtype": settings.dtype,
        "coordinates": coordinates.digest(),
        "software_version": __version__,
    }


def extract(encoder: Encoder, slides: str, coords: str, labels: str, output: str, settings: ExtractSettings) -> int:
    """Encode a cohort into `<output>/<encoder name>/`; returns the exit status: 1 when slides failed (failures.csv)."""
    failures = Failures(STAGE)
    folder = Path(output) / encoder.name
    extract_cohort(cohort_jobs(slides, coords, labels, failures), encoder, folder, settings, failures)
    return failures.write(folder)


def extract_cohort(
    jobs: Sequence[SlideJob], encoder: Encoder, folder: Path, settings: ExtractSettings, failures: Failures
) -> None:
    """Encode every slide that has no valid bag yet, to `folder/h5_files/<slide_id>.h5`.

    Raises:
        UserError: a bag of another provenance is there and `settings.overwrite` is off.
    """
    todo = [job for job in jobs if settings.overwrite or not _is_done(job, encoder, folder, settings)]
    logger.info("%s: %s: %d slides, %d already done", STAGE, encoder.name, len(jobs), len(jobs) - len(todo))
    sequence = TileSequence(todo, encoder.transform)
    model = encoder.model.to(settings.device, memory_format=torch.channels_last)
    with Progress(f"{encoder.name} features", len(sequence), "tiles") as bar:
        assembly = Assembly(todo, encoder, folder, settings, failures)
        for batch in tile_batches(sequence, settings):
            features = encode(model, batch, settings)
            assembly.take(batch, features)
            bar.advance(sum(count for _, count in batch.counted))


def _is_done(job: SlideJob, encoder: Encoder, folder: Path, settings: ExtractSettings) -> bool:
    path = folder / "h5_files" / f"{job.slide_id}.h5"
    if not path.is_file():
        return False
    (count, dim), attributes = bag_header(path)
    expected = bag_provenance(encoder, job.coordinates, settings)
    found = {name: attributes.get(name) for name in COMPARED}
    wanted = {name: expected[name] for name in COMPARED}
    if found != wanted or (count, dim) != (len(job.coordinates.coords), encoder.dim):
        changed = differences(found | {"shape": [count, dim]}, wanted | {"shape": [len(job.coordinates.coords), encoder.dim]})
        raise UserError(f"{path}: holds features of another provenance: {changed}; choose another output or set overwrite=true")
    return not settings.pt or (folder / "pt_files" / f"{job.slide_id}.pt").is_file()


def tile_batches(sequence: TileSequence, settings: ExtractSettings) -> DataLoader:
    """Batches in order, decoded by workers while the device computes."""
    workers = min(settings.workers, len(sequence))
    return DataLoader(
        sequence,
        batch_size=settings.batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=settings.device.type == "cuda",
        multiprocessing_context="fork" if workers and settings.device.type == "cpu" else None,
    )


@torch.inference_mode()
def encode(model: torch.nn.Module, batch: TileBatch, settings: ExtractSettings) -> np.ndarray:
    """Features of a batch, (B, D) in the dtype that is stored; (0, 0) when nothing could be read."""
    if batch.items is None:
        return np.empty((0, 0), dtype=settings.dtype)
    with autocast(settings.device, settings.precision):
        features = model(batch.items.to(settings.device, non_blocking=True))
    return features.float().cpu().numpy().astype(settings.dtype)


class Assembly:
    """Collects features slide by slide and writes each bag once its last tile has come."""

    def __init__(
        self, jobs: Sequence[SlideJob], encoder: Encoder, folder: Path, settings: ExtractSettings, failures: Failures
    ) -> None:
        self.jobs, self.encoder, self.folder = jobs, encoder, folder
        self.settings, self.failures = settings, failures
        self._parts: dict[int, list[np.ndarray]] = {}
        self._missing: dict[int, int] = {}
        self._failed: set[int] = set()

    def take(self, batch: TileBatch, features: np.ndarray) -> None:
        """Enter one batch; tiles of a slide come in order."""
        for index, error in batch.failures:
            self._failed.add(index)
            self.failures.add(self.jobs[index].slide_id, error)
        slides = batch.slides.numpy()
        for index, count in batch.counted:
            missing = self._missing.setdefault(index, len(self.jobs[index].coordinates.coords))
            self._missing[index] = missing - count
            self._parts.setdefault(index, []).append(features[slides == index])
            if self._missing[index] == 0:
                self._finish(index)

    def _finish(self, index: int) -> None:
        parts = self._parts.pop(index)
        del self._missing[index]
        if index in self._failed:
            return
        job, features = self.jobs[index], np.concatenate(parts)
        bad = int((~np.isfinite(features).all(axis=1)).sum())
        if bad:
            self.failures.add(job.slide_id, f"{self.encoder.name} gave NaN or infinity for {bad} of {len(features)} tiles")
            return
        provenance = bag_provenance(self.encoder, job.coordinates, self.settings)
        if self.settings.pt:
            with atomic_path(self.folder / "pt_files" / f"{job.slide_id}.pt") as temporary:
                torch.save(torch.from_numpy(features), temporary)
        path = self.folder / "h5_files" / f"{job.slide_id}.h5"
        write_bag(path, features, job.coordinates.coords, asdict(job.coordinates.geometry), provenance)
