"""INTELLIGENS: pre-train a patch encoder on slides without labels, by self-distillation as in DINO.

    python -m patch_encoder.pretrain_dino --config configs/intelligens/demo.yaml slides=...
        coords=... output=...
    torchrun --nproc_per_node=8 -m patch_encoder.pretrain_dino
        --config configs/intelligens/vitb16.yaml ...

Writes a run directory. Its `backbone.pt` is the teacher's backbone, which extraction takes as
`encoder=dino weights=backbone.pt`; `log.txt` and `args.txt` are those of the public code. The
method is Caron et al., ICCV 2021; patch shuffle and pyramid view are our reading of the abstract of
INTELLIGENS (Wu et al., arXiv 2309.08259), whose code was never published.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from patch_encoder.cohort.failures import Failures
from patch_encoder.models.dino_files import DESCRIPTION
from patch_encoder.pretraining.gradients import add_student_gradients, ask_teacher
from patch_encoder.pretraining.keys import TileViewKeys
from patch_encoder.pretraining.loop import (
    is_checkpoint_due,
    report_epoch,
    seed_step,
    take_up,
)
from patch_encoder.pretraining.monitoring import RecentValues, measure_training
from patch_encoder.pretraining.objective import Objective
from patch_encoder.pretraining.run_files import (
    save_backbone,
    save_dino_checkpoint,
    share_backbone,
    write_args,
    write_description,
    write_epoch_log,
)
from patch_encoder.pretraining.run_keys import RunKeys
from patch_encoder.pretraining.schedules import DistillationSchedules, StepValues
from patch_encoder.pretraining.state import DistillationState, drop_predecessor, prepare_state
from patch_encoder.pretraining.training_probe import (
    SCORE,
    TrainingProbe,
    TrainingProbeKeys,
    make_training_probe,
)
from patch_encoder.selfdistill.student import SelfDistilled
from patch_encoder.selfdistill.view_figure import draw_view_figure
from patch_encoder.selfdistill.view_recipe import ViewRecipe
from patch_encoder.selfdistill.views import Views, make_views
from patch_encoder.tile_stream.sources import digest_sources
from patch_encoder.tile_stream.stream import StreamBatch, TileStream
from wsi_common.cli import PostponedTermination, launch
from wsi_common.config import group, key, to_dict
from wsi_common.device import pick_precision
from wsi_common.distributed import World, init_distributed, local_processes, mean_dict, share_batch
from wsi_common.errors import UserError
from wsi_common.figures import save_figure
from wsi_common.processes.pool import pick_workers
from wsi_common.progress import progress
from wsi_common.run import Run, open_run
from wsi_common.seed import seed_everything
from wsi_common.step_timer import StepTimes

logger = logging.getLogger(__name__)
STAGE = "pretrain_dino"
MOST_PREVIEWED = 32  # tiles; a figure of more takes minutes
REPORTED = ("loss", "kl", SCORE, "time/images_per_second", "time/data_share")


@dataclass
class Config(RunKeys, TileViewKeys):
    """Keys of `pretrain_dino`; the defaults are DINO's, with the views of `pathology`."""

    probe: TrainingProbeKeys = group(TrainingProbeKeys, "probe of the teacher while it trains")
    epochs: int = key(100, "passes over the training set; here of epoch_tiles tiles each", least=1)
    dino_checkpoint: bool = key(
        False, "write full_checkpoint.pth, too, in the layout of DINO's own script", runtime=True
    )
    preview: int = key(
        0,
        "draw the views of so many tiles into views.png and stop; at most 32; 0: train",
        runtime=True,
        least=0,
    )


@dataclass
class PretrainingRun:
    """What a step needs beside the networks.

    Attributes:
        steps: per epoch.
        saved: when the last checkpoint was written (time.monotonic).
        termination: SIGTERM, which waits for a checkpoint.
    """

    config: Config
    world: World
    run: Run
    precision: str
    recipe: ViewRecipe
    objective: Objective
    schedules: DistillationSchedules
    stream: TileStream
    steps: int
    recent: RecentValues
    probe: TrainingProbe | None
    saved: float = field(default_factory=time.monotonic)
    termination: PostponedTermination = field(default_factory=PostponedTermination)


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
        seed_step(config.seed, step, world.rank)
        views = cut_views(job, batch, step)
        times.mark("views")
        state.set_values(values)
        state.optimizer.zero_grad(set_to_none=True)
        terms, targets, features = add_gradients(job, state, views, values, times)
        norm = state.apply_gradients(values, config.training.clip_norm, config.training.clip_each)
        state.add(terms | {"gradient_norm": norm})
        times.mark("step")
        if step % config.log_every == 0:
            measured = measure_training(targets, features)
            line = mean_dict(terms | {"gradient_norm": norm}) | measured
            line |= {**values.rates(), "bad_tiles": len(batch.failures), **times.report()}
            job.run.log({"epoch": epoch + 1, "step": step, **line})
            job.recent.add(measured, step)
        if state.step < last and is_checkpoint_due(
            world, step, job.saved, config.save_minutes, job.termination.came
        ):
            save_last(job, state, epoch)
            job.termination.end()
    means = {name: value / job.steps for name, value in mean_dict(state.sums).items()}
    return means | times.whole()


def cut_views(job: PretrainingRun, batch: StreamBatch, step: int) -> Views:
    """The views of a step's batch, on this process's device; with the pyramid view where the step
    has one, on all processes alike.
    """
    device, context = job.world.device, batch.context
    tiles = batch.tiles.to(device, non_blocking=True)
    if not job.config.pyramid.is_drawn(job.config.seed, step):
        context = None
    context = None if context is None else context.to(device, non_blocking=True)
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
    logits, features = ask_teacher(state, seen, device, job.precision)
    targets = job.objective.make_targets(logits, state.centre, values.temperature)
    times.mark("teacher")
    # the views of the teacher come first, in its order
    shown = [*views.student_global_views, *context, *views.local_views]

    def compute_terms(outputs: Tensor, student_features: Tensor, part: slice) -> dict[str, Tensor]:
        goal = targets[:, part]
        return job.objective.compute_terms(outputs, student_features, goal, len(shown))

    sums = add_student_gradients(
        state,
        shown,
        compute_terms,
        accumulate=config.accumulate,
        device=device,
        precision=job.precision,
        where=f"epoch {state.step // job.steps + 1} step {state.step + 1}",
        times=times,
    )
    state.centre = job.objective.move_centre(state.centre, logits)
    return sums, targets, features[: len(views.global_views[0])]


def save_last(job: PretrainingRun, state: DistillationState, epoch: int) -> None:
    """Write the checkpoint that a resumed run takes up; all processes call this."""
    stream = job.stream.state_dict()
    if job.world.is_main:
        more = {"stream": stream, "recent": job.recent.rows}
        state.save(job.run.last, to_dict(job.config), epoch, **more)
    job.saved = time.monotonic()


def end_epoch(
    job: PretrainingRun, state: DistillationState, epoch: int, values: dict[str, float]
) -> dict[str, float]:
    """Probe, log and save after `epoch` epochs; all processes call this.

    Returns:
        The line of metrics.jsonl.
    """
    step_values = job.schedules.at(state.step - 1)
    line = {**values, "lr": step_values.lr, "weight_decay": step_values.weight_decay}
    if job.world.is_main:
        line |= probe_teacher(job, state, epoch)
    job.stream.drop(job.stream.slides_to_drop())
    state.sums = {}
    report_epoch(job.run, epoch, job.config.epochs, line, REPORTED)
    save_last(job, state, epoch)
    if job.world.is_main:
        save_results(job, state, epoch)
    return line


def probe_teacher(job: PretrainingRun, state: DistillationState, epoch: int) -> dict[str, float]:
    """Score the teacher's backbone where it is due, and keep the best one."""
    keys = job.config.probe
    if job.probe is None or (epoch % keys.every and epoch != job.config.epochs):
        return {}
    scores = job.probe.score(state.teacher.backbone)
    if scores[SCORE] > state.best.get(SCORE, -1.0):
        state.best = {"epoch": epoch, **scores}
        if keys.keep_best:
            save_backbone(job.run.path / "backbone_best.pt", state.teacher.backbone)
    return scores


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
    training, compiled = config.training, config.compile
    rates = (training.lr, training.weight_decay)
    return prepare_state(student, training.optimizer, rates, world, precision, compiled=compiled)


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
        cache_dir=config.cache_dir,
    )


def draw_preview(config: Config, world: World, recipe: ViewRecipe) -> None:
    """Draw the views of the first tiles of the run, of which no more are read."""
    if config.preview > MOST_PREVIEWED:
        raise UserError(f"preview={config.preview}: expected at most {MOST_PREVIEWED} tiles")
    only = replace(config, batch_size=config.preview)
    stream = open_stream(only, World(0, 1, world.device), Failures(STAGE))
    with closing(stream.batches(0, 1)) as batches:
        batch = next(batches)
    figure = draw_view_figure(batch.tiles, batch.context, batch.indices, recipe, config.seed)
    path = Path(config.output) / "views.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    logger.info("%s: the views of %d tiles are in %s", STAGE, config.preview, path)


def write_descriptions(config: Config, path: Path, recipe: ViewRecipe, width: int) -> None:
    """Write the settings as the public code logs them, and what extraction has to know."""
    write_args(path / "args.txt", to_dict(config))
    model, options = config.network.describe(recipe.global_size)
    mpp = config.mpps[0] if len(config.mpps) == 1 else None
    sizes = (width, recipe.global_size, (recipe.mean, recipe.std), config.tile_size, mpp)
    write_description(path / "encoder.json", model, options, *sizes)


def open_job(
    config: Config, world: World, stream: TileStream, recipe: ViewRecipe
) -> PretrainingRun:
    """Everything that a step needs beside the networks."""
    precision = pick_precision(config.precision, world.device)
    steps = config.count_steps(stream.plan.sources)
    schedules = config.training.schedules(steps, config.epochs, config.batch_size, config.objective)
    side, statistics = recipe.global_size, (recipe.mean, recipe.std)
    probe = make_training_probe(config.probe, side, statistics, world.device, precision)
    inputs = {"slides": digest_sources(stream.plan.sources)}
    inputs |= {"probe": probe.tiles.digest()} if probe else {}
    options = {"overwrite": config.overwrite, "tracker": config.tracker}
    run = open_run(config.output, config, world, inputs=inputs, **options)
    recent = RecentValues(config.network.out_dim, after=schedules.warmup)
    return PretrainingRun(
        config,
        world,
        run,
        precision,
        recipe,
        config.objective.build(),
        schedules,
        stream,
        steps,
        recent,
        probe,
    )


def main(config: Config) -> int:
    """Train, and leave backbone, checkpoints and logs in the run directory."""
    world = init_distributed(config.device)
    recipe = config.make_recipe()
    config.objective.check(share_batch(config.batch_size, world.size, config.accumulate))
    config.pyramid.check()
    if config.preview:
        if world.is_main:
            draw_preview(config, world, recipe)
        return 0
    failures = Failures(STAGE)
    stream = open_stream(config, world, failures)
    job = open_job(config, world, stream, recipe)
    if job.run.results is not None:
        logger.info("%s: %s is finished: %s", STAGE, job.run.path, job.run.results)
        return 0
    seed_everything(config.seed)
    state = prepare_networks(config, world, job.precision)
    start = resume(job, state)
    if world.is_main:
        write_descriptions(config, job.run.path, recipe, int(state.teacher.backbone.num_features))
        if config.keep_start and state.step == 0:
            save_backbone(job.run.path / "backbone_start.pt", state.teacher.backbone)
    line: dict[str, float] = {}
    with job.termination:
        for epoch in range(start, config.epochs):
            values = train_one_epoch(job, state, epoch)
            line = end_epoch(job, state, epoch + 1, values)
    failures.add_all(stream.describe_failures())
    best = {"best": state.best} if state.best else {}
    if world.is_main:
        share_backbone(job.run.path, DESCRIPTION, to_dict(config))
    job.run.finish({n: v for n, v in line.items() if not n.startswith("time/")} | best)
    if not world.is_main:
        return 0
    drop_predecessor(job.run.last)
    return failures.write(job.run.path)


def resume(job: PretrainingRun, state: DistillationState) -> int:
    """Take up the last checkpoint; epochs that are completed."""
    content = take_up(job.run, state, STAGE)
    if content:
        job.stream.load_state_dict(content["stream"])
        job.recent.rows = content["recent"]
    return content.get("epoch", 0)


if __name__ == "__main__":
    launch(main, Config)
