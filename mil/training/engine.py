"""Training and applying a slide classifier, one bag at a time.

Recipe: TS2G-KD's MIL stage: Adam, cosine to 0 by epoch, cross-entropy, early stopping, selection by
validation AUC.
Differences: accumulated gradients are a mean over their bags (the original zeroes them at every
bag), the threshold comes from the validation slides (the original takes the evaluated ones), and a
run can be resumed bit for bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.checkpoint import load_checkpoint, load_weights, resume, save_checkpoint
from common.config import key
from common.device import autocast
from common.distributed import World, all_reduce_mean, unwrap, wrap
from common.errors import UserError
from common.optim import (
    OPTIMIZERS,
    clip_gradients,
    exchange_gradients,
    group_batches,
    make_optimizer,
    require_finite,
    set_lr,
    trainable,
)
from common.run import Run
from common.schedules import SCHEDULES, drop_epoch, lr_factor
from common.seed import epoch_generator
from mil.datasets.bags import Sample
from mil.models import MILOutput, Target, build
from mil.tasks.base import Task
from mil.tasks.classification import Classification
from mil.training.prediction import grid_for, is_streamed, predict
from mil.training.prefetch import on_device, prefetch
from mil.training.streaming import stream

logger = logging.getLogger(__name__)
CLASSES = Classification()  # the criterion of one class per slide, without its names


@dataclass
class Recipe:
    """How a slide classifier is trained; the defaults are TS2G-KD's, other models' are in
    mil/training/recipes.py.
    """

    epochs: int = key(200, "epochs, and the length of the cosine schedule")
    patience: int = key(
        20,
        "stop after so many epochs without a better validation AUC (or equal AUC and lower loss)",
    )
    min_epochs: int = key(70, "do not stop early before this epoch")
    optimizer: str = key("adam", "optimiser", choices=OPTIMIZERS)
    lr: float = key(2e-4, "learning rate at the start")
    weight_decay: float = key(1e-5, "weight decay")
    beta1: float = key(0.9, "decay of the optimiser's mean of gradients")
    beta2: float = key(0.999, "decay of the optimiser's mean of squared gradients")
    schedule: str = key(
        "cosine",
        "learning rate over the run: constant, one drop, or half a cosine",
        choices=SCHEDULES,
    )
    lr_drop: int = key(0, "epoch after which the learning rate drops, once; 0: half-way")
    lr_drop_factor: float = key(0.2, "factor of the learning rate from its drop on")
    lr_min: float = key(0.0, "learning rate at the end of the cosine")
    clip_norm: float = key(0.0, "largest L2 norm of the gradients of a step; 0: any")
    accumulate: int = key(
        1, "bags per optimiser step, over all processes; their gradients are averaged"
    )
    max_tiles: int = key(
        0, "tiles of a bag that a training step sees, drawn anew in every epoch; 0: all of them"
    )
    smoothing: float = key(
        0.0,
        "average of the validation score over epochs, s * past + (1 - s) * new; 0: the score "
        "itself",
    )
    label_smoothing: float = key(0.0, "label smoothing of task=classes and task=multilabel")
    focal: float = key(
        0.0, "gamma of the focal loss of task=classes and task=multilabel; 0: cross-entropy"
    )
    class_weights: bool = key(
        False, "weigh the loss by inverse class frequency, mean 1 over the training slides"
    )
    balanced: bool = key(
        False, "draw the bags of an epoch with replacement, every class equally often"
    )
    precision: str = key("fp32", "computing precision", choices=("fp32", "bf16"))
    save_every: int = key(10, "epochs between two checkpoints", runtime=True)


def train_one_epoch(
    model: nn.Module,
    samples: Sequence[Sample],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    world: World,
    order: Sequence[int],
    epoch: int = 0,
    task: Task = CLASSES,
    seed: int = 0,
) -> float:
    """One pass over the training bags in the given order, after `epoch` others; returns the mean
    loss.
    """
    model.train()
    after_step = getattr(unwrap(model), "after_step", None)
    steps = -(-len(order) // recipe.accumulate)
    weights = class_weights(samples) if recipe.class_weights and task.weighs_bags else {}
    total = torch.zeros(1, device=world.device)
    groups = list(group_batches(range(len(order)), recipe.accumulate))
    # gradients are averaged over processes, so that each process sums loss * size / len(group);
    # a process that has no bag in a last, short group repeats one at weight 0 to take part in the
    # average
    taken = [group[world.rank :: world.size] or group[:1] for group in groups]
    bags = draws(
        [(samples[order[place]], place) for part in taken for place in part],
        recipe.max_tiles,
        seed + epoch,
    )
    loaded = prefetch(bags, world.device)
    for step, (group, places) in enumerate(
        zip(groups, taken, strict=True), start=epoch * steps + 1
    ):
        optimizer.zero_grad(set_to_none=True)
        mine = len(group) > world.rank
        share = world.size / len(group) if mine else 0.0
        outputs, targets = [], []
        for sample, bag in islice(loaded, len(places)):
            with (
                exchange_gradients(model, last=len(targets) + 1 == len(places)),
                autocast(world.device, recipe.precision),
            ):
                output = model(
                    *on_device(bag, world.device),
                    target=task.evidence(sample.target),
                    **grid_for(model, sample),
                )
                targets.append(sample.target)
                if task.needs_all_bags:
                    outputs.append(output)
                    continue
                loss = training_loss(output, sample.target, task) * weights.get(sample.target, 1.0)
                require_finite(loss, f"slide {sample.slide_id}", remedy="lower training.lr")
                (loss * share).backward()
            total += loss.detach() * mine
        if outputs:
            loss = task.step_loss(outputs, targets)
            require_finite(loss, f"step {step}", remedy="lower training.lr")
            loss.backward()
            total += loss.detach() * len(group)
        clip_gradients(model, recipe.clip_norm)
        optimizer.step()
        if after_step is not None:
            after_step(step / (recipe.epochs * steps))
    return float(all_reduce_mean(total)) * world.size / len(order)


def training_loss(output: MILOutput, target: Target, task: Task = CLASSES) -> Float[Tensor, ""]:
    """Weighted criteria of the output's streams (of its logits where it has none) plus its
    auxiliary loss.
    """
    loss = sum(
        weight * task.loss(logits, target)
        for logits, weight in output.streams or ((output.logits, 1.0),)
    )
    return loss if output.auxiliary is None else loss + output.auxiliary


def draws(
    bags: Sequence[tuple[Sample, int]], tiles: int, seed: int
) -> Iterator[tuple[Sample, Tensor | None]]:
    """Each sample with its tiles of this pass: all (None), or `tiles` of them in the order of the
    bag.

    The draw depends on the seed and the bag's place in the epoch alone, not on who loads it.
    """
    for sample, place in bags:
        if not 0 < tiles < len(sample.bag):
            yield sample, None
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
        yield (
            sample,
            torch.randperm(len(sample.bag), generator=generator)[:tiles].sort().values,
        )


def class_weights(samples: Sequence[Sample]) -> dict[int, float]:
    """S / (C n_c) for every class c: mean 1 over the samples."""
    targets = [stratum_of(sample) for sample in samples]
    present = set(targets)
    return {c: len(targets) / (len(present) * targets.count(c)) for c in present}


def stratum_of(sample: Sample) -> int:
    """The class of a bag, or what stands for it."""
    return sample.target if isinstance(sample.target, int) else sample.stratum


def epoch_order(samples: Sequence[Sample], balanced: bool, generator: torch.Generator) -> list[int]:
    """Indices of an epoch's bags: all of them shuffled, or as many drawn with every class equally
    likely.
    """
    if not balanced:
        return torch.randperm(len(samples), generator=generator).tolist()
    weights = class_weights(samples)
    odds = torch.tensor([weights[stratum_of(sample)] for sample in samples], dtype=torch.float64)
    return torch.multinomial(odds, len(samples), replacement=True, generator=generator).tolist()


@torch.inference_mode()
def examine(model: nn.Module, sample: Sample, device: torch.device) -> MILOutput:
    """Logits and attention of one bag, fp32, on the CPU; a very large one is streamed, as in
    `predict`.
    """
    model.eval()
    if is_streamed(model, sample.bag):
        return stream(model, sample.bag, device)
    output = model(*on_device(sample.load(), device), **grid_for(model, sample))
    return MILOutput(output.logits.float().cpu(), output.attention.float().cpu())


def validate(
    model: nn.Module,
    samples: Sequence[Sample],
    device: torch.device,
    precision: str,
    task: Task = CLASSES,
) -> dict[str, float]:
    """The task's score, its loss and, with two classes, Youden's threshold on the validation
    bags.
    """
    logits = predict(model, samples, device, precision)
    return task.measure(logits, [sample.target for sample in samples])


def is_better(value: Mapping[str, Any], best: Mapping[str, Any], score: str = "auc") -> bool:
    """Higher validation score, or the same with a lower loss; a score that is not a number is below
    all others.
    """
    return not best or _rank(value, score) > _rank(best, score)


def _rank(value: Mapping[str, Any], score: str) -> tuple[float, float]:
    known = not math.isnan(value[score])
    return (value[score] if known else -math.inf), -value["loss"]


class Smoother:
    """Moving average of the validation score and loss, by which epochs are compared: s * past + (1
    - s) * new.

    Starts at the first epoch's values; with s = 0 it is the values themselves.
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share < 1:
            raise UserError(
                f"training.smoothing={share}: expected the share of the past, 0 <= smoothing < 1"
            )
        self.share, self.values = share, {}

    def __call__(self, values: Mapping[str, float], score: str) -> dict[str, float]:
        """The averages after one more epoch."""
        new = {name: values[name] for name in (score, "loss")}
        self.values = {name: self._mean(self.values.get(name, math.nan), new[name]) for name in new}
        return dict(self.values)

    def _mean(self, past: float, new: float) -> float:
        """What is no number (a score of slides that cannot be ranked) leaves the average alone."""
        if not self.share or math.isnan(past):
            return new
        return past if math.isnan(new) else self.share * past + (1 - self.share) * new

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return dict(self.values)

    def load_state_dict(self, values: Mapping[str, float]) -> None:
        """Go on from a checkpoint."""
        self.values = dict(values)


def is_over(epoch: int, best: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether training ends after `epoch` completed epochs."""
    if epoch >= recipe.epochs:
        return True
    return bool(best) and epoch >= recipe.min_epochs and epoch - best["epoch"] >= recipe.patience


def check_recipe(recipe: Recipe, task: Task, world: World) -> None:
    """Refuse what does not go together, before any work."""
    if recipe.accumulate % world.size:
        raise UserError(
            f"training.accumulate={recipe.accumulate}: expected a multiple of the number of "
            f"processes, {world.size}"
        )
    if task.needs_all_bags and (world.size > 1 or recipe.accumulate < 2):
        raise UserError(
            f"task={task.kind}: expected one process and training.accumulate of 2 or more, the "
            "slides that are compared in a "
            f"step; found {world.size} and {recipe.accumulate}"
        )
    if recipe.max_tiles < 0:
        raise UserError(
            f"training.max_tiles={recipe.max_tiles}: expected a number of tiles, or 0 for all"
        )


def check_validation(targets: Sequence[Target], task: Task) -> None:
    """Refuse or report validation slides among which there is nothing to rank: the score would be
    no number at every epoch.
    """
    score = task.measure(torch.zeros(len(targets), task.outputs), targets)[task.score]
    if not math.isnan(score):
        return
    found = (
        f"task={task.kind}: {len(targets)} validation slides, among which val_{task.score} "
        "has nothing to compare"
    )
    if task.needs_all_bags:  # nor has the loss
        raise UserError(
            f"{found}; expected an event and a slide that was followed for longer: use fewer "
            "folds or other splits"
        )
    logger.warning(
        "%s: the best epoch is the one with the lowest loss; use fewer folds or other splits", found
    )


def train_model(
    model: nn.Module,
    train: Sequence[Sample],
    val: Sequence[Sample],
    recipe: Recipe,
    seed: int,
    run: Run,
    config: dict[str, Any],
    world: World,
    task: Task = CLASSES,
) -> dict[str, Any]:
    """Train, or go on from the run's last checkpoint, and leave the model with its best weights.

    Args:
        model: on the world's device, freshly initialised.
        train, val: bags of the two sets.
        recipe: training settings.
        seed: decides the order of the bags.
        run: gets metrics.jsonl, checkpoint_last.pt and checkpoint_best.pt.
        config: plain dict from which `load_classifier` rebuilds the model.
        world: processes; `recipe.accumulate` bags a step are shared out among them.
        task: what the slides are asked.

    Returns:
        Validation score under its name (`auc`), `loss`, `epoch` and `threshold` of the best epoch,
        and `epochs` that were run.

    Raises:
        UserError: the loss is not finite; fewer bags a step than processes; a recipe that the task
            does not go with.
    """
    check_recipe(recipe, task, world)
    betas = (recipe.beta1, recipe.beta2)
    optimizer = make_optimizer(
        recipe.optimizer, trainable(model), recipe.lr, recipe.weight_decay, betas
    )
    smoother = Smoother(recipe.smoothing)
    parts = {"optimizer": optimizer} | ({"smoother": smoother} if recipe.smoothing else {})
    epoch, best = resume(run.last, model, **parts)
    run.forget_after(epoch)
    parallel = wrap(model, world)
    while not is_over(epoch, best, recipe):
        set_lr(optimizer, recipe_factor(recipe, epoch))
        order = epoch_order(train, recipe.balanced, epoch_generator(seed, epoch))
        loss = train_one_epoch(parallel, train, optimizer, recipe, world, order, epoch, task, seed)
        values = validate(model, val, world.device, recipe.precision, task)
        compared = smoother(values, task.score)
        epoch += 1
        line = {
            "epoch": epoch,
            "lr": optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            f"val_{task.score}": values[task.score],
        }
        line |= {"val_loss": values["loss"]}
        run.log(
            line
            | ({f"val_{task.score}_smoothed": compared[task.score]} if recipe.smoothing else {})
        )
        if is_better(compared, best.get("compared", best), task.score):
            best = values | ({"compared": compared} if recipe.smoothing else {})
            best |= {"epoch": epoch, "model": weights_on_cpu(model)}
        if world.is_main and (epoch % recipe.save_every == 0 or is_over(epoch, best, recipe)):
            save_epoch(run, model, config, epoch, best, parts)
    model.load_state_dict(best["model"])
    return without_weights(best) | {"epochs": epoch}


def recipe_factor(recipe: Recipe, epoch: int) -> float:
    """Learning rate of an epoch as a share of the recipe's."""
    return lr_factor(
        recipe.schedule,
        epoch,
        recipe.epochs,
        drop=drop_epoch(recipe.lr_drop, recipe.epochs),
        drop_factor=recipe.lr_drop_factor,
        floor=recipe.lr_min / recipe.lr if recipe.lr else 0.0,
    )


def weights_on_cpu(model: nn.Module) -> dict[str, Tensor]:
    """A copy that further training leaves alone."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def without_weights(best: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the best epoch besides its weights."""
    return {name: value for name, value in best.items() if name != "model"}


def save_epoch(
    run: Run,
    model: nn.Module,
    config: dict[str, Any],
    epoch: int,
    best: Mapping[str, Any],
    parts: Mapping[str, Any],
) -> None:
    """The run's last checkpoint, with all that resuming needs, and its best one."""
    states = {name: part.state_dict() for name, part in parts.items()}
    save_checkpoint(
        run.last, model=model.state_dict(), config=config, epoch=epoch, best=dict(best), **states
    )
    save_checkpoint(
        run.best,
        model=best["model"],
        config=config,
        epoch=best["epoch"],
        best=without_weights(best),
    )


def load_classifier(path: str | Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """A trained slide classifier and its checkpoint content, from the file alone."""
    content = load_checkpoint(path, "a slide classifier's checkpoint")
    if "network" not in content["config"]:
        raise UserError(
            f"{path}: expected a slide classifier's checkpoint, found config keys "
            f"{sorted(content['config'])}"
        )
    model = build(**content["config"]["network"])
    load_weights(model, content["model"], str(path))
    return model.to(device).eval(), content
