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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detection_kd import engine
from detection_kd.datasets.augmentation_keys import AugmentationKeys
from detection_kd.datasets.distillation import Pair, digest_pairs, read_pairs, split_by_patient
from detection_kd.datasets.feature_cache import DTYPES, CacheKey
from detection_kd.datasets.student_sets import (
    make_cached_sets,
    make_loaders,
    make_tile_sets,
    start_epoch,
)
from detection_kd.datasets.tile_augmentation import rescale
from detection_kd.evaluation.feature_agreement import measure_agreement
from detection_kd.figures.student_report import write_report
from detection_kd.losses.distillation_loss import DistillationLoss, ExtraTerms, distillation_loss
from detection_kd.losses.feature_losses import FEATURE_LOSSES
from detection_kd.models.adapter import ADAPTERS
from detection_kd.models.backbone import load_backbone
from detection_kd.models.online_teacher import OnlineTeacher, read_online_teacher
from detection_kd.models.pooling import POOLINGS
from detection_kd.models.student import (
    FrozenMaps,
    Student,
    build_student_network,
    check_student_keys,
    describe_student,
    group_student_parameters,
)
from patch_encoder.cohort.labels import read_labels
from patch_encoder.models.encoder_table import ALIASES
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, group, key, to_dict
from wsi_common.device import PRECISIONS, autocast, pick_precision
from wsi_common.distributed import (
    World,
    gather_rows,
    init_distributed,
    local_processes,
    mean_dict,
    share_batch,
    wrap,
)
from wsi_common.ema import moving_average
from wsi_common.errors import UserError
from wsi_common.files import sha256_file
from wsi_common.optim import add_terms, clip_gradients, require_finite, set_lr, trainable
from wsi_common.processes.pool import pick_workers
from wsi_common.progress import describe_values, progress
from wsi_common.run import open_run
from wsi_common.schedules import drop_epoch, lr_factor
from wsi_common.seed import seed_everything
from wsi_common.shared_weights import digest_weights_file
from wsi_common.tracking import Tracker

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
    teacher: str = key(
        "", "name of the teacher encoder; kept in the checkpoint; empty: what a packed set says"
    )
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
    cached_turns: int = key(
        1, "with cache: quarter turns of every training tile that are cached, 1 to 4"
    )
    cache_dir: str = key(
        "",
        "folder of a cache that runs share; features; empty: d2vfm_cache beside the run",
        runtime=True,
    )
    cache_dtype: str = key("float32", "numbers in the cache", choices=DTYPES)
    val_fraction: float = key(
        0.1, "share of the training patients (or slides) that is held out for validation"
    )
    labels: str = key(
        "",
        "labels.csv of the cohort; no patient is both trained and validated on, and colours of "
        "student_vs_teacher.png; empty: by slide",
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
    workers: int | None = key(
        None, "worker processes; they decode tiles; null: one per core, at most 8", runtime=True
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)
    tracker: Tracker = group(Tracker, "experiment tracking")


def build_model(config: Config, dim: int) -> Student:
    """Build the student for a teacher of width `dim`."""
    check_student_keys(config.stages, config.input_scale, config.unfreeze, config.unfreeze_lr)
    if config.unfreeze and config.cache:
        raise UserError(
            "cache=true unfreeze>0: expected one of them, since features of a stage that is "
            "trained change"
        )
    backbone, _ = load_backbone(config.backbone)
    sizes = (config.adapter, dim, config.input_scale, config.pooling, config.unfreeze)
    return Student(backbone, config.stages, *sizes)


def prepare_training(config: Config, student: Student, world: World) -> engine.ModelInTraining:
    """Put the student on its device, with its optimiser and its moving average."""
    network = build_student_network(student, cached=config.cache, device=world.device)
    model = wrap(network, world)
    average = moving_average(student, config.ema)
    groups = group_student_parameters(student, config.lr, config.unfreeze_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    return engine.ModelInTraining(student, model, optimizer, average)


@dataclass
class DistillationRun:
    """What a step needs beside the model and the data."""

    config: Config
    world: World
    precision: str
    loss: DistillationLoss
    online: OnlineTeacher | None


def make_sets(
    job: DistillationRun,
    student: Student,
    pairs: list[Pair],
    parts: tuple[list[Pair], list[Pair]],
    inputs: dict[str, str],
) -> tuple[Dataset, Dataset]:
    """Make the training and the validation set: tiles, or with `cache` what the frozen backbone
    makes of them.
    """
    config, world = job.config, job.world
    if not config.cache:
        return make_tile_sets(
            parts,
            augment=config.augment,
            seed=config.seed,
            augmentation=config.augmentation.of_tiles(),
            teacher_view=job.online.transform if job.online else None,
        )
    digests = (inputs["backbone"], inputs["dataset"])
    averaged = student.pooling.kind == "mean"
    name = CacheKey(*digests, config.input_scale, averaged, job.precision, config.cache_dtype)
    folder = Path(config.cache_dir or Path(config.output).absolute().parent / "d2vfm_cache")
    frozen = FrozenMaps(student).to(world.device, memory_format=torch.channels_last).eval()
    workers = pick_workers(config.workers, share=local_processes())
    options = {"turns": config.cached_turns, "seed": config.seed, "workers": workers}
    return make_cached_sets(pairs, parts, folder, name, frozen, student.stages, world, **options)


def train_one_epoch(
    job: DistillationRun, training: engine.ModelInTraining, loader: DataLoader, epoch: int
) -> dict[str, float]:
    """Train on all pairs once.

    Returns:
        The mean of the loss over steps and processes, and of its terms when there are several.
    """
    config, world, optimizer = job.config, job.world, training.optimizer
    drop = drop_epoch(config.lr_drop, config.epochs)
    rate = {"drop": drop, "drop_factor": config.lr_drop_factor}
    set_lr(optimizer, lr_factor("step", epoch, config.epochs, **rate))
    training.model.train()
    sums: dict[str, Tensor] = {}
    shown = progress(loader, f"epoch {epoch + 1}", len(loader), "steps", enabled=world.is_main)
    for step, (inputs, teacher) in enumerate(shown):
        if job.online is not None:
            teacher = job.online(teacher)
        inputs = engine.move_to_device(inputs, world.device)
        if isinstance(inputs, Tensor):
            sizes = config.augmentation.sizes
            inputs = rescale(inputs, config.scales, sizes, config.seed, epoch, step)
        with autocast(world.device, job.precision):
            features = training.model(inputs)
        teacher = teacher.to(world.device, non_blocking=True)
        loss, terms = job.loss(features.float(), teacher, gather_rows)
        require_finite(loss, f"epoch {epoch + 1} step {step + 1}", terms)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(training.model, config.clip_norm)
        optimizer.step()
        training.update_average()
        parts = {f"loss_{name}": value for name, value in terms.items()} if len(terms) > 1 else {}
        sums = add_terms(sums, {"loss": loss, **parts})
    return mean_dict({name: value / max(1, len(loader)) for name, value in sums.items()})


def read_set(config: Config, world: World) -> list[Pair]:
    """Read the distillation set; the main process lists its problems in `problems.csv`."""
    report = Path(config.output) / "problems.csv" if world.is_main else None
    checks = {"verify": config.verify, "skip_bad": config.skip_bad}
    return read_pairs(config.dataset, report=report, show=world.is_main, **checks)


def name_teacher(config: Config, pairs: list[Pair]) -> str:
    """Name the encoder that the features are of: a packed set that was cut from slides says it.

    Raises:
        UserError: `teacher` is another one.
    """
    pack = pairs[0].pack
    made = pack.provenance.get("teacher", {}).get("encoder", "") if pack is not None else ""
    if config.teacher and made and ALIASES.get(config.teacher, config.teacher) != made:
        raise UserError(
            f"teacher={config.teacher}: expected {made}, of which the features in "
            f"{config.dataset} are; leave it out"
        )
    return made or config.teacher


def read_teacher(
    config: Config, pairs: list[Pair], world: World, precision: str
) -> OnlineTeacher | None:
    """Read the teacher that runs in the training loop, if one is named."""
    wanted = (config.online_teacher, config.teacher_weights, config.teacher_crop)
    return read_online_teacher(*wanted, pairs, world.device, precision)


def digest_inputs(
    config: Config, pairs: list[Pair], online: OnlineTeacher | None
) -> dict[str, str]:
    """Compute the fingerprints of what decides the result."""
    inputs = {"dataset": digest_pairs(pairs), "backbone": digest_weights_file(config.backbone)}
    inputs |= {"labels": sha256_file(config.labels)} if config.labels else {}
    return inputs | ({"online_teacher": online.digest} if online else {})


def main(config: Config) -> None:
    """Train the student, and leave checkpoints, results and its report in the run directory."""
    world = init_distributed(config.device)
    precision = pick_precision(config.precision, world.device)
    config.augmentation.check(config.augment, config.scales, config.cache, config.online_teacher)
    records = read_labels(config.labels) if config.labels else []
    labels = {record.slide_id: record.label for record in records}
    patients = {record.slide_id: record.case_id for record in records}
    loss = distillation_loss(config.loss, config.loss_weight, config.extra)
    pairs = read_set(config, world)
    seed_everything(config.seed)
    student = build_model(config, dim=len(pairs[0].feature))
    teacher = name_teacher(config, pairs)
    online = read_teacher(config, pairs, world, precision)
    inputs = digest_inputs(config, pairs, online)
    options = {"overwrite": config.overwrite, "tracker": config.tracker}
    run = open_run(config.output, config, world, inputs=inputs, **options)
    if run.results is not None:
        logger.info("train_d2vfm: %s is finished: %s", run.path, run.results)
        return
    job = DistillationRun(config, world, precision, loss, online)
    parts = split_by_patient(pairs, patients, config.val_fraction, config.seed)
    sets = make_sets(job, student, pairs, parts, inputs)
    training = prepare_training(config, student, world)
    evaluated = build_student_network(training.kept, cached=config.cache, device=world.device)
    share = share_batch(config.batch_size, world.size)
    workers = pick_workers(config.workers, share=local_processes())
    loaders = make_loaders(*sets, world, share=share, seed=config.seed, workers=workers)
    held_out = (evaluated, loaders[1], precision, world.device)
    start, best = training.resume(run.last)
    run.forget_after(start)
    for epoch in range(start, config.epochs):
        start_epoch(loaders[0], config.seed, epoch)
        losses = train_one_epoch(job, training, loaders[0], epoch)
        metrics = losses | measure_agreement(*engine.predict_features(*held_out))
        improved = metrics["cosine"] > best.get("cosine", -2.0)
        best = {"epoch": epoch + 1, **metrics} if improved else best
        if world.is_main:
            described = to_dict(config) | {"student": describe_student(student, teacher)}
            state = {"config": described, "epoch": epoch + 1, "best": best}
            if improved:
                training.save_best(run.best, **state)
            training.save_last(run.last, **state)
        run.log({"epoch": epoch + 1, **metrics, "lr": training.optimizer.param_groups[0]["lr"]})
        values = describe_values(metrics, REPORTED, digits=4)
        logger.info("epoch %d/%d: %s", epoch + 1, config.epochs, values)
    if world.is_main:
        training.load_best(run.best)
        slides = [pair.slide_id for pair in parts[1]]
        features = engine.predict_features(*held_out)
        write_report(run.path, *features, slides, labels, config.figures)
    run.finish(best | {"trained_parameters": sum(p.numel() for p in trainable(student))})
    values = describe_values(best, REPORTED, digits=4)
    logger.info("train_d2vfm: finished; best epoch %d: %s", best["epoch"], values)


if __name__ == "__main__":
    launch(main, Config)
