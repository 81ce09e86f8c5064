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

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from common.checkpoint import load_checkpoint, resume, save_checkpoint
from common.cli import launch
from common.config import REQUIRED, group, key, to_dict
from common.device import PRECISIONS, autocast, pick_precision
from common.distributed import World, init_distributed, mean_dict, wrap
from common.ema import moving_average
from common.errors import UserError
from common.files import sha256_file
from common.optim import (
    add_terms,
    clip_gradients,
    exchange_gradients,
    group_batches,
    make_optimizer,
    require_finite,
    set_lr,
)
from common.progress import progress
from common.run import Run, Tracker, open_run
from common.schedules import SCHEDULES, drop_epoch, lr_factor
from common.seed import seed_everything
from common.step_timer import StepTimes
from detection_kd import engine
from detection_kd.datasets.coco import DetectionSet, read_coco, same_categories
from detection_kd.datasets.detection import DetectionDataset, draw_epoch_indices, make_loader
from detection_kd.evaluation.coco_metrics import Prediction, average_precision
from detection_kd.evaluation.froc import compute_froc
from detection_kd.models.backbone import (
    HUB,
    NORMS,
    STAGES,
    Backbone,
    build_pretrained,
    read_trunk_weights,
)
from detection_kd.models.checkpoint_import import load_published
from detection_kd.models.deformable_detr import DeformableDETR, describe_detector
from detection_kd.models.deformable_transformer import Architecture

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
class Augmentation:
    """Sizes of the published augmentation."""

    sizes: list[int] = key(list(range(480, 801, 32)), "short sides to choose from, px")
    max_size: int = key(1333, "most px of the long side")
    crop_sizes: list[int] = key(
        [400, 500, 600], "short sides before a random crop, px; [] never crops"
    )
    crop_range: list[int] = key([384, 600], "smallest and largest side of a crop, px")
    symmetry: bool = key(False, "also flip upside down and rotate by 90 degrees")
    eval_size: int = key(800, "short side in evaluation, px")
    pad_to: int = key(
        0, "pad batches to at least this side, px; 0: to the largest image of the batch"
    )


@dataclass
class Config:
    """Keys of `train_detector`; defaults are the published settings."""

    output: str = key(REQUIRED, "where the results are written; a run directory", runtime=True)
    train: str = key(REQUIRED, "COCO JSON to train on", path=True)
    val: str = key(REQUIRED, "COCO JSON to evaluate on", path=True)
    images: str = key(REQUIRED, "folder of the images that the annotations name", path=True)
    class_agnostic: bool = key(False, "one class 'lesion' instead of the annotated categories")
    backbone: str = key(
        "resnet50",
        "backbone of the detector; resnet18, resnet34, resnet50, resnet101, or any timm "
        "model with maps of strides 8, 16 and 32 px",
    )
    norm: str = key(
        "frozen",
        "normalisation of the trunk; frozen needs trained weights; batch: as it comes",
        choices=NORMS,
    )
    dilation: bool = key(
        False, "the trunk's last stage keeps stride 16 and dilates its convolutions (DC5)"
    )
    pretrained: bool = key(True, "start from ImageNet weights (fetched once from timm's hub)")
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
    augmentation: Augmentation = group(Augmentation, "augmentation of the training images")
    epochs: int = key(50, "passes over the training set")
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
    eval_every: int = key(1, "epochs between evaluations; the last epoch is always evaluated")
    max_detections: int = key(100, "number of detections that are kept; and counted, per image")
    seed: int = key(42, "seed of everything that is drawn at random")
    precision: str = key(
        "auto",
        "number format of the computation; auto: bf16 where the device has it in "
        "hardware, else fp32; losses and boxes are always fp32",
        choices=PRECISIONS,
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    workers: int = key(2, "worker processes; they load images, per process", runtime=True)
    compile: bool = key(
        False, "compile the network with torch.compile; of the backbone", runtime=True
    )
    overlays: int = key(
        12,
        "number of images to draw with their boxes; of the validation set at the best "
        "epoch; 0: no figures",
        runtime=True,
    )
    log_every: int = key(50, "steps between lines in metrics.jsonl", runtime=True)
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)
    tracker: Tracker = group(Tracker, "experiment tracking")


def build_model(config: Config, classes: int = 1) -> DeformableDETR:
    """The detector with random weights."""
    if config.norm == "frozen" and not (config.pretrained or config.weights or config.detector):
        raise UserError(
            "norm=frozen: expected trained weights, found pretrained=false and no weights=; set "
            "norm=batch|group"
        )
    return DeformableDETR(
        Backbone(config.backbone, config.norm, config.dilation), classes, config.architecture
    )


def load_initial_weights(model: DeformableDETR, config: Config, categories: list[str]) -> None:
    """Weights of the files that are given, else ImageNet's, else none; given weights keep their
    first stages.
    """
    if not 0 <= config.freeze <= STAGES:
        raise UserError(f"freeze={config.freeze}: expected 0 to {STAGES} stages")
    if config.weights and config.detector:
        raise UserError("weights= and detector= are both given: expected one of them")
    if config.weights or (config.pretrained and not config.detector):
        trunk = build_pretrained(
            config.backbone, config.norm, config.dilation, config.weights or HUB
        )
        model.backbone.load_state_dict(trunk.state_dict())
    if config.detector:
        fresh = load_published(model, config.detector, categories)
        logger.info(
            "%s: weights taken%s", config.detector, f" but for {', '.join(fresh)}" if fresh else ""
        )
    if config.weights or config.pretrained or config.detector:
        model.backbone.freeze(config.freeze)


def read_sets(config: Config) -> tuple[DetectionSet, DetectionSet]:
    """Training and validation annotations, checked."""
    train, val = (
        read_coco(path, config.images, class_agnostic=config.class_agnostic)
        for path in (config.train, config.val)
    )
    same_categories(train, val)
    if len(train.images) < config.batch_size:
        raise UserError(
            f"batch_size={config.batch_size}: expected at most the {len(train.images)} training "
            "images"
        )
    return train, val


def place_model(model: DeformableDETR, config: Config, world: World) -> nn.Module:
    """The model on its device, ready for one or many processes."""
    if config.accumulate < 1 or config.batch_size % (world.size * config.accumulate):
        raise UserError(
            f"batch_size={config.batch_size}: expected a multiple of the {world.size} processes"
            + f" times accumulate={config.accumulate}" * (config.accumulate != 1)
        )
    model = model.to(world.device)
    model.backbone.to(memory_format=torch.channels_last)
    if config.compile:
        model.backbone.compile()
    if world.size > 1 and config.norm == "batch":
        if world.device.type != "cuda":
            raise UserError(
                f"norm=batch: expected CUDA with {world.size} processes, found "
                f"{world.device.type}; set norm=group"
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(
            model
        )  # in place: the detector itself is no batch norm
    return wrap(model, world)


@dataclass
class DetectorRun:
    """One process's view of the run."""

    config: Config
    world: World
    run: Run
    precision: str
    average: AveragedModel | None


def train_one_epoch(
    job: DetectorRun,
    model: nn.Module,
    train: DetectionSet,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    epoch: int,
) -> dict[str, float]:
    """One pass over the training images; returns the means of the loss and its terms, and where the
    time went.
    """
    config, world = job.config, job.world
    seed_everything(
        (config.seed * 100_003 + epoch) * 1_009 + world.rank
    )  # dropout does not depend on earlier epochs
    batches = make_training_batches(config, world, train, epoch)
    steps = len(batches) // config.accumulate
    rate = {
        "warmup": config.warmup_steps,
        "drop": drop_epoch(config.lr_drop, config.epochs) * steps,
        "drop_factor": config.lr_drop_factor,
    }
    sums: dict[str, Tensor] = {}
    times = StepTimes(world.device, config.batch_size)
    model.train()
    shown = progress(
        group_batches(batches, config.accumulate),
        f"epoch {epoch + 1}",
        steps,
        "step",
        enabled=world.is_main,
    )
    for number, parts in enumerate(shown):
        times.mark("data")
        step = epoch * steps + number
        set_lr(optimizer, lr_factor(config.schedule, step, config.epochs * steps, **rate))
        optimizer.zero_grad(set_to_none=True)
        num_boxes = engine.count_boxes(parts, world.device)
        values: dict[str, Tensor] = {}
        for part, batch in enumerate(parts):
            batch = batch.to(world.device)
            with exchange_gradients(model, last=part == len(parts) - 1):
                with autocast(world.device, job.precision):
                    detections = model(batch.images, batch.padding, (batch.labels, batch.boxes))
                times.mark("forward")
                matches = engine.match_batch(detections, batch)
                times.mark("matching")
                loss, terms = engine.compute_batch_loss(detections, batch, matches, num_boxes)
                images = [train.images[index].id for index in batch.indices]
                require_finite(loss, f"images {images}", terms, remedy=REMEDY)
                times.mark("loss")
                scaler.scale(loss).backward()
                times.mark("backward")
            values = add_terms(values, {"loss": loss, **terms})
        scaler.unscale_(optimizer)
        norm = clip_gradients(model, config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        if job.average is not None:
            job.average.update_parameters(getattr(model, "module", model))
        sums = add_terms(sums, values)
        times.mark("step")
        if step % config.log_every == 0:
            rates = {"lr": optimizer.param_groups[0]["lr"]}
            rates |= {} if norm is None else {"gradient_norm": norm.item()}
            job.run.log(
                {"epoch": epoch + 1, "step": step, **rates, **mean_dict(values), **times.report()}
            )
    return {name: value / steps for name, value in mean_dict(sums).items()} | times.whole()


def make_training_batches(
    config: Config, world: World, train: DetectionSet, epoch: int
) -> DataLoader[Any]:
    """This process's batches of one epoch."""
    from detection_kd.datasets.transforms import make_train_transform  # a while to load

    sizes = config.augmentation
    low, high = sizes.crop_range
    transform = make_train_transform(
        sizes.sizes,
        sizes.max_size,
        crop_sizes=sizes.crop_sizes,
        crop_range=(low, high),
        symmetry=sizes.symmetry,
    )
    dataset = DetectionDataset(train.images, transform, config.seed, epoch)
    indices = draw_epoch_indices(
        len(dataset), config.batch_size, config.seed, epoch, world.rank, world.size
    )
    return _loader(config, world, dataset, indices)


def _loader(
    config: Config, world: World, dataset: DetectionDataset, indices: Sequence[int]
) -> DataLoader[Any]:
    return make_loader(
        dataset,
        indices,
        config.batch_size // (world.size * config.accumulate),
        workers=config.workers,
        pad_to=config.augmentation.pad_to,
        pin=world.device.type == "cuda",
    )


def evaluate(
    job: DetectorRun, model: nn.Module, val: DetectionSet
) -> tuple[dict[str, float], list[Prediction]]:
    """COCO metrics and FROC on the validation images of all processes, and the detections."""
    from detection_kd.datasets.transforms import make_eval_transform  # a while to load

    config, world, sizes = job.config, job.world, job.config.augmentation
    dataset = DetectionDataset(val.images, make_eval_transform(sizes.eval_size, sizes.max_size))
    indices = range(len(dataset))[world.rank :: world.size]
    batches = _loader(config, world, dataset, indices)
    shown = progress(batches, "evaluation", len(batches), "batch", enabled=world.is_main)
    predictions = engine.detect(model, shown, val.images, config.max_detections, job.precision)
    return average_precision(val, predictions, config.max_detections) | compute_froc(
        val, predictions
    ), predictions


def make_fingerprints(config: Config) -> dict[str, str]:
    """Digests of the files that decide the result."""
    files = {
        "train": config.train,
        "val": config.val,
        "weights": config.weights,
        "detector": config.detector,
    }
    return {name: sha256_file(path) for name, path in files.items() if path}


def draw_results(
    run: Run, val: DetectionSet, predictions: list[Prediction], config: Config
) -> None:
    """Curves and overlays of the best epoch so far."""
    from detection_kd.figures.detection import write_detection_figures  # a while to load

    if config.overlays:
        shown = {"max_detections": config.max_detections, "overlays": config.overlays}
        write_detection_figures(run.path, val, predictions, **shown)


def save_backbone(run: Run) -> None:
    """Leave the trunk of the best epoch beside the checkpoints, for the next stage."""
    content = load_checkpoint(run.best)
    weights = read_trunk_weights(content)
    save_checkpoint(
        run.path / "backbone.pt",
        model=weights,
        config=content["config"]["backbone"],
        epoch=content["epoch"],
    )


def main(config: Config) -> int:
    """Train, evaluate, and leave checkpoints, results and the backbone in the run directory."""
    world = init_distributed(config.device)
    if not world.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    precision = pick_precision(config.precision, world.device)
    train, val = read_sets(config)
    seed_everything(config.seed)
    plain = build_model(config, len(train.categories))
    load_initial_weights(plain, config, train.categories)
    model = place_model(plain, config, world)
    inputs = make_fingerprints(config)
    run = open_run(
        config.output,
        config,
        world,
        inputs=inputs,
        overwrite=config.overwrite,
        tracker=config.tracker,
    )
    if run.results is not None:
        logger.info("%s: finished run, AP %.3f; nothing to do", run.path, run.results["AP"])
        return 0
    average = moving_average(plain, config.ema)
    shown = plain if average is None else average.module  # what is evaluated and kept
    job = DetectorRun(config, world, run, precision, average)
    groups = engine.make_parameter_groups(
        plain, config.lr, config.lr_backbone, config.slow_factor, config.layer_decay
    )
    optimizer = make_optimizer("adamw", groups, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    averages = {} if average is None else {"average": average}
    start, best = resume(run.last, plain, optimizer=optimizer, scaler=scaler, **averages)
    run.forget_after(start)
    for epoch in range(start, config.epochs):
        begun = time.monotonic()
        values = train_one_epoch(job, model, train, optimizer, scaler, epoch) | {
            "train_seconds": time.monotonic() - begun
        }
        state = {
            "config": describe_detector(plain, train.categories) | {"training": to_dict(config)},
            "epoch": epoch + 1,
        }
        if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            metrics, predictions = evaluate(job, shown, val)
            values |= metrics
            if metrics["AP"] >= best.get("AP", 0.0):
                best = {"epoch": epoch + 1, **metrics}
                if world.is_main:
                    save_checkpoint(run.best, model=shown.state_dict(), best=best, **state)
                    draw_results(run, val, predictions, config)
        if world.is_main:
            resumed = {"optimizer": optimizer, "scaler": scaler, **averages}
            parts = {name: part.state_dict() for name, part in resumed.items()}
            save_checkpoint(run.last, model=plain.state_dict(), best=best, **parts, **state)
        run.log({"epoch": epoch + 1, **values})
        logger.info(
            "epoch %d: %s",
            epoch + 1,
            ", ".join(f"{name} {values[name]:.3f}" for name in REPORTED if name in values),
        )
    if world.is_main:
        save_backbone(run)
    run.finish(best)
    return 0


if __name__ == "__main__":
    launch(main, Config)
