"""D2VFM: train an adapter so that a frozen detector backbone reproduces a foundation model's
features.

    python -m detection_kd.train_d2vfm --config configs/quickstart/d2vfm.yaml dataset=...
        backbone=... output=...
    torchrun --nproc_per_node=4 -m detection_kd.train_d2vfm
        --config configs/ts2gkd/d2vfm_gigapath.yaml ...

Writes a run directory with `r2_by_dimension.csv` and, with `figures`, student against teacher,
learning curves and R2 by dimension. Its `checkpoint_best.pt` (best cosine similarity on held-out
slides) is the student that `extract_student` takes. Pooling and adapter are trained; the backbone
stays as it is, but for the last stages with `unfreeze`, and its BatchNorm in any case. With `cache`
the backbone runs once, for this run and for all that differ in what comes after it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from common.checkpoint import load_checkpoint, load_weights, resume, save_checkpoint
from common.cli import launch
from common.config import REQUIRED, group, key, to_dict
from common.device import PRECISIONS, autocast, pick_precision
from common.distributed import World, gather_rows, init_distributed, mean_dict, wrap
from common.ema import moving_average
from common.errors import UserError
from common.files import sha256_file
from common.optim import add_terms, clip_gradients, require_finite, set_lr
from common.progress import progress
from common.run import Tracker, open_run
from common.schedules import drop_epoch, lr_factor
from common.seed import epoch_generator, seed_everything, seed_worker
from detection_kd.datasets.augmentation_keys import AugmentationKeys
from detection_kd.datasets.distillation import (
    DistillationTiles,
    Pair,
    digest_pairs,
    read_pairs,
    split_by_slide,
)
from detection_kd.datasets.feature_cache import (
    DTYPES,
    CachedMaps,
    CacheKey,
    cache_maps,
    join_batch,
)
from detection_kd.evaluation.feature_agreement import measure_agreement
from detection_kd.figures.student_report import write_report
from detection_kd.losses.distillation_loss import DistillationLoss, ExtraTerms, distillation_loss
from detection_kd.losses.feature_regression import FEATURE_LOSSES
from detection_kd.models.adapter import ADAPTERS
from detection_kd.models.backbone import load_backbone
from detection_kd.models.online_teacher import OnlineTeacher, read_online_teacher
from detection_kd.models.pooling import POOLINGS
from detection_kd.models.student import FrozenMaps, Student, StudentHead, describe_student
from patch_encoder.cohort.labels import read_labels
from patch_encoder.models.encoder_table import IMAGENET
from patch_encoder.models.encoders import PixelEncoder

logger = logging.getLogger(__name__)
REPORTED = ("loss", "cosine", "r2", "knn_10")


@dataclass
class Config:
    """Keys of the D2VFM stage; the defaults are the published ones."""

    dataset: str = key(
        REQUIRED,
        "distillation set: a folder with wsi_root/ and ann_root/, or a packed .h5 file",
        path=True,
    )
    backbone: str = key(
        REQUIRED,
        "backbone of the detector; backbone.pt of train_detector, or a whole detector checkpoint",
        path=True,
    )
    output: str = key(REQUIRED, "where the results are written; a run directory", runtime=True)
    teacher: str = key("", "name of the teacher encoder; kept in the checkpoint")
    input_scale: float = key(
        1.0, "resize tiles by this factor first, to the resolution that the detector was trained at"
    )
    stages: list[int] = key(
        [1],
        "backbone stages that are pooled and concatenated: 0, 1, 2 = layer2, layer3, layer4",
        alias="needle",
    )
    pooling: str = key(
        "mean", "how maps are pooled; gem and attention have parameters", choices=POOLINGS
    )
    adapter: str = key("mpa", "adapter", choices=ADAPTERS)
    unfreeze: int = key(
        0,
        "train the last so many of the stages that are used, normalisation layers excepted; "
        "published: 0",
    )
    unfreeze_lr: float = key(0.01, "with unfreeze: factor of lr for those stages")
    loss: str = key("mse", "feature loss", choices=tuple(FEATURE_LOSSES))
    loss_weight: float = key(2.0, "factor on the loss; 0: extra terms only")
    extra: ExtraTerms = group(ExtraTerms, "weights of further terms")
    epochs: int = key(4, "passes over the training set")
    lr_drop: int = key(2, "epoch after which the learning rate drops, once; 0: half-way")
    lr_drop_factor: float = key(0.1, "factor of the learning rate from its drop on")
    batch_size: int = key(40, "items per step over all processes; tiles")
    lr: float = key(2e-3, "learning rate; of AdamW")
    weight_decay: float = key(1e-4, "weight decay")
    clip_norm: float = key(0.1, "largest L2 norm of the gradients of a step; 0: any")
    ema: float = key(
        0.0,
        "decay of a moving average of the weights, which is then evaluated and kept (as 0.999); "
        "0: off",
    )
    augment: bool = key(
        True, "flip and turn tiles; the teacher's feature stays that of the tile as it was"
    )
    scales: list[float] = key(
        [1.0], "a step's tiles are resized by one of these factors, drawn at random"
    )
    augmentation: AugmentationKeys = group(AugmentationKeys, "augmentation of the training images")
    online_teacher: str = key(
        "", "encoder that is run on the augmented tiles; empty: the stored features of plain tiles"
    )
    teacher_weights: str = key("", "its local weights file or folder; empty: from its hub")
    teacher_crop: bool = key(True, "its centre crop, as `crop` of extract_features")
    verify: bool = key(
        False, "decode every picture first, instead of reading its header only", runtime=True
    )
    skip_bad: bool = key(
        False,
        "leave out what cannot be used instead of stopping; here: pairs with problems",
        runtime=True,
    )
    cache: bool = key(
        False,
        "compute the frozen backbone's features once and train the adapter on them; needs "
        "augment=false",
    )
    views: int = key(1, "with cache: quarter turns of every training tile that are cached, 1 to 4")
    cache_dir: str = key(
        "",
        "folder of the cached features, shared by runs; empty: d2vfm_cache beside the run",
        runtime=True,
    )
    cache_dtype: str = key("float32", "numbers in the cache", choices=DTYPES)
    val_fraction: float = key(
        0.1, "share of the training patients (or slides) that is held out for validation"
    )
    labels: str = key(
        "",
        "labels.csv of the cohort; colours of student_vs_teacher.png; empty: by slide",
        path=True,
    )
    figures: bool = key(True, "draw figures", runtime=True)
    seed: int = key(42, "seed of everything that is drawn at random")
    precision: str = key(
        "auto",
        "number format of the computation; auto: bf16 where the device has it in "
        "hardware, else fp32",
        choices=PRECISIONS,
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    workers: int = key(2, "worker processes; they decode tiles", runtime=True)
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)
    tracker: Tracker = group(Tracker, "experiment tracking")


def build_model(config: Config, dim: int) -> tuple[Student, dict[str, Any]]:
    """The student for a teacher of width `dim`, and what a checkpoint needs to rebuild it."""
    stages = config.stages
    if not set(stages) <= {0, 1, 2} or stages != sorted(set(stages)):
        raise UserError(
            f"stages={config.stages}: expected 0, 1 or 2 (layer2, layer3, layer4), ascending"
        )
    if not 0 < config.input_scale <= 4:
        raise UserError(f"input_scale={config.input_scale}: expected a factor above 0, at most 4")
    if not 0 <= config.unfreeze <= max(stages) + 3 or config.unfreeze_lr <= 0:
        raise UserError(
            f"unfreeze={config.unfreeze} unfreeze_lr={config.unfreeze_lr:g}: expected 0 to "
            f"{max(stages) + 3} stages "
            "(the last that is used, the one before, ..., the stem) and a factor above 0"
        )
    if config.unfreeze and config.cache:
        raise UserError(
            "cache=true unfreeze>0: expected one of them, since features of a stage that is "
            "trained change"
        )
    backbone, _ = load_backbone(config.backbone)
    student = Student(
        backbone, stages, config.adapter, dim, config.input_scale, config.pooling, config.unfreeze
    )
    return student, describe_student(student, config.teacher)


def make_parameter_groups(student: Student, lr: float, unfreeze_lr: float) -> list[dict[str, Any]]:
    """Pooling and adapter at `lr`, stages that are trained at `unfreeze_lr` times that."""
    groups: list[dict[str, Any]] = [
        {"params": [*student.pooling.parameters(), *student.adapter.parameters()], "lr": lr}
    ]
    stages = [parameter for parameter in student.backbone.parameters() if parameter.requires_grad]
    return [*groups, {"params": stages, "lr": lr * unfreeze_lr}] if stages else groups


def build_network(student: Student, config: Config, world: World) -> nn.Module:
    """What takes the items of the sets: the whole student, or what comes behind the cached
    features.
    """
    module = StudentHead(student) if config.cache else PixelEncoder(student, IMAGENET)
    return module.to(world.device, memory_format=torch.channels_last)


@dataclass
class DistillationRun:
    """What a step needs beside model and data."""

    config: Config
    world: World
    precision: str
    loss: DistillationLoss
    student: Student
    average: AveragedModel | None
    online: OnlineTeacher | None


def train_one_epoch(
    job: DistillationRun,
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    epoch: int,
) -> dict[str, float]:
    """One pass over the training pairs; mean loss, and its terms when there are several, over steps
    and processes.
    """
    config, world = job.config, job.world
    drop = drop_epoch(config.lr_drop, config.epochs)
    rate = {"drop": drop, "drop_factor": config.lr_drop_factor}
    set_lr(optimizer, lr_factor("step", epoch, config.epochs, **rate))
    model.train()
    sums: dict[str, Tensor] = {}
    for step, (inputs, teacher) in enumerate(
        progress(loader, f"epoch {epoch + 1}", len(loader), "steps", enabled=world.is_main)
    ):
        if job.online is not None:
            teacher = job.online(teacher)
        inputs = move_to_device(inputs, world.device)
        if isinstance(inputs, Tensor):
            inputs = rescale(
                inputs, config.scales, config.augmentation.sizes, config.seed, epoch, step
            )
        with autocast(world.device, job.precision):
            features = model(inputs)
        loss, terms = job.loss(
            features.float(), teacher.to(world.device, non_blocking=True), gather_rows
        )
        require_finite(loss, f"epoch {epoch + 1} step {step + 1}", terms)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(model, config.clip_norm)
        optimizer.step()
        if job.average is not None:
            job.average.update_parameters(job.student)
        parts = {f"loss_{name}": value for name, value in terms.items()} if len(terms) > 1 else {}
        sums = add_terms(sums, {"loss": loss, **parts})
    return mean_dict({name: value / max(1, len(loader)) for name, value in sums.items()})


def move_to_device(inputs: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """Tiles, or a list of cached maps, moved."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    return [x.to(device, non_blocking=True) for x in inputs]


def rescale(
    tiles: Tensor, scales: list[float], sizes: list[int], seed: int, epoch: int, step: int
) -> Tensor:
    """uint8 (B, 3, H, W) resized by a factor or to a short side by (seed, epoch, step), the same on
    every process.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 1_000_003 + step)
    choices = [side / min(tiles.shape[-2:]) for side in sizes] or scales
    scale = choices[int(torch.randint(len(choices), (1,), generator=generator))]
    if scale == 1.0:
        return tiles
    size = [max(32, round(side * scale)) for side in tiles.shape[-2:]]
    resized = nn.functional.interpolate(tiles.float(), size=size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def predict(
    model: nn.Module, loader: DataLoader, precision: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features (N, D) of the student and of the teacher on held-out slides, in the order of the
    set.
    """
    model.eval()
    students, teachers = [], []
    for inputs, teacher in loader:
        with autocast(device, precision):
            students.append(model(move_to_device(inputs, device)).float())
        teachers.append(teacher.to(device))
    return torch.cat(students), torch.cat(teachers)


def make_sets(
    config: Config,
    student: Student,
    pairs: list[Pair],
    world: World,
    inputs: dict[str, str],
    online: OnlineTeacher | None = None,
) -> tuple[Dataset, Dataset]:
    """Training and validation set: tiles, or what the frozen backbone makes of them when
    `cache`.
    """
    train_pairs, val_pairs = split_by_slide(pairs, config.val_fraction, config.seed)
    options = {
        "augmentation": config.augmentation.of_tiles(),
        "teacher_view": online.transform if online else None,
    }
    train = DistillationTiles(train_pairs, augment=config.augment, seed=config.seed, **options)
    val = DistillationTiles(val_pairs, augment=False, seed=config.seed)
    if not config.cache:
        return train, val
    if not 1 <= config.views <= 4:
        raise UserError(f"views={config.views}: expected 1 to 4 quarter turns")
    turned = [
        DistillationTiles(pairs, augment=False, seed=config.seed, turns=turns)
        for turns in range(config.views)
    ]
    return cache_sets(config, student, pairs, turned, (train_pairs, val_pairs), world, inputs)


def cache_sets(
    config: Config,
    student: Student,
    pairs: list[Pair],
    turned: Sequence[Dataset],
    parts: tuple[list[Pair], list[Pair]],
    world: World,
    inputs: dict[str, str],
) -> tuple[CachedMaps, CachedMaps]:
    """Training pairs in all turns and validation pairs as they are, of features that all runs on
    this set share.
    """
    precision = pick_precision(config.precision, world.device)
    pooled = student.pooling.kind == "mean"
    name = CacheKey(
        inputs["backbone"],
        inputs["dataset"],
        config.input_scale,
        pooled,
        precision,
        config.cache_dtype,
    )
    folder = Path(config.cache_dir or Path(config.output).absolute().parent / "d2vfm_cache")
    frozen = FrozenMaps(student).to(world.device, memory_format=torch.channels_last).eval()
    turns = cache_maps(folder, name, frozen, student.stages, turned, world, config.workers)
    place = {id(pair): row for row, pair in enumerate(pairs)}
    teacher = torch.stack([pair.feature for pair in pairs])
    train_rows, val_rows = ([place[id(pair)] for pair in part] for part in parts)
    return CachedMaps(turns, teacher, train_rows), CachedMaps(turns[:1], teacher, val_rows)


def make_loaders(
    config: Config, world: World, train: Dataset, val: Dataset
) -> tuple[DataLoader, DataLoader]:
    """Training loader (sharded over processes) and validation loader (whole, on every process)."""
    if config.batch_size % world.size:
        raise UserError(
            f"batch_size={config.batch_size}: expected a multiple of the {world.size} processes"
        )
    count = len(train)  # type: ignore[arg-type]
    sampler = DistributedSampler(train, world.size, world.rank, shuffle=True, seed=config.seed)
    batch = config.batch_size // world.size
    options: dict[str, Any] = {
        "pin_memory": world.device.type == "cuda",
        "worker_init_fn": seed_worker,
    }
    options |= (
        {"num_workers": 0, "collate_fn": join_batch}
        if config.cache
        else {"num_workers": config.workers}
    )
    train_loader = DataLoader(
        train, batch, sampler=sampler, drop_last=count >= config.batch_size, **options
    )
    return train_loader, DataLoader(val, batch, **options)


def main(config: Config) -> None:
    world = init_distributed(config.device)
    config.augmentation.check(config.augment, config.scales, config.cache, config.online_teacher)
    labels = (
        {record.slide_id: record.label for record in read_labels(config.labels)}
        if config.labels
        else {}
    )
    loss = distillation_loss(config.loss, config.loss_weight, config.extra)
    report = Path(config.output) / "problems.csv" if world.is_main else None
    checks = {"verify": config.verify, "skip_bad": config.skip_bad}
    pairs = read_pairs(config.dataset, report=report, show=world.is_main, **checks)
    seed_everything(config.seed)
    student, rebuild = build_model(config, dim=len(pairs[0].feature))
    inputs = {"dataset": digest_pairs(pairs), "backbone": sha256_file(config.backbone)}
    wanted = config.online_teacher, config.teacher_weights, config.teacher_crop
    online = read_online_teacher(
        *wanted, pairs, world.device, pick_precision(config.precision, world.device)
    )
    inputs |= {"online_teacher": online.digest} if online else {}
    run = open_run(
        config.output,
        config,
        world,
        inputs=inputs,
        overwrite=config.overwrite,
        tracker=config.tracker,
    )
    if run.results is not None:
        logger.info("train_d2vfm: %s is finished: %s", run.path, run.results)
        return
    train, val = make_sets(config, student, pairs, world, inputs, online)
    model = wrap(build_network(student, config, world), world)
    average = moving_average(student, config.ema)
    shown = student if average is None else average.module  # what is evaluated and kept
    evaluated = build_network(shown, config, world)
    optimizer = torch.optim.AdamW(
        make_parameter_groups(student, config.lr, config.unfreeze_lr),
        weight_decay=config.weight_decay,
    )
    train_loader, val_loader = make_loaders(config, world, train, val)
    precision = pick_precision(config.precision, world.device)
    job = DistillationRun(config, world, precision, loss, student, average, online)
    resumed: dict[str, Any] = {"optimizer": optimizer}
    resumed |= {} if average is None else {"average": average}
    start, best = resume(run.last, student, **resumed)
    run.forget_after(start)
    for epoch in range(start, config.epochs):
        train_loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        if isinstance(train, DistillationTiles):
            train.epoch = epoch
        train_loader.generator = epoch_generator(config.seed, epoch)
        losses = train_one_epoch(job, model, train_loader, optimizer, epoch)
        metrics = {
            **losses,
            **measure_agreement(*predict(evaluated, val_loader, precision, world.device)),
        }
        improved = metrics["cosine"] > best.get("cosine", -2.0)
        best = {"epoch": epoch + 1, **metrics} if improved else best
        if world.is_main:
            state = {
                "config": to_dict(config) | {"student": rebuild},
                "epoch": epoch + 1,
                "best": best,
            }
            if improved:
                save_checkpoint(run.best, model=shown.state_dict(), **state)
            parts = {name: part.state_dict() for name, part in resumed.items()}
            save_checkpoint(run.last, model=student.state_dict(), **state, **parts)
        run.log({"epoch": epoch + 1, **metrics, "lr": optimizer.param_groups[0]["lr"]})
        reported = ", ".join(f"{name} {metrics[name]:.4f}" for name in REPORTED if name in metrics)
        logger.info("epoch %d/%d: %s", epoch + 1, config.epochs, reported)
    if world.is_main:
        load_weights(shown, load_checkpoint(run.best)["model"], str(run.best))
        slides = [
            pair.slide_id for pair in split_by_slide(pairs, config.val_fraction, config.seed)[1]
        ]
        write_report(
            run.path,
            *predict(evaluated, val_loader, precision, world.device),
            slides,
            labels,
            config.figures,
        )
    trained = sum(
        parameter.numel() for parameter in student.parameters() if parameter.requires_grad
    )
    run.finish(best | {"trained_parameters": trained})
    logger.info("train_d2vfm: finished, best epoch %s", best)


if __name__ == "__main__":
    launch(main, Config)
