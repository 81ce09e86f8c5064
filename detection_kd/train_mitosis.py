"""Train the mitosis localiser of UTS: a network that learns only which tiles hold a mitosis, and
shows where.

    python -m detection_kd.train_mitosis --config configs/uts/demo.yaml data.annotations=... ...
    torchrun --nproc_per_node=4 -m detection_kd.train_mitosis --config configs/uts/midog21.yaml ...

Teacher and student are both trained here: the student gets `kept=`, the table of `filter_samples`.
Source: UTS (uninformed teacher-student; cvblab/Mitosis-UTS). Differences: an epoch loses no
positive, the epoch and its threshold are chosen on whole, unfiltered validation fields by
one-to-one F1 of positions, thresholds are kept exactly, and test fields are never read.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from detection_kd.engine import ModelInTraining, start_training
from detection_kd.evaluation.kept_tiles import describe_tiles, read_kept
from detection_kd.evaluation.point_metrics import choose_threshold, compute_rates, count_fields
from detection_kd.evaluation.tile_predictions import (
    find_common_mpp,
    find_field_detections,
    measure_bags,
    predict_tiles,
)
from detection_kd.fields.augmentation import PointAugmentationKeys, augment_tiles
from detection_kd.fields.field_tiles import FieldTiles
from detection_kd.fields.stain import (
    FieldStain,
    FieldStainKeys,
    build_field_stain,
    normalise_tiles,
)
from detection_kd.fields.tile_loader import FieldBatch, make_tile_loader
from detection_kd.fields.training_tiles import leave_out_cases, require_both_classes
from detection_kd.losses.location import LocationKeys, compute_location_loss
from detection_kd.mitosis_sets.keys import MitosisSetKeys
from detection_kd.mitosis_sets.splits import read_sides
from detection_kd.models.cam import LocaliserKeys, WeakLocaliser
from wsi_common.cli import launch
from wsi_common.config import group, key, to_dict
from wsi_common.device import autocast, pick_precision
from wsi_common.distributed import (
    World,
    init_distributed,
    local_processes,
    mean_dict,
    mean_number,
    share_batch,
)
from wsi_common.files import sha256_bytes, sha256_file
from wsi_common.optim import add_terms, require_finite, set_lr
from wsi_common.processes.pool import pick_workers
from wsi_common.progress import describe_values, progress
from wsi_common.recipe_keys import TrainingRunKeys
from wsi_common.run import Run, open_run
from wsi_common.sampling import balance_epoch
from wsi_common.schedules import drop_epoch, lr_factor
from wsi_common.seed import seed_everything
from wsi_common.shared_weights import digest_weights_file
from wsi_common.step_timer import StepTimes

logger = logging.getLogger(__name__)
REMEDY = "lower lr or set precision=fp32, and look at these tiles"  # of a loss that is not finite
REPORTED = ("loss", "bag_auc", "bag_f1", "f1", "precision", "recall", "train_seconds")


@dataclass
class Config(TrainingRunKeys, FieldStainKeys):
    """Keys of `train_mitosis`; the defaults are the published ones, for 40x."""

    data: MitosisSetKeys = group(MitosisSetKeys, "the annotated data; fields")
    split_seed: int = key(0, "seed of the folds; of the split by case where the data has none")
    leave_out: str = key(
        "", "part of the training cases to leave out, as 1/3; for scores of tiles not trained on"
    )
    kept: str = key(
        "", "table of filter_samples; train on what it kept, which makes a student", path=True
    )
    tile_size: int = key(500, "side of a tile, px; at target_mpp", least=16)
    target_mpp: float | None = key(
        None, "micrometres per pixel of the tiles; null: level 0 as it is"
    )
    overlap: float = key(0.0, "share of its side that a tile has in common with its neighbour")
    network: LocaliserKeys = group(LocaliserKeys, "student and teacher; trunk, map and pooling")
    location: LocationKeys = group(LocationKeys, "optional term that uses positions")
    augmentation: PointAugmentationKeys = group(
        PointAugmentationKeys, "augmentation of the training images; of tiles"
    )
    epochs: int = key(10, "passes over the training set", least=1)
    batch_size: int = key(32, "items per step over all processes; tiles", least=1)
    workers: int | None = key(
        None,
        "worker processes; they read tiles, per process; null: one per core, at most 8",
        runtime=True,
    )


@dataclass
class MitosisRun:
    """What a step needs beside the network.

    Attributes:
        described: what later stages need to know about the network, for its checkpoint.
    """

    config: Config
    world: World
    run: Run
    precision: str
    train: FieldTiles
    val: FieldTiles
    described: dict[str, Any] = field(default_factory=dict)

    @property
    def workers(self) -> int:
        """Worker processes of this process."""
        return pick_workers(self.config.workers, share=local_processes())


def train_one_epoch(job: MitosisRun, training: ModelInTraining, epoch: int) -> dict[str, float]:
    """Train on every tile at least once, on both classes equally often.

    Returns:
        The means of the loss and its terms over steps and processes, and where the time went.
    """
    config, world, optimizer = job.config, job.world, training.optimizer
    # what a trunk draws does not depend on earlier epochs
    seed_everything((config.seed * 100_003 + epoch) * 1_009 + world.rank)
    order = balance_epoch(job.train.labels, config.seed, epoch, config.batch_size)
    options = {"workers": job.workers, "seed": config.seed, "epoch": epoch}
    batches = make_tile_loader(job.train, order, config.batch_size, world, **options)
    steps = len(order) // config.batch_size
    drop = drop_epoch(0, config.epochs) * steps
    sums: dict[str, Tensor] = {}
    times = StepTimes(world.device, config.batch_size)
    training.model.train()
    shown = progress(batches, f"epoch {epoch + 1}", steps, "step", enabled=world.is_main)
    for step, batch in enumerate(shown, start=epoch * steps):
        times.mark("data")
        batch = augment_tiles(batch.to(world.device), config.augmentation, config.seed, epoch)
        times.mark("augmentation")
        rate = {"warmup": config.warmup_steps, "drop": drop}
        set_lr(optimizer, lr_factor(config.schedule, step, config.epochs * steps, **rate))
        optimizer.zero_grad(set_to_none=True)
        terms = compute_terms(job, training, batch)
        names = [job.train.sample_ids[sample] for sample in batch.samples[:4].tolist()]
        require_finite(terms["loss"], f"tiles {names}...", terms, remedy=REMEDY)
        norm = training.take_step(terms["loss"], config.clip_norm)
        sums = add_terms(sums, terms)
        times.mark("step")
        if step % config.log_every == 0:
            line = {"epoch": epoch + 1, "step": step, **training.describe_step(norm, terms)}
            job.run.log({**line, **times.report()})
    return {name: value / steps for name, value in mean_dict(sums).items()} | times.whole()


def compute_terms(
    job: MitosisRun, training: ModelInTraining, batch: FieldBatch
) -> dict[str, Tensor]:
    """The loss of a batch and its parts, each a scalar; `loss` has a gradient.

    Every tile counts by its weight; the location term is the mean over positive tiles.
    """
    keys, world = job.config.location, job.world
    pixels = (batch.pixels.float() / 255).contiguous(memory_format=torch.channels_last)
    with autocast(world.device, job.precision):
        maps, bags = training.model(pixels)
    labels = batch.labels.to(bags.dtype)
    bag = binary_cross_entropy_with_logits(bags, labels, weight=batch.weights)
    with torch.no_grad():
        accuracy = ((bags > 0) == (batch.labels == 1)).float().mean()
    terms = {"loss": bag, "bag_loss": bag.detach(), "bag_accuracy": accuracy}
    terms["redrawn"] = torch.tensor(float(batch.redrawn), device=world.device)
    if keys.kind == "none":
        return terms
    empty = torch.zeros(1, 2)
    centres = torch.cat([p.mean(0, True) if len(p) else empty for p in batch.points])
    placed = torch.tensor([len(points) > 0 for points in batch.points])
    positive = placed.to(world.device) & (batch.labels == 1)
    options = {"kind": keys.kind, "temperature": keys.temperature}
    options |= {"margin": keys.margin, "barrier": keys.barrier}
    cells = training.kept.find_cells(batch.pixels.shape[-1])
    found = compute_location_loss(maps, centres.to(world.device), positive, cells, **options)
    count = mean_number(float(positive.sum()), world.device)
    location = found.sum() / max(count, 1 / world.size)
    return {**terms, "loss": bag + keys.weight * location, "location_loss": location.detach()}


def evaluate(job: MitosisRun, training: ModelInTraining) -> dict[str, float]:
    """Measure on the validation fields: tiles told apart, positions found one to one, and the
    thresholds that are best for both.
    """
    options = {"batch_size": job.config.batch_size, "precision": job.precision}
    options |= {"workers": job.workers, "label": "validation"}
    predictions = predict_tiles(training.kept, job.val, job.world, **options)
    fields = find_field_detections(job.val, predictions)
    threshold = choose_threshold(fields).threshold
    rates = compute_rates(count_fields(fields, threshold).sum(0))
    bags = measure_bags(predictions.scores, job.val.labels)
    return bags | {name: float(value) for name, value in rates.items()} | {"threshold": threshold}


def end_epoch(
    job: MitosisRun,
    training: ModelInTraining,
    epoch: int,
    values: dict[str, float],
    best: dict[str, Any],
) -> dict[str, Any]:
    """Evaluate, save and log after `epoch` epochs; all processes call this.

    Returns:
        Number and metrics of the best epoch so far, by F1 of positions and then by AUC of tiles.
    """
    config = job.config
    state = {"config": job.described, "epoch": epoch}
    if epoch % config.eval_every == 0 or epoch == config.epochs:
        found = evaluate(job, training)
        values |= found
        if not best or rank_epoch(found) > rank_epoch(best):
            best = {"epoch": epoch, **found}
            thresholds = {name: found[name] for name in ("threshold", "bag_threshold")}
            if job.world.is_main:
                kept = {"config": {**job.described, **thresholds}, "epoch": epoch, "best": best}
                training.save_best(job.run.best, **kept)
    if job.world.is_main:
        training.save_last(job.run.last, best=best, **state)
    job.run.log({"epoch": epoch, **values})
    logger.info("epoch %d: %s", epoch, describe_values(values, REPORTED, digits=3))
    return best


def rank_epoch(values: dict[str, Any]) -> tuple[float, float]:
    """What an epoch is chosen by; not a number counts as 0."""
    return tuple(np.nan_to_num([values["f1"], values["bag_auc"]]).tolist())


def read_tiles(
    config: Config, stain: FieldStain | None
) -> tuple[FieldTiles, FieldTiles, list[str], dict[str, str]]:
    """Training and validation tiles; images of test fields are not even opened.

    Returns:
        Both, the cases that were left out of training, and digests of what decides the result.
    """
    train_fields, val_fields = read_sides(config.data, config.split_seed, ("train", "val"))
    train_fields, left_out = leave_out_cases(train_fields, config.leave_out, config.split_seed)
    geometry = (config.tile_size, config.target_mpp, config.overlap)
    train, val = (FieldTiles(fields, *geometry) for fields in (train_fields, val_fields))
    inputs = {"train": describe_tiles(train)["digest"], "val": describe_tiles(val)["digest"]}
    if config.kept:
        inputs["kept"] = sha256_file(config.kept)
        train = read_kept(Path(config.kept), train)
    if Path(config.network.init).is_file():
        inputs["init"] = digest_weights_file(config.network.init)
    require_both_classes(train, "train")
    require_both_classes(val, "val")
    return normalise_tiles(train, stain), normalise_tiles(val, stain), left_out, inputs


def open_job(config: Config, world: World) -> MitosisRun:
    """Read the fields and open the run directory."""
    share_batch(config.batch_size, world.size)
    config.network.check()
    config.augmentation.check()
    precision, stain = pick_precision(config.precision, world.device), build_field_stain(config)
    train, val, left_out, inputs = read_tiles(config, stain)
    if stain is not None:
        inputs["stain"] = sha256_bytes(json.dumps(stain.describe()).encode())
    options = {"overwrite": config.overwrite, "tracker": config.tracker}
    run = open_run(config.output, config, world, inputs=inputs, **options)
    described = {"side": config.tile_size, "mpp": find_common_mpp(train), "precision": precision}
    described |= {"target_mpp": config.target_mpp, "overlap": config.overlap}
    described |= {"stain": stain.describe() if stain else None}
    described |= {"left_out": left_out, "training": to_dict(config)}
    return MitosisRun(config, world, run, precision, train, val, described)


def prepare_training(job: MitosisRun) -> ModelInTraining:
    """The network on its device, with its optimiser and gradient scaler."""
    config = job.config
    plain = WeakLocaliser(config.network)
    job.described = plain.describe() | job.described
    options = {"compile": config.compile, "lr": config.lr, "weight_decay": config.weight_decay}
    return start_training(plain, job.world, job.precision, trunk=config.network.trunk, **options)


def main(config: Config) -> int:
    """Train, and leave checkpoints, metrics and results in the run directory."""
    world = init_distributed(config.device)
    if not world.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    job = open_job(config, world)
    if job.run.results is not None:
        logger.info("%s: finished run, F1 %.3f; nothing to do", job.run.path, job.run.results["f1"])
        return 0
    seed_everything(config.seed)
    training = prepare_training(job)
    start, best = training.resume(job.run.last)
    job.run.forget_after(start)
    for epoch in range(start, config.epochs):
        begun = time.monotonic()
        values = train_one_epoch(job, training, epoch)
        values["train_seconds"] = time.monotonic() - begun
        best = end_epoch(job, training, epoch + 1, values, best)
    if not best["f1"]:
        logger.warning(
            "%s: no epoch found a mitosis of the validation fields; the best one by bag_auc is "
            "kept; train longer, or raise lr",
            job.run.path,
        )
    job.run.finish(best)
    return 0


if __name__ == "__main__":
    launch(main, Config)
