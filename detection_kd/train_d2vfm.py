"""D2VFM: train an adapter so that a frozen detector backbone reproduces a foundation model's features.

    python -m detection_kd.train_d2vfm --config configs/quickstart/d2vfm.yaml dataset=... backbone=... output=...
    torchrun --nproc_per_node=4 -m detection_kd.train_d2vfm --config configs/ts2gkd/d2vfm_gigapath.yaml ...

Writes a run directory; `checkpoint_best.pt` (best cosine similarity on held-out slides) is the student that
`extract_student` takes. Only the adapter is trained; the backbone and its BatchNorm statistics stay as they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, TensorDataset

from common.checkpoint import resume, save_checkpoint
from common.cli import launch
from common.config import REQUIRED, group, key, to_dict
from common.device import PRECISIONS, autocast, pick_precision
from common.distributed import World, init_distributed, mean_dict, unwrap, wrap
from common.errors import UserError
from common.files import sha256_file
from common.progress import progress
from common.run import Tracker, open_run
from common.seed import epoch_generator, seed_everything, seed_worker
from detection_kd.augmentation_keys import AugmentationKeys
from detection_kd.datasets.distillation import DistillationTiles, Pair, pairs_digest, read_pairs, split_by_slide
from detection_kd.losses.feature_regression import FEATURE_LOSSES
from detection_kd.metrics import feature_agreement
from detection_kd.models.adapter import ADAPTERS
from detection_kd.models.backbone import load_backbone
from detection_kd.models.online_teacher import OnlineTeacher, online_teacher
from detection_kd.models.student import Pooled, Student, student_config
from patch_encoder.models.encoder_table import IMAGENET
from patch_encoder.models.encoders import PixelEncoder

logger = logging.getLogger(__name__)
POOLING_BATCH = 32  # tiles; fixed, so that cached features do not depend on the training batch


@dataclass
class Config:
    """Keys of the D2VFM stage; the defaults are the published ones."""

    dataset: str = key(REQUIRED, "distillation set: folder with wsi_root/ and ann_root/, or packed .h5", path=True)
    backbone: str = key(REQUIRED, "backbone.pt of train_detector, or a whole detector checkpoint", path=True)
    output: str = key(REQUIRED, "run directory", runtime=True)
    teacher: str = key("", "name of the teacher, kept in the checkpoint")
    needle: int = key(1, "backbone stage that is pooled: 0, 1, 2 = layer2, layer3, layer4")
    input_scale: float = key(1.0, "resize tiles by this factor first, to the resolution that the detector was trained at")
    adapter: str = key("mpa", "adapter", choices=ADAPTERS)
    loss: str = key("mse", "feature loss", choices=tuple(FEATURE_LOSSES))
    loss_weight: float = key(2.0, "factor on the loss")
    epochs: int = key(4, "epochs")
    lr_drop: int = key(2, "epoch after which the learning rate is divided by 10")
    batch_size: int = key(40, "tiles a step over all processes")
    lr: float = key(2e-3, "learning rate (AdamW)")
    weight_decay: float = key(1e-4, "weight decay")
    clip_norm: float = key(0.1, "gradient clipping, L2 norm; 0: off")
    augment: bool = key(True, "flip and turn tiles; the teacher's feature stays that of the tile as it was")
    scales: list[float] = key([1.0], "a step's tiles are resized by one of these factors, drawn at random")
    augmentation: AugmentationKeys = group(AugmentationKeys, "further augmentation")
    online_teacher: str = key("", "encoder that is run on the augmented tiles; empty: the stored features of plain tiles")
    teacher_weights: str = key("", "its local weights file or folder; empty: from its hub")
    teacher_crop: bool = key(True, "its centre crop, as `crop` of extract_features")
    verify: bool = key(False, "decode every tile before training; else only its header is read", runtime=True)
    skip_bad: bool = key(False, "train without the pairs that have problems", runtime=True)
    cache: bool = key(False, "compute the frozen backbone's features once and train the adapter on them; needs augment=false")
    views: int = key(1, "with cache: quarter turns of every training tile that are cached, 1 to 4")
    val_share: float = key(0.1, "share of slides held out for validation")
    seed: int = key(42, "seed of the split, initial weights, shuffling and augmentation")
    precision: str = key("auto", "auto: bf16 where the device has it", choices=PRECISIONS)
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    workers: int = key(2, "decoding processes", runtime=True)
    overwrite: bool = key(False, "start afresh over another run", runtime=True)
    tracker: Tracker = group(Tracker, "experiment tracking")


def build_model(config: Config, dim: int) -> tuple[Student, dict[str, Any]]:
    """The student for a teacher of width `dim`, and what a checkpoint needs to rebuild it."""
    if config.needle not in (0, 1, 2):
        raise UserError(f"needle={config.needle}: expected 0, 1 or 2 (layer2, layer3, layer4)")
    if not 0 < config.input_scale <= 4:
        raise UserError(f"input_scale={config.input_scale}: expected a factor above 0, at most 4")
    backbone, _ = load_backbone(config.backbone)
    student = Student(backbone, config.needle, config.adapter, dim, config.input_scale)
    return student, student_config(student, config.teacher)


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    config: Config,
    world: World,
    epoch: int,
    online: OnlineTeacher | None = None,
) -> float:
    """One pass over the training pairs; returns the mean loss over steps and processes."""
    precision = pick_precision(config.precision, world.device)
    loss_of = FEATURE_LOSSES[config.loss]
    model.train()
    total = torch.zeros(())
    for step, (tiles, teacher) in enumerate(
        progress(loader, f"epoch {epoch + 1}", len(loader), "steps", enabled=world.is_main)
    ):
        if online is not None:
            teacher = online(teacher)
        resized = config.scales, config.augmentation.sizes
        tiles = rescale(tiles.to(world.device, non_blocking=True), *resized, config.seed, epoch, step)
        with autocast(world.device, precision):
            student = model(tiles)
        loss = config.loss_weight * loss_of(student.float(), teacher.to(world.device, non_blocking=True))
        if not torch.isfinite(loss):
            raise UserError(f"epoch {epoch + 1} step {step + 1}: the loss is {loss.item()}; lower lr or set precision=fp32")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip_norm > 0:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        total += loss.detach().cpu()
    return mean_dict({"loss": total / max(1, len(loader))})["loss"]


def rescale(tiles: Tensor, scales: list[float], sizes: list[int], seed: int, epoch: int, step: int) -> Tensor:
    """uint8 (B, 3, H, W) resized by a factor or to a short side by (seed, epoch, step), the same on every process."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 1_000_003 + step)
    choices = [side / min(tiles.shape[-2:]) for side in sizes] or scales
    scale = choices[int(torch.randint(len(choices), (1,), generator=generator))]
    if scale == 1.0:
        return tiles
    size = [max(32, round(side * scale)) for side in tiles.shape[-2:]]
    resized = nn.functional.interpolate(tiles.float(), size=size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def validate(model: nn.Module, loader: DataLoader, precision: str, device: torch.device) -> dict[str, float]:
    """Agreement with the teacher on held-out slides."""
    model.eval()
    students, teachers = [], []
    for tiles, teacher in loader:
        with autocast(device, precision):
            students.append(model(tiles.to(device)).float().cpu())
        teachers.append(teacher)
    return feature_agreement(torch.cat(students), torch.cat(teachers))


def make_sets(
    config: Config, student: Student, pairs: list[Pair], world: World, online: OnlineTeacher | None = None
) -> tuple[Dataset, Dataset]:
    """Training and validation set: tiles, or what the frozen backbone makes of them when `cache`."""
    train_pairs, val_pairs = split_by_slide(pairs, config.val_share, config.seed)
    options = {"augmentation": config.augmentation.of_tiles(), "teacher_view": online.transform if online else None}
    train = DistillationTiles(train_pairs, augment=config.augment, seed=config.seed, **options)
    val = DistillationTiles(val_pairs, augment=False, seed=config.seed)
    if not config.cache:
        return train, val
    if not 1 <= config.views <= 4:
        raise UserError(f"views={config.views}: expected 1 to 4 quarter turns")
    turned = [DistillationTiles(train_pairs, augment=False, seed=config.seed, turns=turns) for turns in range(config.views)]
    return pooled_set(student, ConcatDataset(turned), config, world), pooled_set(student, val, config, world)


@torch.inference_mode()
def pooled_set(student: Student, tiles: Dataset, config: Config, world: World) -> TensorDataset:
    """(pooled feature (C,), teacher feature (D,)) of every tile; the backbone is frozen, so once is enough."""
    precision = pick_precision(config.precision, world.device)
    frozen = PixelEncoder(Pooled(student), IMAGENET).to(world.device, memory_format=torch.channels_last).eval()
    loader = DataLoader(tiles, POOLING_BATCH, num_workers=config.workers)
    pooled, teachers = [], []
    for batch, teacher in progress(loader, "backbone features", len(loader), "batches", enabled=world.is_main):
        with autocast(world.device, precision):
            pooled.append(frozen(batch.to(world.device)).float().cpu())
        teachers.append(teacher)
    return TensorDataset(torch.cat(pooled).clone(), torch.cat(teachers))


def make_loaders(config: Config, world: World, train: Dataset, val: Dataset) -> tuple[DataLoader, DataLoader]:
    """Training loader (sharded over processes) and validation loader (whole, on every process)."""
    if config.batch_size % world.size:
        raise UserError(f"batch_size={config.batch_size}: expected a multiple of the {world.size} processes")
    count = len(train)  # type: ignore[arg-type]
    sampler = DistributedSampler(train, world.size, world.rank, shuffle=True, seed=config.seed)
    batch = config.batch_size // world.size
    workers = 0 if config.cache else config.workers
    options = {"num_workers": workers, "pin_memory": world.device.type == "cuda", "worker_init_fn": seed_worker}
    train_loader = DataLoader(train, batch, sampler=sampler, drop_last=count >= config.batch_size, **options)
    return train_loader, DataLoader(val, batch, **options)


def main(config: Config) -> None:
    world = init_distributed(config.device)
    config.augmentation.check(config.augment, config.scales, config.cache, config.online_teacher)
    report = Path(config.output) / "problems.csv" if world.is_main else None
    checks = {"verify": config.verify, "skip_bad": config.skip_bad}
    pairs = read_pairs(config.dataset, report=report, show=world.is_main, **checks)
    seed_everything(config.seed)
    student, rebuild = build_model(config, dim=len(pairs[0].feature))
    inputs = {"dataset": pairs_digest(pairs), "backbone": sha256_file(config.backbone)}
    wanted = config.online_teacher, config.teacher_weights, config.teacher_crop
    online = online_teacher(*wanted, pairs, world.device, pick_precision(config.precision, world.device))
    inputs |= {"online_teacher": online.digest} if online else {}
    run = open_run(config.output, config, world, inputs=inputs, overwrite=config.overwrite, tracker=config.tracker)
    if run.results is not None:
        logger.info("train_d2vfm: %s is finished: %s", run.path, run.results)
        return
    train, val = make_sets(config, student, pairs, world, online)
    trained = student.adapter if config.cache else PixelEncoder(student, IMAGENET)
    model = wrap(trained.to(world.device, memory_format=torch.channels_last), world)
    optimizer = torch.optim.AdamW(student.adapter.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_drop)
    train_loader, val_loader = make_loaders(config, world, train, val)
    precision = pick_precision(config.precision, world.device)
    start, best = resume(run.last, student, optimizer=optimizer, scheduler=scheduler)
    run.forget_after(start)
    for epoch in range(start, config.epochs):
        train_loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        if isinstance(train, DistillationTiles):
            train.epoch = epoch
        train_loader.generator = epoch_generator(config.seed, epoch)
        loss = train_one_epoch(model, train_loader, optimizer, config, world, epoch, online)
        scheduler.step()
        metrics = {"loss": loss, **validate(unwrap(model), val_loader, precision, world.device)}
        improved = metrics["cosine"] > best.get("cosine", -2.0)
        best = {"epoch": epoch + 1, **metrics} if improved else best
        if world.is_main:
            state = {"config": to_dict(config) | {"student": rebuild}, "epoch": epoch + 1, "best": best}
            if improved:
                save_checkpoint(run.best, model=student.state_dict(), **state)
            parts = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            save_checkpoint(run.last, model=student.state_dict(), **state, **parts)
        run.log({"epoch": epoch + 1, **metrics, "lr": optimizer.param_groups[0]["lr"]})
        logger.info("epoch %d/%d: loss %.4f, cosine %.4f, R2 %.4f", epoch + 1, config.epochs, *metrics.values())
    run.finish(best)
    logger.info("train_d2vfm: finished, best epoch %s", best)


if __name__ == "__main__":
    launch(main, Config)
