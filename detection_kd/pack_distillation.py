"""Pack a distillation set into one file for training, from the folder of rank_patches or straight
from slides and teacher bags.

    python -m detection_kd.pack_distillation dataset=runs/distillation output=runs/distillation.h5
    python -m detection_kd.pack_distillation slides=cohort/slides coords=runs/tiles
    features=runs/features/gigapath tiles_per_slide=50 \\
        output=runs/distillation.h5

A folder's pictures keep their bytes; training on either form gives the same batches. From slides,
tiles are all, drawn at random, or the highest of a ranking; finished slides wait in
`<output>.parts/` for the others, so that a killed run goes on. Problems are listed beside the
output: `problems.csv` (pairs of a folder; tiles that coordinates and bags do not share) and
`failures.csv` (slides; the exit status is then 1 and the file holds the others).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from detection_kd.datasets.cut_pairs import (
    JPEG_QUALITY,
    PairCutJob,
    Ranking,
    check_one_teacher,
    cut_slide,
    read_features,
    read_ranking,
)
from detection_kd.datasets.distillation import digest_pairs, read_pairs
from detection_kd.datasets.packed_pairs import SUFFIXES, UNKNOWN, Pack, PackWriter
from detection_kd.datasets.pair_problems import Problems
from patch_encoder.bags.bag import open_bag
from patch_encoder.bags.paths import list_bags
from patch_encoder.cohort.disk_space import explain_full_disk
from patch_encoder.cohort.failures import Failures
from patch_encoder.cohort.labels import SlideRecord, read_labels
from patch_encoder.cohort.slide_files import find_slides, locate_slides
from patch_encoder.slides.names import check_fingerprint, compute_fingerprint
from patch_encoder.tiles.coordinates import find_coordinate_files, tile_pattern_of
from wsi_common import __version__
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import DamagedFile, UserError
from wsi_common.files import read_json, sha256_bytes, sha256_file
from wsi_common.processes.pool import Lost, Raised, pick_workers, run_jobs
from wsi_common.progress import progress
from wsi_common.provenance import can_reuse

logger = logging.getLogger(__name__)
STAGE = "pack_distillation"
MISMATCHES = {"without_feature": "tile without feature", "without_tile": "feature without tile"}
ENCODINGS = ("jpeg", "png")


@dataclass
class Config:
    """Keys of packing."""

    output: str = key(REQUIRED, "where the results are written; the packed file, .h5", runtime=True)
    dataset: str = key(
        "",
        "distillation set: a folder with wsi_root/ and ann_root/, or a packed .h5 file; "
        "the folder to pack; or give slides and features",
        path=True,
    )
    slides: str = key("", "slide file, or folder tree of slides", path=True)
    features: str = key("", "folder of feature bags; of the teacher", path=True)
    coords: str = key("", "folder of coordinates files; empty: the corners in the bags", path=True)
    labels: str = key(
        "", "labels.csv of the cohort; only its slides are packed, and mpp comes from it", path=True
    )
    subset: str = key(
        "",
        "use only slides with this value in the split column, or one of several "
        "(train,val); empty: all",
    )
    tiles_per_slide: int = key(
        0, "tiles per slide; at random or the highest of the ranking; 0: all"
    )
    ranking: str = key(
        "",
        "csv with slide_id,x,y,score, or ann_root/ann.json of rank_patches; empty: at random",
        path=True,
    )
    encoding: str = key(
        "jpeg", "of tiles that are cut; a tile folder's own JPEGs are copied", choices=ENCODINGS
    )
    dtype: str = key(
        "auto",
        "number format of the stored features; auto: as in the bags, float32 from a folder",
        choices=("auto", "float16", "float32"),
    )
    seed: int = key(2024, "seed of everything that is drawn at random")
    verify: bool = key(
        False, "decode every picture first, instead of reading its header only", runtime=True
    )
    skip_bad: bool = key(
        False,
        "leave out what cannot be used instead of stopping; here: pairs of a folder with problems",
    )
    workers: int | None = key(
        None,
        "worker processes; one slide each; null: one per core, at most 8; 0: the main process, "
        "which a slide that crashes its reader ends",
        runtime=True,
    )
    read_timeout: float = key(
        300.0,
        "seconds without progress after which a slide is given up (not with workers=0)",
        runtime=True,
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def check(config: Config) -> None:
    """Refuse what cannot work before anything is read."""
    if bool(config.dataset) == bool(config.slides) or bool(config.slides) != bool(config.features):
        raise UserError(
            "expected either dataset=, or slides= and features= (and coords=), found neither or "
            "parts of both"
        )
    if Path(config.output).suffix not in SUFFIXES:
        raise UserError(
            f"output={config.output}: expected a file that ends in {' or '.join(SUFFIXES)}"
        )
    config.workers = pick_workers(config.workers, config.read_timeout)
    if config.tiles_per_slide < 0:
        raise UserError(f"tiles_per_slide={config.tiles_per_slide}: expected at least 0")
    if config.subset and not config.labels:
        raise UserError(f"subset={config.subset}: expected labels= with it, found none")


def is_done(output: Path, provenance: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the file is there, whole, of this provenance and without slides that failed.

    Raises:
        UserError: it holds another set.
    """
    if overwrite or not output.exists():
        return False
    try:
        found = dict(Pack(output).provenance)
    except DamagedFile as error:
        logger.warning("%s; it is made anew", error)
        return False
    found.pop("software_version", None)
    failed = found.pop("failed", [])
    known, wanted = _without(found, failed), _without(dict(provenance), failed)
    return can_reuse(output, lambda: known, wanted, "another packed set") and not failed


def _without(provenance: dict[str, Any], failed: Sequence[str]) -> dict[str, Any]:
    """A provenance but for slides that failed, which may have been mended."""
    slides = provenance.get("slides", {})
    return provenance | {
        "slides": {name: digest for name, digest in slides.items() if name not in failed}
    }


def pack_folder(config: Config, output: Path) -> int:
    """Pack a folder in the order of its list; pictures keep their bytes."""
    root = Path(config.dataset)
    report = output.parent / "problems.csv"
    pairs = read_pairs(
        root, report=report, verify=config.verify, skip_bad=config.skip_bad, show=True
    )
    stamp = root / "distillation.json"
    made_by = read_json(stamp, "a distillation set's provenance") if stamp.is_file() else {}
    dtype = "float32" if config.dtype == "auto" else config.dtype
    provenance = {
        "source": "folder",
        "distillation": made_by,
        "pairs": digest_pairs(pairs),
        "dtype": dtype,
    }
    if is_done(output, provenance, config.overwrite):
        logger.info("%s: %s is there already", STAGE, output)
        return 0
    corners = read_listed_corners(root)
    with explain_full_disk(output.parent), PackWriter(output, dtype) as writer:
        for pair in progress(pairs, "packing", len(pairs), "pairs"):
            corner = corners.get(f"{pair.slide_id}/{pair.image.name}", UNKNOWN)
            writer.append(
                pair.slide_id, pair.image.name, pair.picture(), pair.feature.numpy(), corner
            )
        writer.finish(provenance | {"software_version": __version__})
    describe_result(output, len(pairs))
    return 0


def read_listed_corners(root: Path) -> dict[str, tuple[int, int]]:
    """<slide>/<patch>.jpg -> (x, y), where the list has them."""
    images = read_json(root / "ann_root" / "ann.json", "the list of distillation images")["images"]
    entries = (entry for entry in images if isinstance(entry, dict))
    return {
        str(e.get("file_name")): (e["x"], e["y"])
        for e in entries
        if isinstance(e.get("x"), int) and isinstance(e.get("y"), int)
    }


def find_jobs(
    config: Config, output: Path, ranking: dict[str, Ranking] | None, failures: Failures
) -> list[PairCutJob]:
    """One job per slide that has a teacher bag; the others are entered in `failures`."""
    bags = list_bags(config.features)
    tiled = find_coordinate_files(config.coords) if config.coords else None
    pattern = tile_pattern_of((bags if tiled is None else tiled).values())
    records = choose_records(config)
    cohort = (
        locate_slides(records, config.slides, pattern)
        if records
        else find_slides(config.slides, pattern)
    )
    failures.add_all(cohort.problems)
    paths = cohort.slides
    dtypes, unreadable = set(), {}
    for slide_id in paths.keys() & bags.keys():
        try:
            dtypes.add(read_features(bags[slide_id])[0])
        except UserError as error:
            unreadable[slide_id] = str(error)
    stored = (
        config.dtype
        if config.dtype != "auto"
        else "float16"
        if dtypes == {"float16"}
        else "float32"
    )
    jobs = []
    for slide_id, path in paths.items():
        coords = None
        if tiled is not None:
            coords = tiled.get(slide_id, Path(config.coords) / f"{slide_id}.h5")
        if slide_id not in bags:
            failures.add(slide_id, f"expected a teacher bag in {config.features}, found none")
        elif slide_id in unreadable:
            failures.add(slide_id, unreadable[slide_id])
        elif coords is not None and not coords.is_file():
            failures.add(slide_id, f"{coords}: expected a coordinates file, found none")
        else:
            try:
                known = open_bag(bags[slide_id]).attributes.get("slide_fingerprint", "")
                check_fingerprint(path, str(known), "its features")
            except UserError as error:
                failures.add(slide_id, str(error))
                continue
            scores = None if ranking is None else ranking.get(slide_id, {})
            wanted = (config.tiles_per_slide, config.seed, scores, config.encoding, stored)
            part = output.with_name(f"{output.name}.parts") / f"{slide_id}.h5"
            jobs.append(
                PairCutJob(
                    slide_id, path, cohort.mpps.get(slide_id), coords, bags[slide_id], *wanted, part
                )
            )
    return jobs


def choose_records(config: Config) -> list[SlideRecord]:
    """The rows of labels.csv that take part; none without one."""
    if not config.labels:
        return []
    values = {value.strip() for value in config.subset.split(",") if value.strip()}
    records = [
        record for record in read_labels(config.labels) if not values or record.split in values
    ]
    if not records:
        raise UserError(
            f"subset={config.subset}: expected slides with it in the split column of "
            f"{config.labels}, found none"
        )
    return records


def make_part_provenance(job: PairCutJob, ranking: str) -> dict[str, Any]:
    """What decides the pairs of one slide."""
    quality = JPEG_QUALITY if job.encoding == "jpeg" else None
    settings = {
        "tiles": job.count,
        "seed": job.seed,
        "ranking": ranking,
        "encoding": job.encoding,
        "jpeg_quality": quality,
    }
    coords = sha256_file(job.coords) if job.coords else None
    settings |= {"slide_fingerprint": compute_fingerprint(job.slide)}
    return settings | {"dtype": job.dtype, "bag": open_bag(job.bag).digest(), "coords": coords}


def digest_parts(jobs: Sequence[PairCutJob], ranking: str, failures: Failures) -> dict[str, str]:
    """Slide id -> digest of what decides its pairs; slides whose bag or coordinates cannot be read
    are entered in `failures`.
    """
    found = {}
    for job in jobs:
        try:
            decided = make_part_provenance(job, ranking)
        except UserError as error:
            failures.add(job.slide_id, str(error))
            continue
        found[job.slide_id] = sha256_bytes(json.dumps(decided).encode())
    return found


def cut_pairs(job: PairCutJob, ranking: str) -> None:
    """Cut a slide unless its part is there."""
    provenance = make_part_provenance(job, ranking)
    if job.part.exists():
        with suppress(DamagedFile):  # it is cut again
            found = Pack(job.part).provenance
            if {name: found.get(name) for name in provenance} == provenance:
                return
    with explain_full_disk(job.part.parent):
        cut_slide(job, provenance)


def cut_all_pairs(
    jobs: Sequence[PairCutJob], ranking: str, config: Config, failures: Failures
) -> list[PairCutJob]:
    """The jobs whose part is there, in their order; the others are entered in `failures`."""
    done = []
    outcomes = run_jobs(
        partial(cut_pairs, ranking=ranking), jobs, config.workers, config.read_timeout
    )
    for number, result in progress(outcomes, "cutting tiles", len(jobs), "slides"):
        if isinstance(result, (Lost, Raised)):
            failures.add(jobs[number].slide_id, result.reason)
        else:
            done.append(number)
    return [jobs[number] for number in sorted(done)]


def pack_slides(config: Config, output: Path) -> int:
    """Cut, then join the slides' parts; returns 1 when slides failed."""
    failures = Failures(STAGE)
    ranking = read_ranking(config.ranking) if config.ranking else None
    digest = sha256_file(config.ranking) if config.ranking else ""
    jobs = find_jobs(config, output, ranking, failures)
    slides = digest_parts(jobs, digest, failures)
    jobs = [job for job in jobs if job.slide_id in slides]
    if not jobs:
        failures.write(output.parent)
        raise UserError(
            f"features={config.features}: expected bags of the slides, found none that fits"
        )
    settings = {
        "tiles": config.tiles_per_slide,
        "seed": config.seed,
        "ranking": digest,
        "encoding": config.encoding,
        "dtype": jobs[0].dtype,
    }
    provenance = {
        "source": "slides",
        "teacher": check_one_teacher(jobs),
        **settings,
        "slides": slides,
    }
    if is_done(output, provenance, config.overwrite) and not failures.rows:
        logger.info("%s: %s is there already", STAGE, output)
        return 0
    done = [Pack(job.part) for job in cut_all_pairs(jobs, digest, config, failures)]
    list_mismatches(done, output)
    if not done:
        failures.write(output.parent)
        raise UserError(f"{output}: no slide could be cut, see {output.parent / failures.name}")
    failed = [row["slide"] for row in failures.rows]
    join_parts(
        done,
        output,
        jobs[0].dtype,
        provenance | {"failed": failed, "software_version": __version__},
    )
    if not failed:
        shutil.rmtree(jobs[0].part.parent, ignore_errors=True)
    return failures.write(output.parent)


def join_parts(parts: Sequence[Pack], output: Path, dtype: str, provenance: dict[str, Any]) -> None:
    """One packed set of many, in their order."""
    with explain_full_disk(output.parent), PackWriter(output, dtype) as writer:
        for part in progress(parts, "joining", len(parts), "slides"):
            for row in range(len(part)):
                corner = tuple(part.coords[row].tolist())
                writer.append(
                    part.slides[row],
                    part.names[row],
                    part.picture(row),
                    part.features[row].numpy(),
                    corner,
                )
            part.close()
        writer.finish(provenance)
    describe_result(output, sum(len(part) for part in parts))


def list_mismatches(parts: Sequence[Pack], output: Path) -> None:
    """problems.csv: tiles that only the coordinates or only the bag of a slide has; those in common
    are used.
    """
    problems, report = Problems(), output.parent / "problems.csv"
    for part in parts:
        for name, kind in MISMATCHES.items():
            for x, y in part.provenance["mismatches"][name]:
                problems.add(
                    part.path.stem, f"{x}_{y}", kind, f"slide {part.path.stem}: {kind} at {x},{y}"
                )
    problems.settle(output, sum(len(part) for part in parts), report, skip_bad=True)


def describe_result(output: Path, count: int) -> None:
    """What was made."""
    logger.info(
        "%s: %d pairs in %s (%.1f MiB)", STAGE, count, output, output.stat().st_size / 2**20
    )


def main(config: Config) -> int:
    check(config)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    return pack_folder(config, output) if config.dataset else pack_slides(config, output)


if __name__ == "__main__":
    launch(main, Config)
