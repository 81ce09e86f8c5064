"""Train a network that grades patches at a resolution of its own, alone or after a teacher that
sees them at full resolution (AT+).

    python -m detection_kd.train_resolution_kd --config configs/at_plus/demo.yaml output=teacher
    python -m detection_kd.train_resolution_kd --config configs/at_plus/demo.yaml ratio=4
        teacher_checkpoint=teacher/checkpoint_best.pt terms.kd=1 terms.at_plus=10 output=student
    torchrun --nproc_per_node=4 -m detection_kd.train_resolution_kd --config ... output=...

Teacher (ratio 1), baseline (no term) and every kind of distillation are this one loop. Source:
"Attention to Detail: Inter-Resolution Knowledge Distillation" (EUSIPCO 2023; code
cvblab/kd_resolution). Differences: by default the student is as small as its image, the teacher
keeps nothing for a backward pass, the epoch is chosen by the quadratic kappa of validation patches
whatever its size, and test patches are predicted once, at the end. Writes predictions.csv of them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detection_kd.engine import ModelInTraining, start_training
from detection_kd.graded_patches.graded_set import UNGRADED
from detection_kd.graded_patches.keys import GradedSetKeys, read_graded_split
from detection_kd.graded_patches.patch_augmentation import PatchAugmentationKeys, augment_patches
from detection_kd.graded_patches.patch_loader import PatchBatch, make_patch_loader
from detection_kd.graded_patches.patch_pixels import PatchPixels
from detection_kd.graded_patches.resolution import reduce_resolution
from detection_kd.grading.grade_predictions import (
    measure_predictions,
    predict_grades,
    write_predictions,
)
from detection_kd.grading.teacher_maps import TeacherMaps, check_kept_maps
from detection_kd.losses.resolution_losses import (
    LAST,
    GradingOutput,
    PairedOutputs,
    ResolutionTerms,
    resolution_loss,
)
from detection_kd.models.low_resolution import (
    GradingKeys,
    GradingNetwork,
    PatchScale,
    check_teacher,
    load_grading_network,
)
from wsi_common.cli import launch
from wsi_common.config import group, key, to_dict
from wsi_common.device import autocast, pick_precision
from wsi_common.distributed import World, init_distributed, local_processes, mean_dict, share_batch
from wsi_common.errors import UserError
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
REMEDY = "lower lr or set precision=fp32, and look at these patches"  # of a loss not finite
REPORTED = ("loss", "accuracy", "balanced_accuracy", "kappa_quadratic", "train_seconds")


@dataclass
class Config(TrainingRunKeys):
    """Keys of `train_resolution_kd`."""

    data: GradedSetKeys = group(GradedSetKeys, "the annotated data; graded patches")
    split_seed: int = key(0, "seed of the folds; of the split by case where the data has none")
    tile_size: int = key(512, "side of a tile, px; of a patch at full resolution", least=16)
    target_mpp: float | None = key(
        None,
        "micrometres per pixel of the tiles; of pictures at tile_size, which grade_slide needs to "
        "know; patches of slides have data.mpp",
    )
    ratio: int = key(
        1, "pixels at full resolution per pixel that the network sees; along a side", least=1
    )
    network: GradingKeys = group(GradingKeys, "student and teacher; a network that grades")
    teacher_checkpoint: str = key(
        "",
        "checkpoint of the teacher; made by this script, at a ratio of at most the student's",
        path=True,
    )
    terms: ResolutionTerms = group(ResolutionTerms, "what is learned from the teacher")
    cache_teacher: bool = key(
        False,
        "keep the teacher's maps of all training patches in memory; needs an augmentation of flips "
        "and quarter turns alone",
    )
    augmentation: PatchAugmentationKeys = group(
        PatchAugmentationKeys, "augmentation of the training images; patches"
    )
    epochs: int = key(20, "passes over the training set", least=1)
    batch_size: int = key(32, "items per step over all processes; patches", least=1)
    workers: int | None = key(
        None,
        "worker processes; they read patches that do not fit into memory; null: one per core, at "
        "most 8",
        runtime=True,
    )


@dataclass
class ResolutionRun:
    """What a step needs.

    Attributes:
        network: what is trained.
        teacher: frozen; None: there is none.
        weights: of the terms that are on.
        described: what later stages need to know about the network, for its checkpoint.
        kept_maps: the teacher's, where they are computed once.
    """

    config: Config
    world: World
    run: Run
    precision: str
    network: GradingNetwork
    teacher: GradingNetwork | None
    train: PatchPixels
    val: PatchPixels
    test: PatchPixels
    weights: dict[str, float]
    described: dict[str, Any]
    kept_maps: TeacherMaps | None = None

    @property
    def workers(self) -> int:
        """Worker processes of this process."""
        return pick_workers(self.config.workers, share=local_processes())

    @property
    def level(self) -> int:
        """The level whose maps are compared beside the last one."""
        return self.config.terms.level if self.config.terms.needs_inner() else LAST


def train_one_epoch(job: ResolutionRun, training: ModelInTraining, epoch: int) -> dict[str, float]:
    """Train on every patch at least once, on all grades equally often, and on ungraded ones once.

    Returns:
        The means of the loss and its terms over steps and processes, and where the time went.
    """
    config, world, optimizer = job.config, job.world, training.optimizer
    # what a trunk draws does not depend on earlier epochs
    seed_everything((config.seed * 100_003 + epoch) * 1_009 + world.rank)
    labels = job.train.patches.labels
    order = balance_epoch(labels, config.seed, epoch, config.batch_size, once=UNGRADED)
    graded_share = float((labels[order] != UNGRADED).mean())
    options = {"workers": job.workers, "seed": config.seed, "epoch": epoch}
    batches = make_patch_loader(job.train, order, config.batch_size, world, **options)
    steps = len(order) // config.batch_size
    drop = drop_epoch(0, config.epochs) * steps
    sums: dict[str, Tensor] = {}
    times = StepTimes(world.device, config.batch_size)
    training.model.train()
    shown = progress(batches, f"epoch {epoch + 1}", steps, "step", enabled=world.is_main)
    for step, batch in enumerate(shown, start=epoch * steps):
        times.mark("data")
        batch = batch.to(world.device)
        view = augment_patches(batch.pixels, batch.draws, config.augmentation)
        times.mark("augmentation")
        teacher = ask_teacher(job, view, batch)
        times.mark("teacher")
        rate = {"warmup": config.warmup_steps, "drop": drop}
        set_lr(optimizer, lr_factor(config.schedule, step, config.epochs * steps, **rate))
        optimizer.zero_grad(set_to_none=True)
        terms = compute_terms(job, training, view, batch.labels, teacher, graded_share)
        names = job.train.patches.select(batch.draws.samples[:4]).names
        require_finite(terms["loss"], f"patches {names}...", terms, remedy=REMEDY)
        norm = training.take_step(terms["loss"], config.clip_norm)
        sums = add_terms(sums, terms)
        times.mark("step")
        if step % config.log_every == 0:
            line = {"epoch": epoch + 1, "step": step, **training.describe_step(norm, terms)}
            job.run.log({**line, **times.report()})
    return {name: value / steps for name, value in mean_dict(sums).items()} | times.whole()


def ask_teacher(job: ResolutionRun, view: Tensor, batch: PatchBatch) -> GradingOutput | None:
    """What the teacher says of the views (B, 3, S, S); nothing is kept for a backward pass."""
    if job.teacher is None:
        return None
    if job.kept_maps is not None:
        return job.kept_maps.read(batch.draws, job.config.augmentation)
    pixels = reduce_resolution(view, job.teacher.scale.ratio)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(job.level != LAST), autocast(job.world.device, job.precision):
        return job.teacher(pixels, job.level)


def compute_terms(
    job: ResolutionRun,
    training: ModelInTraining,
    view: Tensor,
    labels: Tensor,
    teacher: GradingOutput | None,
    graded_share: float,
) -> dict[str, Tensor]:
    """The loss of a batch and the terms that add up to it, each a scalar; `loss` has a gradient."""
    pixels = reduce_resolution(view, job.config.ratio)
    with autocast(job.world.device, job.precision):
        student = training.model(pixels.contiguous(memory_format=torch.channels_last), job.level)
    pair = None
    if teacher is not None:
        heads = (training.plain.head, job.teacher.head)  # type: ignore[union-attr]
        pair = PairedOutputs(student, teacher, *heads, job.config.terms)
    loss, terms = resolution_loss(student.logits, labels, job.weights, pair, graded_share)
    return {"loss": loss} | {f"loss_{name}": term.detach() for name, term in terms.items()}


def predict(job: ResolutionRun, network: GradingNetwork, pixels: PatchPixels) -> np.ndarray:
    """Probabilities (N, C) of a whole set."""
    options = {"batch_size": job.config.batch_size, "precision": job.precision}
    return predict_grades(
        network, pixels, job.world, **options, workers=job.workers, label="predictions"
    )


def end_epoch(
    job: ResolutionRun,
    training: ModelInTraining,
    epoch: int,
    values: dict[str, float],
    best: dict[str, Any],
) -> dict[str, Any]:
    """Evaluate, save and log after `epoch` epochs; all processes call this.

    Returns:
        Number and metrics of the best epoch so far, by quadratic kappa, then balanced accuracy.
    """
    config = job.config
    if epoch % config.eval_every == 0 or epoch == config.epochs:
        found = measure_predictions(job.val.patches, predict(job, training.kept, job.val))
        values |= found
        if not best or rank_epoch(found) > rank_epoch(best):
            best = {"epoch": epoch, **found}
            if job.world.is_main:
                training.save_best(job.run.best, config=job.described, epoch=epoch, best=best)
    if job.world.is_main:
        training.save_last(job.run.last, config=job.described, epoch=epoch, best=best)
    job.run.log({"epoch": epoch, **values})
    logger.info("epoch %d: %s", epoch, describe_values(values, REPORTED, digits=3))
    return best


def rank_epoch(values: dict[str, Any]) -> tuple[float, float]:
    """What an epoch is chosen by; a kappa that is not a number counts as the worst."""
    ranks = [values["kappa_quadratic"], values["balanced_accuracy"]]
    return tuple(np.nan_to_num(ranks, nan=-1.0).tolist())


def build_networks(
    config: Config, grades: tuple[str, ...], device: torch.device
) -> tuple[GradingNetwork, GradingNetwork | None]:
    """The network to be trained, and the frozen teacher where there is one.

    Raises:
        UserError: a network that cannot be had, or a teacher that cannot teach it.
    """
    seed_everything(config.seed)  # arms of one seed start from the same weights
    scale = PatchScale(config.tile_size, config.ratio, config.data.mpp or config.target_mpp)
    network = GradingNetwork(config.network, grades, scale)
    if not config.teacher_checkpoint:
        return network, None
    teacher = load_grading_network(config.teacher_checkpoint).freeze()
    check_teacher(network, teacher, config.terms)
    return network, teacher.to(device)


def check_settings(config: Config) -> dict[str, float]:
    """Refuse settings that do not go together; the weights of the terms that are on."""
    config.augmentation.check()
    weights = config.terms.weights()
    if bool(weights) != bool(config.teacher_checkpoint):
        raise UserError(
            f"teacher_checkpoint={config.teacher_checkpoint or 'none'}: expected a teacher where a "
            f"term has a weight, and none elsewhere, found {', '.join(weights) or 'no term'}; set "
            "teacher_checkpoint= and terms.kd= or another term"
        )
    if config.data.ungraded and not weights:
        raise UserError(
            f"data.ungraded={config.data.ungraded}: expected a teacher that grades these patches, "
            "found none; set teacher_checkpoint= and terms.kd= or another term"
        )
    if config.cache_teacher:
        check_kept_maps(config.augmentation, config.terms.needs_inner())
    mpps = {mpp for mpp in (config.data.mpp, config.target_mpp) if mpp is not None}
    if len(mpps) > 1:
        raise UserError(
            f"target_mpp={config.target_mpp}: expected data.mpp={config.data.mpp}, at which they "
            "are cut from slides; leave target_mpp out"
        )
    return weights


def open_job(config: Config, world: World) -> ResolutionRun:
    """Read the patches and the teacher, and open the run directory."""
    share_batch(config.batch_size, world.size)
    weights = check_settings(config)
    precision = pick_precision(config.precision, world.device)
    split = read_graded_split(config.data, config.split_seed)
    network, teacher = build_networks(config, split.train.grades, world.device)
    sides = {name: PatchPixels(side, config.tile_size) for name, side in split.sides()}
    inputs = {name: pixels.digest() for name, pixels in sides.items()}
    if config.teacher_checkpoint:
        inputs["teacher"] = digest_weights_file(config.teacher_checkpoint)
    if Path(config.network.init).is_file():
        inputs["init"] = digest_weights_file(config.network.init)
    options = {"overwrite": config.overwrite, "tracker": config.tracker}
    run = open_run(config.output, config, world, inputs=inputs, **options)
    described = network.describe() | {"terms": weights, "inputs": inputs}
    described |= {"precision": precision, "training": to_dict(config)}
    return ResolutionRun(
        config, world, run, precision, network, teacher, **sides, weights=weights,
        described=described,
    )  # fmt: skip


def prepare_training(job: ResolutionRun) -> ModelInTraining:
    """The network on its device, with its optimiser and gradient scaler."""
    config = job.config
    options = {"compile": config.compile, "lr": config.lr, "weight_decay": config.weight_decay}
    return start_training(
        job.network, job.world, job.precision, trunk=config.network.trunk, **options
    )


def finish(job: ResolutionRun, training: ModelInTraining, best: dict[str, Any]) -> None:
    """Predict the test patches with the best epoch, and write predictions.csv and results.json."""
    training.load_best(job.run.best)
    probabilities = predict(job, training.kept, job.test)
    results = {
        "seed": job.config.seed,
        "fold": job.config.data.fold,
        "val": best,
        "test": measure_predictions(job.test.patches, probabilities),
    }
    if job.world.is_main:
        write_predictions(job.run.path / "predictions.csv", job.test.patches, probabilities)
    logger.info("test: %s", describe_values(results["test"], REPORTED, digits=3))
    job.run.finish(results)


def main(config: Config) -> int:
    """Train, and leave checkpoints, metrics, predictions and results in the run directory."""
    world = init_distributed(config.device)
    if not world.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    job = open_job(config, world)
    if job.run.results is not None:
        accuracy = job.run.results["test"]["accuracy"]  # kappa need not be a number
        logger.info("%s: finished run, accuracy %.3f; nothing to do", job.run.path, accuracy)
        return 0
    training = prepare_training(job)
    start, best = training.resume(job.run.last)
    job.run.forget_after(start)
    if config.cache_teacher and job.teacher is not None and start < config.epochs:
        options = (job.world, config.batch_size, job.precision)
        job.kept_maps = TeacherMaps(job.teacher, job.train, *options)
    for epoch in range(start, config.epochs):
        begun = time.monotonic()
        values = train_one_epoch(job, training, epoch)
        values["train_seconds"] = time.monotonic() - begun
        best = end_epoch(job, training, epoch + 1, values, best)
    finish(job, training, best)
    return 0


if __name__ == "__main__":
    launch(main, Config)
