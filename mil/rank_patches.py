"""Choose the tiles that a student learns from: the riskiest of every training slide, with their
teacher feature.

    python -m mil.rank_patches labels=cohort/labels.csv features=runs/features/teacher
    slides=cohort/slides \\
        output=runs/distillation subset=pretrain

Source: TS2G-KD, distillation set: a Mean-MIL on teacher features scores each tile by its class-1
logit, the top K = 50 tiles of a slide are kept. Differences: scores are stored in ann.json, the
ranker is selected on a patient-level validation share of the training slides, `extra_random` can
add tiles that nobody finds risky, and tiles are cut from any slide (a tile folder's own JPEGs are
copied as they are).

Writes `wsi_root/<slide>/<patch>.jpg` + `.pt` (teacher feature, (D,) float32), `ann_root/ann.json`
(COCO), `distillation.json` (provenance) and `ranker/` (the run of the Mean-MIL). Finished slides
are skipped.
"""

from __future__ import annotations

import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mil.datasets.bags import digest_bags, digest_each, find_bags, select_usable_bags
from mil.datasets.distillation_set import (
    JPEG_QUALITY,
    Patch,
    PatchCutJob,
    choose_patches,
    claim_root,
    cut_patches,
    is_done,
    write_annotations,
)
from mil.datasets.labels import LabelledSlides
from mil.datasets.splits import Split, carve_validation, list_split_values
from mil.models import MeanMIL, Standardised
from mil.tasks.keys import LabelKeys
from mil.tasks.slide_targets import SlideTargets
from mil.tasks.table import read_targets
from mil.training.engine import load_trained_model
from mil.training.fold_run import FoldJob, FoldSettings, open_job, run_job
from mil.training.keys import ClassifierKeys
from patch_encoder.bags.bag import open_bag, read_bag
from patch_encoder.cohort.failures import Failures
from patch_encoder.cohort.slide_files import locate_slides
from patch_encoder.slides.names import check_fingerprint
from patch_encoder.tiles.coordinates import tile_pattern_of
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.device import pick_device
from wsi_common.distributed import World, require_one_process
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes
from wsi_common.processes.pool import Lost, Raised, check_workers, run_jobs
from wsi_common.progress import progress

logger = logging.getLogger(__name__)
STAGE = "rank_patches"


@dataclass
class Config(ClassifierKeys, LabelKeys):
    """Keys of the ranking stage."""

    labels: str = key(
        REQUIRED, "labels.csv of the cohort; case_id,slide_id,label (and split, mpp)", path=True
    )
    features: str = key(REQUIRED, "folder of feature bags; of the teacher", path=True)
    slides: str = key(REQUIRED, "slide file, or folder tree of slides", path=True)
    output: str = key(REQUIRED, "where the results are written; the distillation set", runtime=True)
    top_k: int = key(
        50, "number of highest scores that are taken per slide; into the distillation set"
    )
    extra_random: int = key(0, "further tiles of each slide, drawn at random from the rest")
    seed: int = key(2024, "seed of everything that is drawn at random")
    dropout: float = key(0.25, "probability of dropping a hidden unit; of the ranker")
    standardize: bool = key(
        False, "standardise the features with mean and std of the training slides; of the ranker"
    )
    val_fraction: float = key(
        0.2,
        "share of the training patients (or slides) that is held out for validation; of the ranker",
    )
    workers: int = key(1, "worker processes; one slide each", runtime=True)


@torch.inference_mode()
def select_patches(
    model: MeanMIL | Standardised, bag: Path, config: Config, device: torch.device
) -> tuple[Patch, ...]:
    """Score a slide's tiles and choose among them.

    Raises:
        UserError: the bag has no coordinates, so that no tile can be cut.
    """
    content = read_bag(bag)
    if content.coords is None:
        raise UserError(
            f"{bag}: expected coords (N, 2) beside the features, found none; extract the slide "
            "again"
        )
    scores = model.score_tiles(content.read().to(device)).cpu().numpy()
    seed = (config.seed, zlib.crc32(bag.stem.encode()))
    rows = choose_patches(scores, config.top_k, config.extra_random, seed).tolist()
    return tuple(
        Patch(row, *content.coords[row].tolist(), float(scores[row]), rank < config.top_k)
        for rank, row in enumerate(rows)
    )


def train_ranker(
    config: Config,
    slides: LabelledSlides,
    targets: SlideTargets,
    files: dict[str, Path],
    world: World,
) -> Path:
    """Train (or find finished) the Mean-MIL on all slides but a validation share; returns its best
    checkpoint.
    """
    train, val = carve_validation(slides, config.val_fraction, config.seed)
    decided = (config.dropout, config.standardize, config.seed, config.training)
    data = (slides, targets, Split(0, train, val, ()), tuple(files.items()), digest_each(files))
    job = FoldJob(Path(config.output) / "ranker", FoldSettings("mean", *decided), *data)
    run = open_job(job, world, overwrite=config.overwrite)
    if run.results is None:
        results = run_job(job, run, world)
        line = "%s: ranker: best epoch %d, validation AUC %.3f"
        logger.info(line, STAGE, results["best_epoch"], results["val_auc"])
    return run.best


def describe_provenance(
    config: Config, files: dict[str, Path], content: dict[str, Any]
) -> dict[str, Any]:
    """What decides the distillation set: teacher bags, ranker weights, and the numbers of tiles."""
    weights = sha256_bytes(*(tensor.numpy().tobytes() for tensor in content["model"].values()))
    found = {"teacher": digest_bags(files), "ranker": weights, "jpeg_quality": JPEG_QUALITY}
    return found | {name: getattr(config, name) for name in ("top_k", "extra_random", "seed")}


def make_cuts(
    config: Config,
    slides: LabelledSlides,
    files: dict[str, Path],
    model: MeanMIL | Standardised,
    failures: Failures,
) -> list[PatchCutJob]:
    """Score and choose the tiles of every slide; slides whose bag cannot be used are entered in
    `failures`.
    """
    device = pick_device(config.device)
    cohort = locate_slides(slides.records, config.slides, tile_pattern_of(files.values()))
    failures.add_all(cohort.problems)
    jobs = []
    for record in slides.records:
        name, bag = record.slide_id, files[record.slide_id]
        if name in cohort.problems:
            continue
        try:
            stored = str(open_bag(bag).attributes.get("slide_fingerprint", ""))
            check_fingerprint(cohort.slides[name], stored, "its features")
            patches = select_patches(model, bag, config, device)
        except UserError as error:
            failures.add(name, str(error))
            continue
        folder = Path(config.output) / "wsi_root" / name
        jobs.append(PatchCutJob(name, cohort.slides[name], record.mpp, bag, folder, patches))
    return jobs


def main(config: Config) -> int:
    if config.top_k < 1 or config.extra_random < 0:
        raise UserError(
            f"top_k={config.top_k}, extra_random={config.extra_random}: expected at least 1 and "
            "at least 0"
        )
    check_workers(config.workers, least=1)
    require_one_process("rank_patches", "with workers=N")
    world = World(0, 1, pick_device(config.device))
    torch.set_num_threads(config.threads)
    root = Path(config.output)
    subset = list_split_values(config.subset)
    slides, targets = read_targets(config.labels, "classes", subset, config.positive)
    files = find_bags(config.features, slides.slide_ids, skip_missing=config.skip_missing)
    files = select_usable_bags(files) if config.skip_bad else files
    slides = slides.only(files)
    ranker = train_ranker(config, slides, targets, files, world)
    model, content = load_trained_model(ranker, world.device)
    assert isinstance(model, MeanMIL | Standardised)
    provenance = describe_provenance(config, files, content)
    claim_root(root, provenance, config.overwrite)
    failures = Failures(STAGE)
    jobs = make_cuts(config, slides, files, model, failures)
    todo = [job for job in jobs if not is_done(job)]
    logger.info("%s: %d slides, %d already done", STAGE, len(jobs), len(jobs) - len(todo))
    outcomes = run_jobs(cut_patches, todo, config.workers, fresh=True, threads=config.threads)
    for number, result in progress(outcomes, "cutting tiles", len(todo), "slides"):
        if isinstance(result, (Lost, Raised)):
            failures.add(todo[number].slide_id, result.reason)
    images, cut_slides = write_annotations(root, jobs, provenance)
    logger.info("%s: %d tiles of %d slides in %s", STAGE, images, cut_slides, root)
    return failures.write(root)


if __name__ == "__main__":
    launch(main, Config)
