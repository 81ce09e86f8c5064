"""Training and applying a slide classifier, one bag at a time.

Recipe: TS2G-KD's MIL stage: Adam, cosine to 0 by epoch, cross-entropy, early stopping, selection by validation AUC.
Differences: accumulated gradients are a mean over their bags (the original zeroes them at every bag), the threshold
comes from the validation slides (the original takes the evaluated ones), and a run can be resumed bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from common.checkpoint import load_checkpoint, load_weights, resume, save_checkpoint
from common.config import key
from common.device import autocast
from common.distributed import World, all_reduce_mean, unwrap, wrap
from common.errors import UserError
from common.run import Run
from common.seed import epoch_generator
from mil.metrics import auc, youden_threshold
from mil.models import MILOutput, build
from mil.optim import OPTIMIZERS, SCHEDULES, lr_factor, make_optimizer


@dataclass
class Recipe:
    """How a slide classifier is trained; the defaults are TS2G-KD's, other models' are in mil/recipes.py."""

    epochs: int = key(200, "epochs, and the length of the cosine schedule")
    patience: int = key(20, "stop after so many epochs without a better validation AUC (or equal AUC and lower loss)")
    min_epochs: int = key(70, "do not stop early before this epoch")
    optimizer: str = key("adam", "optimiser", choices=OPTIMIZERS)
    lr: float = key(2e-4, "learning rate at the start")
    weight_decay: float = key(1e-5, "weight decay")
    beta1: float = key(0.9, "decay of the optimiser's mean of gradients")
    beta2: float = key(0.999, "decay of the optimiser's mean of squared gradients")
    schedule: str = key("cosine", "learning rate by epoch; step: x 0.2 half-way", choices=SCHEDULES)
    lr_min: float = key(0.0, "learning rate at the end of the cosine")
    clip_norm: float = key(0.0, "largest gradient norm; 0: gradients are not clipped")
    accumulate: int = key(1, "bags per optimiser step, over all processes; their gradients are averaged")
    class_weights: bool = key(False, "weigh the loss by inverse class frequency, mean 1 over the training slides")
    balanced: bool = key(False, "draw the bags of an epoch with replacement, every class equally often")
    precision: str = key("fp32", "computing precision", choices=("fp32", "bf16"))
    save_every: int = key(10, "epochs between two checkpoints", runtime=True)


@dataclass(frozen=True)
class Sample:
    """One labelled bag: features (N, D), coords (N, 2) or None, class index."""

    slide_id: str
    features: Tensor
    coords: Tensor | None
    target: int

    def to(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Features and coords on the device."""
        coords = None if self.coords is None else self.coords.to(device, non_blocking=True)
        return self.features.to(device, non_blocking=True), coords


def train_one_epoch(
    model: nn.Module,
    samples: Sequence[Sample],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    world: World,
    order: Sequence[int],
    epoch: int = 0,
) -> float:
    """One pass over the training bags in the given order, after `epoch` others; returns the mean loss."""
    model.train()
    after_step = getattr(unwrap(model), "after_step", None)
    steps = -(-len(order) // recipe.accumulate)
    weights = class_weights(samples) if recipe.class_weights else {}
    total = torch.zeros(1, device=world.device)
    for step, group in enumerate(batches(order, recipe.accumulate), start=epoch * steps + 1):
        optimizer.zero_grad(set_to_none=True)
        # gradients are averaged over processes, so that each process sums loss * size / len(group);
        # a process that has no bag in a last, short group repeats one at weight 0 to take part in the average
        mine = group[world.rank :: world.size]
        share = world.size / len(group) if mine else 0.0
        taken = mine or group[:1]
        for place, sample in enumerate((samples[index] for index in taken), start=1):
            with _sync(model, place == len(taken)), autocast(world.device, recipe.precision):
                output = model(*sample.to(world.device), target=sample.target)
                loss = training_loss(output, sample.target) * weights.get(sample.target, 1.0)
                if not torch.isfinite(loss):
                    raise UserError(
                        f"slide {sample.slide_id}: expected a finite loss, found {float(loss.detach())}; lower training.lr"
                    )
                (loss * share).backward()
            total += loss.detach() * bool(mine)
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        if after_step is not None:
            after_step(step / (recipe.epochs * steps))
    return float(all_reduce_mean(total)) * world.size / len(order)


def training_loss(output: MILOutput, target: int) -> Float[Tensor, ""]:
    """Weighted criteria of the output's streams (of its logits where it has none) plus its auxiliary loss."""
    loss = sum(weight * bag_loss(logits, target) for logits, weight in output.streams or ((output.logits, 1.0),))
    return loss if output.auxiliary is None else loss + output.auxiliary


def bag_loss(logits: Float[Tensor, " c"], target: int) -> Float[Tensor, ""]:
    """Cross-entropy of one bag, in fp32."""
    return cross_entropy(logits.float()[None], torch.tensor([target], device=logits.device))


def class_weights(samples: Sequence[Sample]) -> dict[int, float]:
    """S / (C n_c) for every class c: mean 1 over the samples."""
    targets = [sample.target for sample in samples]
    present = set(targets)
    return {c: len(targets) / (len(present) * targets.count(c)) for c in present}


def epoch_order(samples: Sequence[Sample], balanced: bool, generator: torch.Generator) -> list[int]:
    """Indices of an epoch's bags: all of them shuffled, or as many drawn with every class equally likely."""
    if not balanced:
        return torch.randperm(len(samples), generator=generator).tolist()
    weights = class_weights(samples)
    odds = torch.tensor([weights[sample.target] for sample in samples], dtype=torch.float64)
    return torch.multinomial(odds, len(samples), replacement=True, generator=generator).tolist()


def batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive groups of `size`; the last may be shorter."""
    return (order[start : start + size] for start in range(0, len(order), size))


def _sync(model: nn.Module, last: bool) -> Any:
    """DDP averages gradients at the last bag of a step only."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


@torch.inference_mode()
def predict(model: nn.Module, samples: Sequence[Sample], device: torch.device, precision: str = "fp32") -> Float[Tensor, "s c"]:
    """Logits (S, C) of the samples, on the CPU."""
    model.eval()
    with autocast(device, precision):
        logits = [model(*sample.to(device)).logits.float() for sample in samples]
    return torch.stack(logits).cpu()


@torch.inference_mode()
def examine(model: nn.Module, sample: Sample, device: torch.device) -> MILOutput:
    """Logits and attention of one bag, fp32, on the CPU."""
    model.eval()
    output = model(*sample.to(device))
    return MILOutput(output.logits.float().cpu(), output.attention.float().cpu())


def validate(model: nn.Module, samples: Sequence[Sample], device: torch.device, precision: str) -> dict[str, float]:
    """AUC, loss and, with two classes, Youden's threshold on the validation bags."""
    logits = predict(model, samples, device, precision)
    targets = torch.tensor([sample.target for sample in samples])
    probabilities = logits.softmax(1).numpy()
    values = {"auc": float(auc(targets.numpy(), probabilities)[0]), "loss": float(cross_entropy(logits, targets))}
    if logits.shape[1] == 2:
        values["threshold"] = youden_threshold(targets.numpy() == 1, probabilities[:, 1])
    return values


def is_better(value: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Higher validation AUC, or the same with a lower loss."""
    return not best or (value["auc"], -value["loss"]) > (best["auc"], -best["loss"])


def is_over(epoch: int, best: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether training ends after `epoch` completed epochs."""
    if epoch >= recipe.epochs:
        return True
    return bool(best) and epoch >= recipe.min_epochs and epoch - best["epoch"] >= recipe.patience


def train_model(
    model: nn.Module,
    train: Sequence[Sample],
    val: Sequence[Sample],
    recipe: Recipe,
    seed: int,
    run: Run,
    config: dict[str, Any],
    world: World,
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

    Returns:
        Validation `auc`, `loss`, `epoch` and `threshold` of the best epoch, and `epochs` that were run.

    Raises:
        UserError: the loss is not finite; fewer bags a step than processes.
    """
    if recipe.accumulate % world.size:
        raise UserError(
            f"training.accumulate={recipe.accumulate}: expected a multiple of the number of processes, {world.size}"
        )
    betas = (recipe.beta1, recipe.beta2)
    optimizer = make_optimizer(recipe.optimizer, model, recipe.lr, recipe.weight_decay, betas)
    floor = recipe.lr_min / recipe.lr if recipe.lr else 0.0
    factor = partial(lr_factor, recipe.schedule, epochs=recipe.epochs, floor=floor)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    epoch, best = resume(run.last, model, optimizer=optimizer, scheduler=scheduler)
    run.forget_after(epoch)
    parallel = wrap(model, world)
    while not is_over(epoch, best, recipe):
        order = epoch_order(train, recipe.balanced, epoch_generator(seed, epoch))
        loss = train_one_epoch(parallel, train, optimizer, recipe, world, order, epoch)
        values = validate(model, val, world.device, recipe.precision)
        run.log(
            {
                "epoch": epoch + 1,
                "lr": scheduler.get_last_lr()[0],
                "train_loss": loss,
                "val_auc": values["auc"],
                "val_loss": values["loss"],
            }
        )
        scheduler.step()
        epoch += 1
        if is_better(values, best):
            best = {
                **values,
                "epoch": epoch,
                "model": {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()},
            }
        if world.is_main and (epoch % recipe.save_every == 0 or is_over(epoch, best, recipe)):
            states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            save_checkpoint(run.last, model=model.state_dict(), config=config, epoch=epoch, best=best, **states)
            summary = {name: value for name, value in best.items() if name != "model"}
            save_checkpoint(run.best, model=best["model"], config=config, epoch=best["epoch"], best=summary)
    model.load_state_dict(best["model"])
    return {name: value for name, value in best.items() if name != "model"} | {"epochs": epoch}


def load_classifier(path: str | Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """A trained slide classifier and its checkpoint content, from the file alone."""
    content = load_checkpoint(path, "a slide classifier's checkpoint")
    if "network" not in content["config"]:
        raise UserError(f"{path}: expected a slide classifier's checkpoint, found config keys {sorted(content['config'])}")
    model = build(**content["config"]["network"])
    load_weights(model, content["model"], str(path))
    return model.to(device).eval(), content
