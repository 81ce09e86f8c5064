"""Train the lesion detector (Deformable DETR) on COCO-format boxes; its backbone is what later
stages distil from.

Source: TS2G-KD stage 1; Deformable DETR (Zhu et al., ICLR 2021). Writes a run directory and in it
`backbone.pt`, the trunk of the best epoch by validation AP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detection_kd import engine
from detection_kd.box_sets.set_report import warn_of_crowded_images
from detection_kd.datasets.augmentation_keys import DetectionSizes
from detection_kd.datasets.coco import DetectionSet, read_training_sets
from detection_kd.datasets.detection import (
    DetectionBatch,
    find_repeats,
    make_eval_loader,
    make_training_loader,
)
from detection_kd.datasets.training_field import describe_field
from detection_kd.evaluation.coco_metrics import Prediction, average_precision
from detection_kd.evaluation.froc import compute_froc
from detection_kd.evaluation.operating_point import choose_min_score
from detection_kd.models.backbone import NORMS, Trunk, build_trunk, save_backbone
from detection_kd.models.checkpoint_import import load_initial_weights
from detection_kd.models.deformable_detr import DeformableDETR, describe_detector, place_detector
from detection_kd.models.deformable_transformer import Architecture
from patch_encoder.models.encoders import digest_weights
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, group, key, to_dict
from wsi_common.device import PRECISIONS, autocast, pick_precision
from wsi_common.distributed import World, init_distributed, local_processes, mean_dict, share_batch
from wsi_common.ema import moving_average
from wsi_common.errors import UserError
from wsi_common.files import sha256_file
from wsi_common.optim import (
    add_terms,
    exchange_gradients,
    group_batches,
    make_optimizer,
    require_finite,
    set_lr,
)
from wsi_common.processes.pool import pick_workers
from wsi_common.progress import describe_values, progress
from wsi_common.run import Run, open_run
from wsi_common.schedules import SCHEDULES, drop_epoch, lr_factor
from wsi_common.seed import seed_everything
from wsi_common.shared_weights import digest_weights_file
from wsi_common.step_timer import StepTimes
from wsi_common.tracking import Tracker

logger = logging.getLogger(__name__)
REMEDY = "lower lr or set precision=fp32, and look at these images"  # of a loss that is not finite
REPORTED = (
    "loss",
    "AP",
    "AP50",
    "AR",
    "FROC",
    "train_seconds",
    "time/images_per_second",
    "time/data_share",
)


@dataclass
class Config:
    """Keys of `train_detector`; defaults are the published settings."""

    output: str = key(REQUIRED, "where the results are written; a run directory", runtime=True)
    train: str = key(REQUIRED, "COCO JSON to train on", path=True)
    val: str = key(REQUIRED, "COCO JSON to evaluate on", path=True)
    images: str = key(REQUIRED, "folder of the images that the annotations name", path=True)
    mpp: float | None = key(
        None,
        "micrometres per pixel at level 0; here of the training images, so that detection on "
        "slides can bring its tiles to the same resolution",
    )
    class_agnostic: bool = key(False, "one class 'lesion' instead of the annotated categories")
    class_map: dict[str, Any] = key(
        {},
        "categories to merge, rename or leave out; {category: class, ...}, null leaves one out, "
        "'*' is every other one",
    )
    backbone: str = key(
        "resnet50",
        "backbone of the detector; resnet18, resnet34, resnet50, resnet101, any timm model with "
        "maps of strides 8, 16 and 32 px, torchvision:<model> or transformers:<folder or repo>",
    )
    norm: str = key(
        "frozen",
        "normalisation of the trunk; frozen needs trained weights; batch: as it comes",
        choices=NORMS,
    )
    dilation: bool = key(
        False, "the trunk's last stage keeps stride 16 and dilates its convolutions (DC5)"
    )
    pretrained: bool = key(
        True,
        "start from ImageNet weights (fetched once from timm's hub; those of "
        "tf_efficientnet_lite0 come with a Python package)",
    )
    weights: str = key(
        "",
        "weights file or folder; start from the backbone in it (state dict, detector, "
        "or timm's format)",
        path=True,
    )
    detector: str = key(
        "",
        "checkpoint of a detector; start from it: ours, the official layout or Hugging Face's",
        path=True,
    )
    freeze: int = key(
        2,
        "stages of a trunk with given weights that stay as they are, of stem and strides 4, 8, "
        "16, 32",
    )
    architecture: Architecture = group(Architecture, "transformer")
    augmentation: DetectionSizes = group(DetectionSizes, "augmentation of the training images")
    repeat_threshold: float = key(
        0.0,
        "share of the images below which a class is rare; images with a rare class are met more "
        "often in an epoch (repeat factor sampling of LVIS, 0.001 there); 0: off",
    )
    epochs: int = key(50, "passes over the training set")
    patience: int = key(
        0,
        "evaluations without an AP that is as good as the best after which the training stops; "
        "0: never",
        least=0,
    )
    batch_size: int = key(32, "items per step over all processes; images")
    accumulate: int = key(
        1, "parts that a step's images are computed in, one after the other, to save memory"
    )
    lr: float = key(2e-4, "learning rate; of transformer and heads")
    lr_backbone: float = key(2e-5, "learning rate of the backbone")
    layer_decay: float = key(
        1.0,
        "factor of lr_backbone from each stage of the trunk to the one before; 1: the same for all",
    )
    slow_factor: float = key(0.1, "factor of lr for sampling offsets and reference points")
    weight_decay: float = key(1e-4, "weight decay")
    clip_norm: float = key(0.1, "largest L2 norm of the gradients of a step; 0: any")
    ema: float = key(
        0.0,
        "decay of a moving average of the weights, which is then evaluated and kept (as 0.999); "
        "0: off",
    )
    schedule: str = key(
        "step",
        "learning rate over the run: constant, one drop, or half a cosine",
        choices=SCHEDULES,
    )
    lr_drop: int = key(40, "epoch after which the learning rate drops, once; 0: half-way")
    lr_drop_factor: float = key(0.1, "factor of the learning rate from its drop on")
    warmup_steps: int = key(0, "steps of linear warm-up")
    eval_every: int = key(
        1, "epochs between evaluations; the last epoch is always evaluated", least=1
    )
    max_detections: int = key(100, "number of detections that are kept; and counted, per image")
    seed: int = key(42, "seed of everything that is drawn at random")
    precision: str = key(
        "auto",
        "number format of the computation; auto: bf16 where the device has it in "
        "hardware, else fp32; losses and boxes are always fp32",
        choices=PRECISIONS,
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    workers: int | None = key(
        None,
        "worker processes; they load images, per process; null: one per core, at most 8",
        runtime=True,
    )
    compile: bool = key(
        False, "compile the network with torch.compile; of the backbone", runtime=True
    )
    overlays: int = key(
        12,
        "number of images to draw with their boxes; of the validation set at the best "
        "epoch; 0: no figures",
        runtime=True,
    )
    log_every: int = key(50, "steps between lines in metrics.jsonl", runtime=True, least=1)
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)
    tracker: Tracker = group(Tracker, "experiment tracking")


def build_model(config: Config, classes: int = 1, trunk: Trunk | None = None) -> DeformableDETR:
    """Build the detector with random weights; on a trunk that was given as an object, which keeps
    its own.
    """
    if trunk is not None:
        return DeformableDETR(trunk, classes, config.architecture)
    if config.norm == "frozen" and not (config.pretrained or config.weights or config.detector):
        raise UserError(
            "norm=frozen: expected trained weights, found pretrained=false and no weights=; set "
            "norm=batch|group"
        )
    trunk = build_trunk(config.backbone, config.norm, config.dilation)
    return DeformableDETR(trunk, classes, config.architecture)


def build_initial_model(
    config: Config, categories: list[str], trunk: Trunk | None = None
) -> DeformableDETR:
    """Build the detector of these classes with the weights that its training starts from."""
    model = build_model(config, len(categories), trunk)
    load_initial_weights(
        model,
        categories,
        weights=config.weights,
        detector=config.detector,
        pretrained=config.pretrained,
        freeze=config.freeze,
    )
    return model


def prepare_training(
    config: Config, plain: DeformableDETR, world: World, precision: str
) -> engine.ModelInTraining:
    """Put the detector on its device, with its optimiser, moving average and gradient scaler."""
    model = place_detector(plain, world, compile=config.compile)
    average = moving_average(plain, config.ema)
    rates = (config.lr, config.lr_backbone, config.slow_factor, config.layer_decay)
    groups = engine.make_parameter_groups(plain, *rates)
    optimizer = make_optimizer("adamw", groups, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    return engine.ModelInTraining(plain, model, optimizer, average, scaler)


@dataclass
class DetectorRun:
    """What a step needs beside the model; `share` images are computed at a time."""

    config: Config
    world: World
    run: Run
    precision: str
    share: int
    train: DetectionSet
    val: DetectionSet
    repeats: np.ndarray | None


def train_one_epoch(
    job: DetectorRun, training: engine.ModelInTraining, epoch: int
) -> dict[str, float]:
    """Train on all training images once.

    Returns:
        The means of the loss and its terms over steps and processes, and where the time went.
    """
    config, world, optimizer = job.config, job.world, training.optimizer
    # the draws of dropout do not depend on earlier epochs
    seed_everything((config.seed * 100_003 + epoch) * 1_009 + world.rank)
    options = {"batch_size": config.batch_size, "share": job.share, "seed": config.seed}
    options |= {"epoch": epoch, "workers": pick_workers(config.workers, share=local_processes())}
    options |= {"repeats": job.repeats}
    batches = make_training_loader(job.train.images, config.augmentation, world, **options)
    steps = len(batches) // config.accumulate
    drop = drop_epoch(config.lr_drop, config.epochs) * steps
    rate = {"warmup": config.warmup_steps, "drop": drop, "drop_factor": config.lr_drop_factor}
    sums: dict[str, Tensor] = {}
    times = StepTimes(world.device, config.batch_size)
    training.model.train()
    groups = group_batches(batches, config.accumulate)
    shown = progress(groups, f"epoch {epoch + 1}", steps, "step", enabled=world.is_main)
    for step, parts in enumerate(shown, start=epoch * steps):
        times.mark("data")
        set_lr(optimizer, lr_factor(config.schedule, step, config.epochs * steps, **rate))
        optimizer.zero_grad(set_to_none=True)
        values = add_gradients(job, training, parts, times)
        norm = training.apply_gradients(config.clip_norm)
        training.update_average()
        sums = add_terms(sums, values)
        times.mark("step")
        if step % config.log_every == 0:
            rates = {"lr": optimizer.param_groups[0]["lr"]}
            rates |= {} if norm is None else {"gradient_norm": norm.item()}
            line = {"epoch": epoch + 1, "step": step, **rates}
            job.run.log({**line, **mean_dict(values), **times.report()})
    return {name: value / steps for name, value in mean_dict(sums).items()} | times.whole()


def add_gradients(
    job: DetectorRun,
    training: engine.ModelInTraining,
    parts: Sequence[DetectionBatch],
    times: StepTimes,
) -> dict[str, Tensor]:
    """Compute the gradients of one optimiser step, part by part.

    Returns:
        The loss and its terms, each a scalar that is detached and summed over the parts.

    Raises:
        UserError: a loss that is not finite; it names the images.
    """
    assert training.scaler is not None
    device = job.world.device
    num_boxes = engine.count_boxes(parts, device)
    values: dict[str, Tensor] = {}
    for part, batch in enumerate(parts):
        batch = batch.to(device)
        with exchange_gradients(training.model, last=part == len(parts) - 1):
            with autocast(device, job.precision):
                detections = training.model(
                    batch.images, batch.padding, (batch.labels, batch.boxes)
                )
            times.mark("forward")
            matches = engine.match_batch(detections, batch)
            times.mark("matching")
            loss, terms = engine.compute_batch_loss(detections, batch, matches, num_boxes)
            images = [job.train.images[index].id for index in batch.indices]
            require_finite(loss, f"images {images}", terms, remedy=REMEDY)
            times.mark("loss")
            training.scaler.scale(loss).backward()
            times.mark("backward")
        values = add_terms(values, {"loss": loss, **terms})
    return values


def evaluate(
    job: DetectorRun, training: engine.ModelInTraining
) -> tuple[dict[str, float], list[Prediction]]:
    """Detect on the validation images of all processes; COCO metrics and FROC, and the
    detections.
    """
    config, world, val = job.config, job.world, job.val
    options = {"share": job.share, "workers": pick_workers(config.workers, share=local_processes())}
    batches = make_eval_loader(val.images, config.augmentation, world, **options)
    shown = progress(batches, "evaluation", len(batches), "batch", enabled=world.is_main)
    limit = config.max_detections
    predictions = engine.detect(training.kept, shown, val.images, limit, job.precision)
    return average_precision(val, predictions, limit) | compute_froc(val, predictions), predictions


def is_evaluated(config: Config, epoch: int) -> bool:
    """Whether the detector is evaluated after so many epochs."""
    return epoch % config.eval_every == 0 or epoch == config.epochs


def has_stalled(config: Config, epoch: int, best: dict[str, Any]) -> bool:
    """Whether training stops after `epoch` epochs: `patience` evaluations since the best one.

    It follows from the best epoch alone, which a checkpoint keeps, so that a training that goes on
    stops where an uninterrupted one does.
    """
    since = range(best.get("epoch", 0) + 1, epoch + 1)
    return 0 < config.patience <= sum(is_evaluated(config, passed) for passed in since)


def digest_inputs(config: Config) -> dict[str, str]:
    """Compute the digests of the files that decide the result."""
    files = {
        "train": config.train,
        "val": config.val,
    }
    weights = {"weights": config.weights, "detector": config.detector}
    digests = {name: sha256_file(path) for name, path in files.items() if path}
    return digests | {name: digest_weights_file(path) for name, path in weights.items() if path}


def draw_results(job: DetectorRun, predictions: list[Prediction]) -> None:
    """Draw curves and overlays of the best epoch so far, unless `overlays` is 0."""
    from detection_kd.figures.detection import write_detection_figures  # a while to load

    config = job.config
    if config.overlays:
        shown = {"max_detections": config.max_detections, "overlays": config.overlays}
        write_detection_figures(job.run.path, job.val, predictions, **shown)


def main(config: Config, trunk: Trunk | None = None) -> int:
    """Train, evaluate, and leave checkpoints, results and the backbone in the run directory.

    Args:
        config: the keys.
        trunk: from `wrap_trunk`, in place of `backbone=`, which then counts for nothing.
    """
    world = init_distributed(config.device)
    if not world.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    precision = pick_precision(config.precision, world.device)
    files = (config.train, config.val, config.images)
    checks = {"class_agnostic": config.class_agnostic, "class_map": config.class_map}
    checks |= {"batch_size": config.batch_size}
    train, val = read_training_sets(*files, **checks)
    repeats = find_repeats(train.images, config.repeat_threshold)
    warn_of_crowded_images(train, "train", config.architecture.queries)
    warn_of_crowded_images(val, "val", min(config.architecture.queries, config.max_detections))
    field = describe_field(train.images, config.augmentation, config.mpp)
    seed_everything(config.seed)
    plain = build_initial_model(config, train.categories, trunk)
    share = share_batch(config.batch_size, world.size, config.accumulate)
    training = prepare_training(config, plain, world, precision)
    options = {"overwrite": config.overwrite, "tracker": config.tracker}
    inputs = digest_inputs(config) | ({"trunk": digest_weights(trunk)} if trunk else {})
    run = open_run(config.output, config, world, inputs=inputs, **options)
    if run.results is not None:
        logger.info("%s: finished run, AP %.3f; nothing to do", run.path, run.results["AP"])
        return 0
    job = DetectorRun(config, world, run, precision, share, train, val, repeats)
    start, best = training.resume(run.last)
    run.forget_after(start)
    for epoch in range(start, config.epochs):
        if has_stalled(config, epoch, best):
            logger.info("no better AP for %d evaluations: stopped", config.patience)
            break
        begun = time.monotonic()
        values = train_one_epoch(job, training, epoch)
        values["train_seconds"] = time.monotonic() - begun
        described = describe_detector(plain, train.categories) | {"training": to_dict(config)}
        described |= {"field": field, "precision": precision}
        state = {"config": described, "epoch": epoch + 1}
        if is_evaluated(config, epoch + 1):
            metrics, predictions = evaluate(job, training)
            values |= metrics
            if metrics["AP"] >= best.get("AP", 0.0):
                best = {"epoch": epoch + 1, **metrics}
                if world.is_main:
                    described["operating_point"] = choose_min_score(val, predictions)
                    training.save_best(run.best, best=best, **state)
                    draw_results(job, predictions)
        if world.is_main:
            training.save_last(run.last, best=best, **state)
        run.log({"epoch": epoch + 1, **values})
        logger.info("epoch %d: %s", epoch + 1, describe_values(values, REPORTED, digits=3))
    if world.is_main:
        save_backbone(run.best, run.path / "backbone.pt")
    run.finish(best)
    return 0


if __name__ == "__main__":
    launch(main, Config)
