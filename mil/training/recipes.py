"""How a slide classifier is trained: the keys of a recipe, and the published recipe of each model,
which `training.*` and `dropout` are where they are not given.

TS2G-KD's recipe (the defaults of Recipe) is that of Mean, Max, ABMIL and, by our choice,
DeformMIL; RRT-MIL and MHIM-MIL share all of it but when they stop. Each entry names its source;
what the engine does otherwise is said beside it. Selection is by validation AUC and the loss is the
task's own in all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from mil.models import check_option
from mil.tasks.base import Task
from wsi_common.config import key
from wsi_common.distributed import World
from wsi_common.errors import UserError, did_you_mean
from wsi_common.optim import OPTIMIZERS
from wsi_common.schedules import SCHEDULES, drop_epoch, lr_factor


@dataclass
class Recipe:
    """How a slide classifier is trained; the defaults are TS2G-KD's, those of other models stand in
    PUBLISHED.
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
        1,
        "bags per optimiser step, over all processes; their gradients are averaged; for task=cox "
        "16, unless it is given",
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


@dataclass(frozen=True)
class Published:
    """Differences of a published recipe from TS2G-KD's."""

    training: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.25


# train_tcga.py of the authors; they have a sigmoid loss per class
DSMIL = Published(
    {"weight_decay": 5e-3, "beta1": 0.5, "beta2": 0.9, "lr_min": 5e-6, "patience": 200}, dropout=0.0
)
# README of the authors: weighted sampling, no schedule, early stopping from epoch 50 on (by loss;
# here by AUC)
CLAM = Published({"schedule": "constant", "min_epochs": 50, "balanced": True})
# Camelyon/TransMIL.yaml of the authors; they use half precision
TRANSMIL = Published(
    {
        "optimizer": "lookahead_radam",
        "schedule": "constant",
        "accumulate": 2,
        "patience": 10,
        "min_epochs": 0,
    },
    dropout=0.0,
)
# the authors' defaults; they clip tier by tier, select among the last fifth of the epochs and never
# stop early
DTFD = Published(
    {
        "lr": 1e-4,
        "weight_decay": 1e-4,
        "schedule": "step",
        "clip_norm": 5.0,
        "patience": 200,
        "min_epochs": 200,
    },
    dropout=0.0,
)
# config_ilra_camelyon16_imagenet.yaml of the authors
ILRA = Published(
    {"lr": 1e-4, "weight_decay": 0.0, "epochs": 100, "patience": 100, "min_epochs": 100},
    dropout=0.0,
)

# the authors' commands: class-weighted sampling and 20 epochs, of which they keep the last; they
# divide the loss by 32 in every step, which Adam undoes but for the weight decay
HIPT = Published(
    {"epochs": 20, "patience": 20, "min_epochs": 20, "schedule": "constant", "balanced": True}
)

# main.py of both repositories on Camelyon16, whose commands the models' defaults are (on TCGA 20
# and 70, as TS2G-KD)
CAMELYON16 = Published({"patience": 30, "min_epochs": 130})

# ours, not published: DT-MIL, whose idea it has, is another network; TS2G-KD's recipe unchanged
DEFORM_MIL = Published()

# dropout of the authors' code; their classical sets have a recipe of their own
# (mil/classic/recipes.py)
MINET = Published(dropout=0.5)

PUBLISHED: dict[str, Published] = {
    "dsmil": DSMIL,
    **dict.fromkeys(("clam_sb", "clam_mb"), CLAM),
    "transmil": TRANSMIL,
    "dtfd": DTFD,
    "ilra": ILRA,
    **dict.fromkeys(("rrt", "mhim_abmil", "mhim_dsmil", "mhim_transmil"), CAMELYON16),
    "deform_mil": DEFORM_MIL,
    "hipt": HIPT,
    **dict.fromkeys((f"minet_{x}" for x in ("instance", "embedding", "deep", "residual")), MINET),
}


def resolve(
    model: str,
    training: Recipe,
    dropout: float,
    given: Collection[str],
    changes: Mapping[str, Any] | None = None,
) -> tuple[Recipe, float]:
    """Recipe and dropout of a model: published < keys that were given < `changes`.

    Args:
        model: key of MODELS.
        training, dropout: the configuration's.
        given: dotted names that a file or the command line set (wsi_common.config.given_keys).
        changes: of this model alone: keys of Recipe, and `dropout`.

    Raises:
        UserError: `changes` has an unknown key or a value of another type.
    """
    published = PUBLISHED.get(model, Published())
    own = published.training.items()
    values = {name: value for name, value in own if f"training.{name}" not in given}
    if "dropout" not in given:
        dropout = published.dropout
    hints = get_type_hints(Recipe)
    allowed = {item.name: hints[item.name] for item in fields(Recipe)} | {"dropout": float}
    values |= check_option(changes or {}, allowed, f"recipes: {model}")
    for item in fields(Recipe):
        choices = item.metadata["choices"]
        if choices and values.get(item.name, choices[0]) not in choices:
            found = values[item.name]
            raise UserError(
                f"recipes: {model}: {item.name}: unknown value '{found}'; "
                f"{did_you_mean(found, choices)}"
            )
    dropout = values.pop("dropout", dropout)
    return replace(training, **values), dropout


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
            f"slides that are compared in a step; found {world.size} and {recipe.accumulate}"
        )
    if recipe.max_tiles < 0:
        raise UserError(
            f"training.max_tiles={recipe.max_tiles}: expected a number of tiles, or 0 for all"
        )


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
