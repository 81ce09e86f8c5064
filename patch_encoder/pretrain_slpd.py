"""SLPD: pre-train a region encoder on tile features without labels, by prototypes of whole slides.

    python -m patch_encoder.pretrain_slpd --config configs/slpd/demo.yaml regions=... output=...
    torchrun --nproc_per_node=4 -m patch_encoder.pretrain_slpd --config configs/slpd/nsclc.yaml ...

Regions are those of `build_regions`. Writes a run directory, whose `backbone.pt` is the teacher's
region encoder with `region_encoder.json` beside it; `extract_regions` takes both. The method is Yu
et al., SLPD, MICCAI 2023, on the region-level DINO of HIPT (Chen et al., CVPR 2022); with
`losses.intra=0 losses.inter=0` it is plain DINO. Accidents of the published code that can change
results are switches, off by default.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patch_encoder.pretraining.gradients import add_student_gradients, ask_teacher
from patch_encoder.pretraining.loop import (
    is_checkpoint_due,
    report_epoch,
    seed_step,
    take_up,
)
from patch_encoder.pretraining.monitoring import RecentValues, measure_training
from patch_encoder.pretraining.objective import Objective
from patch_encoder.pretraining.run_files import save_backbone, share_backbone
from patch_encoder.pretraining.run_keys import RunKeys
from patch_encoder.pretraining.schedules import DistillationSchedules, StepValues
from patch_encoder.pretraining.state import DistillationState, drop_predecessor, prepare_state
from patch_encoder.prototypes.encoding import encode_regions
from patch_encoder.prototypes.keys import PrototypeKeys, PrototypeLossKeys, RegionNetworkKeys
from patch_encoder.prototypes.objective import (
    PrototypeState,
    add_prototype_terms,
    make_prototype_goals,
)
from patch_encoder.prototypes.region_batches import choose_share, draw_order, read_batches
from patch_encoder.prototypes.region_encoder import (
    DESCRIPTION,
    RegionEncoderDescription,
    write_region_encoder,
)
from patch_encoder.prototypes.region_packing import pack_regions
from patch_encoder.prototypes.region_probe import (
    SCORES,
    RegionProbe,
    RegionProbeKeys,
    make_region_probe,
)
from patch_encoder.prototypes.region_view_recipe import RegionViewKeys, RegionViewRecipe
from patch_encoder.prototypes.region_views import RegionViews, make_region_views
from patch_encoder.prototypes.slide_prototypes import find_slide_prototypes
from patch_encoder.regions.keys import RegionKeys
from patch_encoder.regions.opening import open_store
from patch_encoder.regions.store import RegionStore
from wsi_common.cli import PostponedTermination, launch
from wsi_common.config import group, key, to_dict
from wsi_common.device import pick_precision
from wsi_common.distributed import World, init_distributed, mean_dict, share_batch
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes
from wsi_common.progress import progress
from wsi_common.run import Run, open_run
from wsi_common.schedules import ramp
from wsi_common.seed import seed_everything
from wsi_common.step_timer import StepTimes

logger = logging.getLogger(__name__)
STAGE = "pretrain_slpd"
REPORTED = ("loss", "dino", "intra", "inter", *SCORES, "time/images_per_second", "time/prototypes")


@dataclass
class Config(RunKeys, RegionKeys):
    """Keys of `pretrain_slpd`; the defaults are the paper's, for NSCLC."""

    network: RegionNetworkKeys = group(RegionNetworkKeys, "student and teacher")
    views: RegionViewKeys = group(RegionViewKeys, "the views that networks see; of a region")
    prototypes: PrototypeKeys = group(PrototypeKeys, "clusters of each slide and its neighbours")
    losses: PrototypeLossKeys = group(PrototypeLossKeys, "the losses of prototypes")
    probe: RegionProbeKeys = group(RegionProbeKeys, "probe of the teacher while it trains")
    epochs: int = key(100, "passes over the training set", least=1)
    batch_size: int = key(512, "items per step over all processes; regions", least=1)
    seed: int = key(42, "seed of everything that is drawn at random")


@dataclass
class SlpdRun:
    """What a step needs beside the networks.

    Attributes:
        steps: per epoch.
        prototypes: those of the epoch, and their centres.
        saved: when the last checkpoint was written (time.monotonic).
        termination: SIGTERM, which waits for a checkpoint.
    """

    config: Config
    world: World
    run: Run
    precision: str
    store: RegionStore
    recipe: RegionViewRecipe
    objective: Objective
    schedules: DistillationSchedules
    steps: int
    recent: RecentValues
    probe: RegionProbe | None
    prototypes: PrototypeState = field(default_factory=PrototypeState)
    saved: float = field(default_factory=time.monotonic)
    termination: PostponedTermination = field(default_factory=PostponedTermination)


def train_one_epoch(job: SlpdRun, state: DistillationState, epoch: int) -> dict[str, float]:
    """Cluster the regions where that is due, and train on the batches that are left of an epoch.

    Returns:
        The means of all terms over the epoch's steps and the processes, and where the time went.
    """
    config, world, first = job.config, job.world, epoch * job.steps
    times = StepTimes(world.device, config.batch_size)
    if state.step == first:  # a run that was stopped inside the epoch has its prototypes
        renew_prototypes(job, state, epoch, times)
    state.model.train()
    state.teacher.train()
    order = draw_order(config.seed, epoch, int(job.store.counts.sum()))
    left = range(state.step - first, job.steps)
    shares = [choose_share(order, number, config.batch_size, world) for number in left]
    batches = read_batches(job.store, shares, world.device)
    views: RegionViews | None = None
    for batch in progress(batches, f"epoch {epoch + 1}", len(left), "step", enabled=world.is_main):
        times.mark("data")
        values, step = job.schedules.at(state.step), state.step
        seed_step(config.seed, step, world.rank)
        packed, ids = pack_regions(batch.features, batch.valid), torch.from_numpy(batch.ids)
        views = make_region_views(packed, ids, step, job.recipe, config.seed, reuse=views)
        times.mark("views")
        state.set_values(values)
        state.optimizer.zero_grad(set_to_none=True)
        terms, targets, features = add_gradients(job, state, views, ids, values, times)
        norm = state.apply_gradients(values, config.training.clip_norm, config.training.clip_each)
        terms |= {"gradient_norm": norm}
        state.add(terms)
        times.mark("step")
        if step % config.log_every == 0:
            log_step(job, state, epoch, step, mean_dict(terms), targets, features, times)
        if state.step < first + job.steps and is_checkpoint_due(
            world, step, job.saved, config.save_minutes, job.termination.came
        ):
            save_last(job, state, epoch)
            job.termination.end()
    means = {name: value / job.steps for name, value in mean_dict(state.sums).items()}
    return means | share_of_prototypes(times.whole())


def renew_prototypes(job: SlpdRun, state: DistillationState, epoch: int, times: StepTimes) -> None:
    """Encode all regions with the teacher and cluster them, where that is due; all processes call
    this and find the same prototypes.
    """
    keys, config = job.config.prototypes, job.config
    if not (config.losses.on and keys.is_due(epoch)):
        return
    found = encode_regions(state.teacher, job.store, job.world, job.precision, keys.cluster_view)
    times.mark("encode")
    job.prototypes.slides = find_slide_prototypes(
        found.units, job.store.counts, job.store.cases, keys, config.seed
    )
    times.mark("cluster")


def add_gradients(
    job: SlpdRun,
    state: DistillationState,
    views: RegionViews,
    ids: Tensor,
    values: StepValues,
    times: StepTimes,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Compute the gradients of one step, part by part, and move the centres.

    Returns:
        The loss and its terms, each a detached scalar; the teacher's targets (T, B, K) and its
        features (B, W) of the first view.
    """
    config, device, losses = job.config, job.world.device, job.config.losses
    logits, features = ask_teacher(state, views.global_views, device, job.precision)
    targets = job.objective.make_targets(logits, state.centre, values.temperature)
    goals = make_prototype_goals(
        job.prototypes,
        ids,
        state.teacher.head.last_layer,
        values.temperature,
        losses,
        config.objective.centre_momentum,
    )
    times.mark("teacher")
    shown = [*views.global_views, *views.local_views]
    weights = prototype_weights(job, state.step)

    def compute_terms(outputs: Tensor, student_features: Tensor, part: slice) -> dict[str, Tensor]:
        goal = targets[:, part]
        terms = job.objective.compute_terms(outputs, student_features, goal, len(shown))
        return add_prototype_terms(
            terms,
            outputs.view(len(shown), -1, outputs.shape[-1]),
            goals,
            part,
            weights=weights,
            temperature=config.objective.student_temperature,
            skip_first_view=losses.skip_first_view,
            parts=config.accumulate,
        )

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
    return sums, targets, features[: len(ids)]


def prototype_weights(job: SlpdRun, step: int) -> dict[str, float]:
    """The weights of both prototype losses at a step, which grow from the first clustering on."""
    losses = job.config.losses
    done = step - job.config.prototypes.start_epoch * job.steps
    factor = ramp(done, 0.0, 1.0, round(losses.ramp * job.steps))
    return {"intra": factor * losses.intra, "inter": factor * losses.inter}


def share_of_prototypes(times: dict[str, float]) -> dict[str, float]:
    """Add `time/prototypes`, the share of an epoch that encoding and clustering took."""
    parts = {
        n: v for n, v in times.items() if n not in ("time/images_per_second", "time/data_share")
    }
    spent = sum(parts.get(f"time/{name}", 0.0) for name in ("encode", "cluster"))
    return times | ({"time/prototypes": spent / sum(parts.values())} if parts else {})


def log_step(
    job: SlpdRun,
    state: DistillationState,
    epoch: int,
    step: int,
    terms: dict[str, float],
    targets: Tensor,
    features: Tensor,
    times: StepTimes,
) -> None:
    """Write a line of metrics.jsonl, and stop the run when it has collapsed."""
    measured = measure_training(targets, features)
    temperature = job.config.objective.student_temperature
    spread = (state.centre / temperature).softmax(dim=0)
    measured["centre_entropy"] = torch.special.entr(spread).sum().item()
    line = {**terms, **measured, **job.schedules.at(step).rates(), **times.report()}
    job.run.log({"epoch": epoch + 1, "step": step, **line})
    job.recent.add(measured, step)


def save_last(job: SlpdRun, state: DistillationState, epoch: int) -> None:
    """Write the checkpoint that a resumed run takes up; all processes call this."""
    if job.world.is_main:
        more = {"recent": job.recent.rows, "prototypes": job.prototypes.state_dict()}
        state.save(job.run.last, to_dict(job.config), epoch, **more)
    job.saved = time.monotonic()


def end_epoch(
    job: SlpdRun, state: DistillationState, epoch: int, values: dict[str, float]
) -> dict[str, float]:
    """Probe, log and save after `epoch` epochs; all processes call this.

    Returns:
        The line of metrics.jsonl.
    """
    step_values = job.schedules.at(state.step - 1)
    line = {**values, "lr": step_values.lr, "weight_decay": step_values.weight_decay}
    line["steps"] = state.step
    if job.prototypes.slides:
        line |= job.prototypes.slides.describe()
    if job.probe and (epoch % job.config.probe.every == 0 or epoch == job.config.epochs):
        found = encode_regions(state.teacher, job.store, job.world, job.precision)
        line |= job.probe.score(found.features) if job.world.is_main else {}
    state.sums = {}
    report_epoch(job.run, epoch, job.config.epochs, line, REPORTED)
    save_last(job, state, epoch)
    if job.world.is_main:
        save_backbone(job.run.path / "backbone.pt", state.teacher.backbone)
    return line


def describe_network(
    config: Config, store: RegionStore, recipe: RegionViewRecipe
) -> RegionEncoderDescription:
    """The region encoder as it is built and used."""
    network = config.network
    sizes = (store.width, store.region_tiles, network.width, network.depth, network.heads)
    options = (recipe.global_side, store.standardise, store.regions.encoder)
    return RegionEncoderDescription(*sizes, *options)


def prepare_networks(job: SlpdRun) -> DistillationState:
    """Student and teacher on their device, with optimiser and gradient scaler."""
    config, training = job.config, job.config.training
    description = describe_network(config, job.store, job.recipe)
    student = config.network.build(description).to(job.world.device)
    rates = (training.lr, training.weight_decay)
    named = {"compiled": config.compile}
    return prepare_state(student, training.optimizer, rates, job.world, job.precision, **named)


def open_job(config: Config, world: World) -> SlpdRun:
    """Everything that a step needs beside the networks."""
    precision, store = pick_precision(config.precision, world.device), open_store(config)
    if len(store) < config.batch_size:
        raise UserError(
            f"batch_size={config.batch_size}: expected at most the {len(store)} regions of "
            f"{config.regions}; lower it"
        )
    if config.losses.on:
        config.prototypes.check(store.counts, store.cases)
    steps = len(store) // config.batch_size
    schedules = config.training.schedules(steps, config.epochs, config.batch_size, config.objective)
    recipe = config.views.build(store.region_tiles)
    probe = make_region_probe(config.probe, config.labels, store)
    inputs = {"regions": store.digest, "patients": sha256_bytes("\n".join(store.cases).encode())}
    options = {"overwrite": config.overwrite, "tracker": config.tracker}
    run = open_run(config.output, config, world, inputs=inputs, **options)
    recent = RecentValues(config.network.out_dim, schedules.warmup, "region")
    objective = config.objective.build()
    return SlpdRun(
        config, world, run, precision, store, recipe, objective, schedules, steps, recent, probe
    )


def main(config: Config) -> int:
    """Train, and leave region encoder, checkpoints and logs in the run directory."""
    world = init_distributed(config.device)
    config.objective.check(share_batch(config.batch_size, world.size, config.accumulate))
    job = open_job(config, world)
    if job.run.results is not None:
        logger.info("%s: %s is finished: %s", STAGE, job.run.path, job.run.results)
        return 0
    seed_everything(config.seed)
    state = prepare_networks(job)
    start = resume(job, state)
    if world.is_main:
        write_region_encoder(job.run.path, describe_network(config, job.store, job.recipe))
        if config.keep_start and state.step == 0:
            save_backbone(job.run.path / "backbone_start.pt", state.teacher.backbone)
    line: dict[str, float] = {}
    with job.termination:
        for epoch in range(start, config.epochs):
            values = train_one_epoch(job, state, epoch)
            line = end_epoch(job, state, epoch + 1, values)
    if world.is_main:
        share_backbone(job.run.path, DESCRIPTION, to_dict(config))
    job.run.finish({name: v for name, v in line.items() if not name.startswith("time/")})
    job.store.close()
    if world.is_main:
        drop_predecessor(job.run.last)
    return 0


def resume(job: SlpdRun, state: DistillationState) -> int:
    """Take up the last checkpoint; epochs that are completed."""
    content: Mapping = take_up(job.run, state, STAGE)
    if content:
        job.recent.rows = content["recent"]
        job.prototypes.load_state_dict(content["prototypes"], job.world.device)
    return content.get("epoch", 0)


if __name__ == "__main__":
    launch(main, Config)
