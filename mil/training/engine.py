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
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mil.datasets.bags import Sample
from mil.models import build
from mil.models.output import MILOutput, Target
from mil.tasks.base import Task
from mil.tasks.classification import Classification
from mil.training.epochs import Smoother, class_weights, draws, epoch_order, is_better, is_over
from mil.training.prediction import is_streamed, on_device, predict, prefetch, side_inputs
from mil.training.recipes import Recipe, check_recipe, recipe_factor
from mil.training.streaming import stream
from wsi_common.checkpoint import load_checkpoint, load_weights, resume, save_checkpoint
from wsi_common.device import autocast
from wsi_common.distributed import World, all_reduce_mean, unwrap, wrap
from wsi_common.errors import UserError
from wsi_common.optim import (
    clip_gradients,
    exchange_gradients,
    group_batches,
    make_optimizer,
    require_finite,
    set_lr,
    trainable,
)
from wsi_common.run import Run
from wsi_common.seed import epoch_generator

logger = logging.getLogger(__name__)
CLASSES = Classification()  # the criterion of one class per slide, without its names


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
    first = epoch * steps + 1
    for step, (group, places) in enumerate(zip(groups, taken, strict=True), start=first):
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
                    **side_inputs(model, sample),
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
    streams = output.streams or ((output.logits, 1.0),)
    loss = sum(weight * task.loss(logits, target) for logits, weight in streams)
    return loss if output.auxiliary is None else loss + output.auxiliary


@torch.inference_mode()
def examine(model: nn.Module, sample: Sample, device: torch.device) -> MILOutput:
    """Logits and attention of one bag, fp32, on the CPU; a very large one is streamed, as in
    `predict`.
    """
    model.eval()
    if is_streamed(model, sample.bag):
        return stream(model, sample.bag, device, covariates=sample.covariates)
    output = model(*on_device(sample.load(), device), **side_inputs(model, sample))
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
        config: plain dict from which `load_trained_model` rebuilds the model.
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
    rates = (recipe.lr, recipe.weight_decay, (recipe.beta1, recipe.beta2))
    optimizer = make_optimizer(recipe.optimizer, trainable(model), *rates)
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
        line = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "train_loss": loss}
        line |= {f"val_{task.score}": values[task.score], "val_loss": values["loss"]}
        if recipe.smoothing:
            line[f"val_{task.score}_smoothed"] = compared[task.score]
        run.log(line)
        if is_better(compared, best.get("compared", best), task.score):
            best = values | ({"compared": compared} if recipe.smoothing else {})
            best |= {"epoch": epoch, "model": weights_on_cpu(model)}
        if world.is_main and (epoch % recipe.save_every == 0 or is_over(epoch, best, recipe)):
            save_epoch(run, model, config, epoch, best, parts)
    model.load_state_dict(best["model"])
    return without_weights(best) | {"epochs": epoch}


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
    kept = {"epoch": best["epoch"], "best": without_weights(best)}
    save_checkpoint(run.best, model=best["model"], config=config, **kept)


def load_trained_model(path: str | Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
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
