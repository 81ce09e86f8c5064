"""INTELLIGENS: pre-train a patch encoder on slides without labels, by self-distillation as in DINO.

    python -m patch_encoder.pretrain_dino --config configs/intelligens/demo.yaml slides=...
        coords=... output=...
    torchrun --nproc_per_node=8 -m patch_encoder.pretrain_dino
        --config configs/intelligens/vitb16.yaml ...

Writes a run directory. Its `backbone.pt` is the teacher's backbone, which extraction takes as
`encoder=dino weights=backbone.pt`; `log.txt` and `args.txt` are those of the public code. The
method is Caron et al., ICCV 2021; patch shuffle and pyramid view are our reading of the abstract of
INTELLIGENS (Wu et al., arXiv 2309.08259), whose code was never published. An epoch is a number of
tiles, not a pass: corpora have more tiles than a run sees.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from common.cli import launch
from common.config import REQUIRED, group, key, to_dict
from common.device import PRECISIONS, autocast, pick_precision
from common.distributed import (
    World,
    init_distributed,
    local_processes,
    mean_dict,
    mean_number,
    share_batch,
    wrap,
)
from common.errors import UserError
from common.optim import exchange_gradients, make_optimizer, require_finite
from common.processes.pool import pick_workers
from common.progress import describe_values, progress
from common.run import Run, Tracker, open_run
from common.seed import seed_everything
from common.step_timer import StepTimes
from patch_encoder.cohort.failures import Failures
from patch_encoder.pretraining.keys import LossKeys, NetworkKeys, OptimiserKeys, PyramidKeys
from patch_encoder.pretraining.monitoring import RecentValues, measure_training
from patch_encoder.pretraining.run_files import (
    save_backbone,
    save_dino_checkpoint,
    write_args,
    write_epoch_log,
)
from patch_encoder.pretraining.schedules import DistillationSchedules, StepValues
from patch_encoder.pretraining.state import DistillationState, drop_predecessor, make_groups
from patch_encoder.selfdistill.losses.centring import centred_targets, update_centre
from patch_encoder.selfdistill.losses.dino import dino_loss
from patch_encoder.selfdistill.losses.kde import kde_loss
from patch_encoder.selfdistill.losses.koleo import koleo_loss
from patch_encoder.selfdistill.losses.sinkhorn import sinkhorn_targets
from patch_encoder.selfdistill.student import SelfDistilled, make_teacher
from patch_encoder.selfdistill.view_keys import ShuffleKeys, ViewKeys
from patch_encoder.selfdistill.view_recipe import ViewRecipe, check_recipe
from patch_encoder.selfdistill.views import Views, make_views
from patch_encoder.tile_stream.sources import digest_sources
from patch_encoder.tile_stream.stream import StreamBatch, TileStream
from patch_encoder.tile_stream.stream_keys import StreamKeys

logger = logging.getLogger(__name__)
STAGE = "pretrain_dino"
REPORTED = ("loss", "kl", "time/images_per_second", "time/data_share")
REMEDY = "lower training.lr or objective.temperature_end, or set precision=fp32"
AGREE_EVERY = 10  # steps between two questions whether a checkpoint is due, of several processes


@dataclass
class Config(StreamKeys):
    """Keys of `pretrain_dino`; the defaults are DINO's, with the views of `pathology`."""

    output: str = key(REQUIRED, "where the results are written; a run directory", runtime=True)
    network: NetworkKeys = group(NetworkKeys, "student and teacher")
    views: ViewKeys = group(ViewKeys, "the views of a tile")
    shuffle: ShuffleKeys = group(ShuffleKeys, "patch shuffle")
    pyramid: PyramidKeys = group(PyramidKeys, "the view from the slide's pyramid")
    objective: LossKeys = group(LossKeys, "targets and losses")
    training: OptimiserKeys = group(OptimiserKeys, "training recipe; optimiser and teacher")
    epochs: int = key(100, "passes over the training set; here of epoch_tiles tiles each")
    epoch_tiles: int = key(0, "tiles of an epoch; 0: as many as the coordinates have")
    batch_size: int = key(256, "items per step over all processes; tiles")
    accumulate: int = key(
        1, "parts that a step's images are computed in, one after the other, to save memory"
    )
    seed: int = key(42, "seed of everything that is drawn at random")
    precision: str = key(
        "auto",
        "number format of the computation; auto: bf16 where the device has it in "
        "hardware, else fp32; losses are always fp32",
        choices=PRECISIONS,
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    compile: bool = key(
        False, "compile the network with torch.compile; student and teacher", runtime=True
    )
    log_every: int = key(50, "steps between lines in metrics.jsonl", runtime=True)
    save_minutes: float = key(10.0, "minutes between checkpoints inside an epoch", runtime=True)
    dino_checkpoint: bool = key(
        False, "write full_checkpoint.pth, too, in the layout of DINO's own script", runtime=True
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)
    tracker: Tracker = group(Tracker, "experiment tracking")


@dataclass
class PretrainingRun:
    """What a step needs beside the networks.

    Attributes:
        steps: per epoch.
        saved: when the last checkpoint was written (time.monotonic).
    """

    config: Config
    world: World
    run: Run
    precision: str
    recipe: ViewRecipe
    schedules: DistillationSchedules
    stream: TileStream
    steps: int
    recent: RecentValues
    saved: float = field(default_factory=time.monotonic)


def train_one_epoch(job: PretrainingRun, state: DistillationState, epoch: int) -> dict[str, float]:
    """Train on the tiles that are left of an epoch.

    Returns:
        The means of all terms over the epoch's steps and the processes, and where the time went.
    """
    config, world, last = job.config, job.world, (epoch + 1) * job.steps
    state.model.train()
    state.teacher.train()
    times = StepTimes(world.device, config.batch_size)
    batches = job.stream.batches(state.step, last)
    left = last - state.step
    for batch in progress(batches, f"epoch {epoch + 1}", left, "step", enabled=world.is_main):
        times.mark("data")
        values, step = job.schedules.at(state.step), state.step
        # the draws of stochastic depth do not depend on earlier steps
        seed_everything((config.seed * 1_000_003 + step) * 1_009 + world.rank)
        views = cut_views(job, batch)
        times.mark("views")
        state.set_values(values)
        state.optimizer.zero_grad(set_to_none=True)
        terms, targets, features = add_gradients(job, state, views, values, times)
        norm = state.apply_gradients(values, config.training.clip_norm, config.training.clip_each)
        state.add(terms | {"gradient_norm": norm})
        times.mark("step")
        if step % config.log_every == 0:
            measured = measure_training(targets, features, terms["dino"])
            line = mean_dict(terms | {"gradient_norm": norm}) | measured
            rates = {"lr": values.lr, "weight_decay": values.weight_decay}
            rates |= {"momentum": values.momentum, "temperature": values.temperature}
            bad = {"bad_tiles": len(batch.failures)}
            job.run.log(
                {"epoch": epoch + 1, "step": step, **line, **rates, **bad, **times.report()}
            )
            job.recent.add(measured, step)
        if state.step < last and is_checkpoint_due(job, step):
            save_last(job, state, epoch)
    means = {name: value / job.steps for name, value in mean_dict(state.sums).items()}
    return means | times.whole()


def cut_views(job: PretrainingRun, batch: StreamBatch) -> Views:
    """The views of a batch, on this process's device."""
    device = job.world.device
    tiles = batch.tiles.to(device, non_blocking=True)
    context = None if batch.context is None else batch.context.to(device, non_blocking=True)
    return make_views(tiles, context, batch.indices, job.recipe, job.config.seed)


def add_gradients(
    job: PretrainingRun,
    state: DistillationState,
    views: Views,
    values: StepValues,
    times: StepTimes,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Compute the gradients of one step, part by part, and move the centre.

    Returns:
        The loss and its terms, each a detached scalar; the teacher's targets (T, B, K) and its
        features (B, D) of the first view.
    """
    config, device = job.config, job.world.device
    context = [] if views.context_view is None else [views.context_view]
    seen = [*views.global_views, *(context if config.pyramid.teacher else [])]
    with torch.no_grad(), autocast(device, job.precision):
        logits, features = state.teacher(seen)
    logits = logits.view(len(seen), -1, logits.shape[-1])
    targets = make_targets(config.objective, logits, state.centre, values.temperature)
    times.mark("teacher")
    # the views of the teacher come first, in its order
    shown = [*views.student_global_views, *context, *views.local_views]
    parts = zip(*(view.chunk(config.accumulate) for view in shown), strict=True)
    goals = targets.chunk(config.accumulate, dim=1)
    sums: dict[str, Tensor] = {}
    for number, (part, goal) in enumerate(zip(parts, goals, strict=True)):
        with exchange_gradients(state.model, last=number == config.accumulate - 1):
            with autocast(device, job.precision):
                student_logits, student_features = state.model(list(part))
            terms = compute_terms(
                config.objective, student_logits, student_features, goal, len(shown)
            )
            where = f"epoch {state.step // job.steps + 1} step {state.step + 1}"
            require_finite(terms["loss"], where, terms, remedy=REMEDY)
            times.mark("forward")
            state.scaler.scale(terms["loss"] / config.accumulate).backward()
            times.mark("backward")
        for name, value in terms.items():
            share = value.detach() / config.accumulate
            sums[name] = sums[name] + share if name in sums else share
    if config.objective.targets == "centring":
        # after use: a step never sees its own mean
        state.centre = update_centre(state.centre, logits, config.objective.centre_momentum)
    return sums, targets, features[: len(views.global_views[0])]


def make_targets(loss: LossKeys, logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """The teacher's probabilities (T, B, K) from its logits."""
    if loss.targets == "sinkhorn":
        return sinkhorn_targets(logits, temperature)
    return centred_targets(logits, centre, temperature)


def compute_terms(
    loss: LossKeys, logits: Tensor, features: Tensor, targets: Tensor, views: int
) -> dict[str, Tensor]:
    """The loss and its unweighted terms, of (V * B, K) logits and (V * B, D) features."""
    by_view = logits.view(views, -1, logits.shape[-1])
    terms = {"dino": dino_loss(by_view, targets, loss.student_temperature)}
    total = terms["dino"]
    first, second = features.view(views, -1, features.shape[-1])[:2]
    for name, weight, term in (
        ("koleo", loss.koleo, koleo_loss),
        ("kde", loss.kde, kde_loss),
    ):
        if weight:
            terms[name] = term(first) + term(second)
            total = total + weight * terms[name]
    # what the student could still learn: the cross-entropy less the targets' own entropy
    terms["kl"] = terms["dino"].detach() - torch.special.entr(targets).sum(dim=-1).mean()
    return {"loss": total, **terms}


def is_checkpoint_due(job: PretrainingRun, step: int) -> bool:
    """Whether so many minutes have gone by; all processes get the answer of the main one."""
    if job.world.size > 1 and step % AGREE_EVERY:
        return False
    due = time.monotonic() - job.saved >= 60 * job.config.save_minutes
    return mean_number(float(due and job.world.is_main), job.world.device) > 0


def save_last(job: PretrainingRun, state: DistillationState, epoch: int) -> None:
    """Write the checkpoint that a resumed run takes up; all processes call this."""
    stream = job.stream.state_dict()
    if job.world.is_main:
        more = {"stream": stream, "recent": job.recent.rows}
        state.save(job.run.last, to_dict(job.config), epoch, **more)
    job.saved = time.monotonic()


def save_results(job: PretrainingRun, state: DistillationState, epoch: int) -> None:
    """Write what others read: the teacher's backbone, and on request DINO's own layout."""
    config, path = job.config, job.run.path
    save_backbone(path / "backbone.pt", state.teacher.backbone)
    write_epoch_log(path / "log.txt", path / "metrics.jsonl")
    if config.dino_checkpoint:
        more = {"optimizer": state.optimizer.state_dict(), "epoch": epoch, "args": to_dict(config)}
        file = path / "full_checkpoint.pth"
        save_dino_checkpoint(file, state.student, state.teacher, state.centre, more)


def prepare_networks(config: Config, world: World, precision: str) -> DistillationState:
    """Student and teacher on their device, with optimiser and gradient scaler."""
    image_size = config.views.build(config.shuffle).global_size
    student: nn.Module = config.network.build(image_size)
    if world.size > 1 and world.device.type == "cuda":
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    student = student.to(world.device, memory_format=torch.channels_last)
    assert isinstance(student, SelfDistilled)
    teacher = make_teacher(student)
    if config.compile:
        student.backbone.compile()
        teacher.backbone.compile()
    groups = make_groups(student)
    rates = (config.training.lr, config.training.weight_decay)
    optimizer = make_optimizer(config.training.optimizer, groups, *rates)
    centre = torch.zeros(config.network.out_dim, device=world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    return DistillationState(student, wrap(student, world), teacher, centre, optimizer, scaler)


def open_stream(config: Config, world: World, failures: Failures) -> TileStream:
    """Find the corpus, and make its plan and this process's part of it."""
    workers = pick_workers(config.workers, config.read_timeout, local_processes())
    problems: dict[str, str] = {}
    sources = config.find(problems, workers)
    failures.add_all(problems)
    return TileStream(
        config.plan(sources, config.seed),
        config.batch_size,
        rank=world.rank,
        world=world.size,
        workers=workers,
        read_timeout=config.read_timeout,
        context_factor=config.pyramid.factor,
        align=config.align,
    )


def count_steps(config: Config, stream: TileStream) -> int:
    """Steps of an epoch."""
    tiles = config.epoch_tiles or sum(len(s.coordinates.coords) for s in stream.plan.sources)
    if tiles < config.batch_size:
        raise UserError(
            f"epoch_tiles={tiles}: expected at least batch_size={config.batch_size}; lower "
            "batch_size or give a larger epoch_tiles"
        )
    return tiles // config.batch_size


def make_recipe(config: Config) -> ViewRecipe:
    """The views, checked against tiles and network."""
    recipe = config.views.build(config.shuffle)
    is_vit = config.network.arch.startswith("vit_")
    check_recipe(recipe, config.tile_size, config.network.patch_size if is_vit else 1)
    return recipe


def main(config: Config) -> int:
    """Train, and leave backbone, checkpoints and logs in the run directory."""
    world = init_distributed(config.device)
    precision = pick_precision(config.precision, world.device)
    recipe = make_recipe(config)
    share = share_batch(config.batch_size, world.size, config.accumulate)
    config.objective.check(share)
    failures = Failures(STAGE)
    stream = open_stream(config, world, failures)
    steps = count_steps(config, stream)
    inputs = {"slides": digest_sources(stream.plan.sources)}
    options = {"overwrite": config.overwrite, "tracker": config.tracker}
    run = open_run(config.output, config, world, inputs=inputs, **options)
    if run.results is not None:
        logger.info("%s: %s is finished: %s", STAGE, run.path, run.results)
        return 0
    seed_everything(config.seed)
    state = prepare_networks(config, world, precision)
    schedules = config.training.schedules(steps, config.epochs, config.batch_size, config.objective)
    recent = RecentValues(config.network.out_dim, after=schedules.warmup)
    job = PretrainingRun(config, world, run, precision, recipe, schedules, stream, steps, recent)
    start = resume(job, state)
    if world.is_main:
        write_args(run.path / "args.txt", to_dict(config))
    values: dict[str, float] = {}
    for epoch in range(start, config.epochs):
        values = train_one_epoch(job, state, epoch)
        last_values = schedules.at(state.step - 1)
        line = {**values, "lr": last_values.lr, "weight_decay": last_values.weight_decay}
        stream.drop(stream.slides_to_drop())
        state.sums = {}
        run.log({"epoch": epoch + 1, **line})
        save_last(job, state, epoch + 1)
        if world.is_main:
            save_results(job, state, epoch + 1)
        logger.info(
            "epoch %d/%d: %s", epoch + 1, config.epochs, describe_values(line, REPORTED, digits=3)
        )
    failures.add_all(stream.describe_failures())
    run.finish({name: value for name, value in values.items() if not name.startswith("time/")})
    if not world.is_main:
        return 0
    drop_predecessor(run.last)
    return failures.write(run.path)


def resume(job: PretrainingRun, state: DistillationState) -> int:
    """Take up the last checkpoint; epochs that are completed."""
    content: Mapping = state.resume(job.run.last)
    epoch = content.get("epoch", 0)
    job.run.forget_after(epoch, state.step)
    if content:
        job.stream.load_state_dict(content["stream"])
        job.recent.rows = content["recent"]
        logger.info("%s: goes on after step %d", STAGE, state.step)
    return epoch


if __name__ == "__main__":
    launch(main, Config)
