"""The extraction loop that every encoder shares: decode in workers, encode on the device, one
atomic file a slide.

Batches fill across slide boundaries, so that small slides do not waste the device; features go to
disk as they come, so that memory does not grow with slides. The slide is the unit of resuming: a
killed run leaves whole bags and no halves.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from patch_encoder.bags.bag import open_bag
from patch_encoder.cohort.disk_space import check_room, explain_full_disk
from patch_encoder.cohort.failures import Failures, find_reason
from patch_encoder.cohort.selection import Selection
from patch_encoder.cohort.shards import Shard
from patch_encoder.cohort.slide_files import find_cohort
from patch_encoder.extraction import decoding
from patch_encoder.extraction.bag_assembly import UNREADABLE, Assembly
from patch_encoder.extraction.bag_targets import BagFolder, BagTarget
from patch_encoder.extraction.network import Network, PendingFeatures, has_weights
from patch_encoder.extraction.ray_backend import Report, work_on_ray
from patch_encoder.extraction.tile_batches import TileBatch, TileSequence
from patch_encoder.models.encoders import Encoder
from patch_encoder.slides.names import check_fingerprint
from patch_encoder.stain.normaliser import Normaliser
from patch_encoder.tiles.coordinates import (
    Coordinates,
    SlideJob,
    find_coordinate_files,
    read_coordinates,
    tile_pattern_of,
)
from wsi_common import __version__
from wsi_common.errors import DamagedFile, UserError
from wsi_common.files import check_writable
from wsi_common.processes.ray_cluster import RaySettings
from wsi_common.progress import Progress
from wsi_common.provenance import can_reuse

logger = logging.getLogger(__name__)
STAGE = "extract_features"
KERNELS = "kernels"  # attribute of a bag whose network was not fused
COMPARED = (
    *("encoder", "weights_sha256", "transform", "precision", "dtype", "coordinates", "stain"),
    "slide_fingerprint",
)


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
        compiler: backend of torch.compile; empty: not compiled.
        max_bad_tiles: largest share of a slide's tiles that may be unreadable.
        read_timeout: seconds that a decoding process may take over one tile.
        shard: the part of the cohort that this process works on.
        ray: where Ray's workers run; None: in this process.
        stain: stain normalisation of the tiles; None: as they are.
        kernels: of a network on a CPU, `fused` or `plain`; `auto`: those of the bags that are
            there, else the faster ones on the first batch.
        selection: the slides of the cohort that are taken.
    """

    device: torch.device
    precision: str
    batch_size: int
    workers: int
    dtype: str = "float32"
    pt: bool = False
    overwrite: bool = False
    compiler: str = ""
    max_bad_tiles: float = 0.0
    read_timeout: float = 300.0
    shard: Shard = field(default_factory=Shard)
    ray: RaySettings | None = None
    stain: Normaliser | None = None
    kernels: str = "fused"
    selection: Selection = field(default_factory=Selection)


def cohort_jobs(
    slides: str,
    coords: str,
    labels: str,
    failures: Failures,
    shard: Shard | None = None,
    selection: Selection | None = None,
) -> list[SlideJob]:
    """One job per slide of the cohort that has tiles; the others are entered in `failures`.

    Args:
        slides: folder of slides.
        coords: folder of coordinates files (`coords/`, TRIDENT's `patches/`, or their parent).
        labels: labels.csv, or empty for every slide that is found.
        failures: gets slides that are not there, without coordinates or without tissue.
        shard: the part of the cohort that is wanted; None: all of it.
        selection: the slides that are taken; None: all of them.
    """
    shard = shard or Shard()
    tiled = find_coordinate_files(coords)
    folder = next(iter(tiled.values())).parent if tiled else Path(coords)
    pattern = tile_pattern_of(tiled.values())
    # without labels, a picture is a slide where it was tiled as one
    wanted = tiled.keys()
    cohort = find_cohort(slides, labels, selection or Selection(), pattern, wanted=wanted)
    jobs, without = [], dict(cohort.problems)
    for slide_id, path in cohort.slides.items():
        try:
            if slide_id not in tiled:
                reason = find_reason(slide_id, (Path(coords), folder.parent))
                raise UserError(
                    f"it was not tiled: {reason}"
                    if reason
                    else f"expected its tiles {folder / slide_id}.h5, found none; tile it first"
                )
            coordinates = read_coordinates(tiled[slide_id])
        except UserError as error:
            without[slide_id] = str(error)
            continue
        if len(coordinates.coords) == 0:
            without[slide_id] = (
                "no tissue: 0 tiles; leave the slide out (labels.csv, slides_list) or loosen the "
                "tissue settings"
            )
            continue
        jobs.append(
            SlideJob(
                slide_id,
                path,
                coordinates,
                cohort.mpps.get(slide_id) or coordinates.geometry.mpp or None,
            )
        )
    if shard.index == 1 or shard.divided:  # once, not in every part
        failures.add_all(without)
    return list(_know_again(shard.select(jobs), failures))


def _know_again(jobs: Sequence[SlideJob], failures: Failures) -> Iterator[SlideJob]:
    """The jobs with the fingerprints of their slides; those whose tiles are of another slide are
    entered in `failures`.
    """
    for job in jobs:
        try:
            fingerprint = check_fingerprint(
                job.path, job.coordinates.slide_fingerprint, "its coordinates"
            )
        except UserError as error:
            failures.add(job.slide_id, str(error))
            continue
        yield replace(job, slide_fingerprint=fingerprint)


def bag_provenance(
    encoder: Encoder, coordinates: Coordinates, settings: ExtractSettings
) -> dict[str, str]:
    """What decides a bag's numbers beside the slide, and the software version; `stain` only if it
    is used.
    """
    provenance = encoder.provenance | {
        "precision": settings.precision,
        "dtype": settings.dtype,
        "coordinates": coordinates.digest(),
        "software_version": __version__,
    }
    return provenance | ({"stain": settings.stain.provenance} if settings.stain else {})


def extract(
    encoder: Encoder, slides: str, coords: str, labels: str, output: str, settings: ExtractSettings
) -> int:
    """Encode a cohort into `<output>/<encoder name>/`; returns the exit status: 1 when slides
    failed (failures.csv).

    Raises:
        UserError: a bag of another provenance is there and `settings.overwrite` is off, or the
            features do not fit on the disk.
    """
    if not has_weights(encoder.model):  # computed by the workers, the same on any device
        settings = replace(settings, precision="fp32")
    failures = Failures(STAGE, settings.shard.name)
    folder = Path(output) / encoder.name
    jobs = cohort_jobs(slides, coords, labels, failures, settings.shard, settings.selection)
    todo = [job for job in jobs if not is_done(job, encoder, folder, settings)]
    logger.info(
        "%s: %s: %d slides, %d already done", STAGE, encoder.name, len(jobs), len(jobs) - len(todo)
    )
    settings = replace(settings, kernels=pick_kernels(jobs, todo, folder, settings))
    say_unsuited_tiles(encoder, jobs)
    check_room(folder, todo, encoder.dim, settings.dtype, settings.pt)
    if todo:
        check_writable(folder / "h5_files")
    start = time.perf_counter()
    if settings.ray is None:
        report = encode_slides(todo, encoder, folder, settings)
    else:
        alone = replace(settings, ray=None)
        work = partial(
            encode_slides, encoder=encoder, folder=folder.absolute(), settings=alone, show=False
        )
        bundle = 8 * settings.batch_size
        report = work_on_ray(
            todo,
            work,
            settings.ray,
            cpus=settings.workers + 1,  # its decoding processes and itself
            on_cuda=settings.device.type == "cuda",
            least_tiles=bundle,
        )
    for row in report.failures:
        failures.add(row["slide"], row["error"])
    logger.info("%s: %s", STAGE, report.summary(time.perf_counter() - start))
    return failures.write(folder)


def say_unsuited_tiles(encoder: Encoder, jobs: Sequence[SlideJob]) -> None:
    """Log once when tiles are of another size or resolution than those the encoder was trained on:
    by more than a fifth in resolution, or a quarter in side (224 and 256 px go together).
    """
    if encoder.mpp is None or encoder.tile is None:
        return
    shapes = [job.coordinates.geometry for job in jobs]
    unsuited = [
        (shape.target_size, shape.target_mpp)
        for shape in shapes
        if (shape.target_mpp and not 0.8 <= shape.target_mpp / encoder.mpp <= 1.25)
        or not 0.8 <= shape.target_size / encoder.tile <= 1.25
    ]
    if unsuited:
        (side, mpp), count = Counter(unsuited).most_common(1)[0]
        line = (
            "%s was trained on tiles of %d px at %g um per pixel, %d of %d slides are cut as %d px "
            "at %s; tile again with tile_size=%d target_mpp=%g if that is not meant"
        )
        place = (len(jobs), side, f"{mpp:g}" if mpp else "an unknown resolution")
        logger.warning(
            line, encoder.name, encoder.tile, encoder.mpp, count, *place, encoder.tile, encoder.mpp
        )


def encode_slides(
    jobs: Sequence[SlideJob],
    encoder: Encoder,
    folder: Path,
    settings: ExtractSettings,
    *,
    show: bool = True,
    network: Network | None = None,
) -> Report:
    """Encode slides to `folder/h5_files/<slide_id>.h5`, one after the other.

    Args:
        jobs: the slides.
        encoder, folder, settings: what, where and how.
        show: a bar, or a line every so often.
        network: the encoder's network when it is ready from an earlier call.
    """
    with explain_full_disk(folder):
        target = BagFolder(folder, settings.dtype, pt=settings.pt)
        return encode_into(target, jobs, encoder, settings, show=show, network=network)


def encode_into(
    target: BagTarget,
    jobs: Sequence[SlideJob],
    encoder: Encoder,
    settings: ExtractSettings,
    *,
    show: bool = True,
    network: Network | None = None,
) -> Report:
    """Encode slides to bags of `target`; arguments as of `encode_slides`."""
    failures = Failures(STAGE)
    sequence = TileSequence(jobs, encoder.transform, settings.stain)
    network = network or build_network(encoder, settings)
    provenance = [bag_provenance(encoder, job.coordinates, settings) for job in jobs]
    assembly = Assembly(
        jobs,
        provenance,
        target,
        failures,
        max_bad_tiles=settings.max_bad_tiles,
        late=lambda: kernels_provenance(network),
    )
    waiting = Stopwatch()
    bar = Progress(f"{encoder.name} features", len(sequence), "tiles", enabled=show)
    batches = tile_batches(sequence, settings)
    with bar, closing(assembly), closing(batches):
        for batch, features in encoded(waiting.over(batches), network, settings.dtype):
            assembly.take(batch, features)
            bar.advance(sum(count for _, count in batch.counted))
    return Report(len(jobs), len(sequence), waiting.seconds, waiting.total, failures.rows)


def build_network(encoder: Encoder, settings: ExtractSettings) -> Network:
    """The encoder's network for these settings."""
    return Network(
        encoder.model,
        settings.device,
        settings.precision,
        settings.batch_size,
        settings.compiler,
        settings.kernels,
    )


def kernels_provenance(network: Network) -> dict[str, str]:
    """Entry of a bag's provenance where the network was not fused, which changes the last bits."""
    return {KERNELS: network.kernels} if network.kernels != "fused" else {}


def pick_kernels(
    jobs: Sequence[SlideJob], todo: Sequence[SlideJob], folder: Path, settings: ExtractSettings
) -> str:
    """Kernels for the slides to do: those of the bags that are there.

    Only one process alone measures. Several over one cohort would choose each for itself.
    """
    if settings.kernels != "auto":
        return settings.kernels
    left = {job.slide_id for job in todo}
    for job in jobs:
        if job.slide_id not in left:
            bag = open_bag(folder / "h5_files" / f"{job.slide_id}.h5")
            return str(bag.attributes.get(KERNELS, "fused"))
    return "auto" if settings.ray is None and settings.shard.count == 1 else "fused"


def is_done(job: SlideJob, encoder: Encoder, folder: Path, settings: ExtractSettings) -> bool:
    """Whether the slide's bag is there and holds what would be written.

    Raises:
        UserError: it holds something else, or lacks more tiles than `settings` allow.
    """
    path = folder / "h5_files" / f"{job.slide_id}.h5"
    if settings.overwrite or not path.is_file():
        return False
    tiles, unreadable = len(job.coordinates.coords), 0
    expected = bag_provenance(encoder, job.coordinates, settings)
    expected["slide_fingerprint"] = job.slide_fingerprint
    wanted = {name: expected.get(name) for name in COMPARED} | {"shape": [tiles, encoder.dim]}

    def read() -> dict[str, object]:
        nonlocal unreadable
        bag = open_bag(path)
        (count, dim), attributes = bag.shape, bag.attributes
        unreadable = int(attributes.get(UNREADABLE, 0))
        found = {name: attributes.get(name) for name in COMPARED}
        return found | {"shape": [count + unreadable, dim]}

    if not can_reuse(path, read, wanted, "features of another provenance"):
        return False
    if unreadable > settings.max_bad_tiles * tiles:
        raise UserError(
            f"{path}: expected at most {settings.max_bad_tiles:g} of the tiles missing, found "
            f"{unreadable} of {tiles} that "
            "could not be read; raise max_bad_tiles, or mend the slide and set overwrite=true"
        )
    return not settings.pt or _holds_tensor(folder / "pt_files" / f"{job.slide_id}.pt")


def _holds_tensor(path: Path) -> bool:
    """Whether the second file of a bag is there and whole."""
    try:
        return path.is_file() and len(open_bag(path)) > 0
    except DamagedFile as error:
        logger.warning("%s; it is made anew", error)
        return False


def tile_batches(sequence: TileSequence, settings: ExtractSettings) -> Iterator[TileBatch]:
    """Batches in order, decoded by workers while the device computes."""
    found = decoding.batches(sequence, settings.batch_size, settings.workers, settings.read_timeout)
    with closing(found):
        for batch in found:
            yield batch.pin_memory() if settings.device.type == "cuda" else batch


def encoded(
    batches: Iterable[TileBatch], network: Network, dtype: str
) -> Iterator[tuple[TileBatch, np.ndarray]]:
    """Batches with the features (B, D) of what could be read, in the dtype that is stored.

    One batch behind: the device has its next work before the host stores what is ready.
    """
    before: tuple[TileBatch, PendingFeatures | None] | None = None
    for batch in batches:
        started = network.launch(batch.items) if batch.items is not None else None
        if before is not None:
            yield before[0], _is_stored(before[1], dtype)
        before = batch, started
    if before is not None:
        yield before[0], _is_stored(before[1], dtype)


def _is_stored(launched: PendingFeatures | None, dtype: str) -> np.ndarray:
    if launched is None:
        return np.empty((0, 0), dtype=dtype)
    return launched.features().to(getattr(torch, dtype)).numpy()


class Stopwatch:
    """Seconds that an iterator keeps its consumer waiting, and that the whole loop takes."""

    def __init__(self) -> None:
        self.seconds = self.total = 0.0

    def over(self, items: Iterable[TileBatch]) -> Iterator[TileBatch]:
        """The same items, timed."""
        start = before = time.perf_counter()
        for item in items:
            self.seconds += time.perf_counter() - before
            yield item
            before = time.perf_counter()
        self.total = time.perf_counter() - start
