"""Networks and recipes for the classical MIL sets, as published where they are.

mi-Net and MI-Net: README and code of Wang et al. (yanyongluan/MINNs): 256-128-64, ReLU, dropout
0.5, SGD with Nesterov momentum 0.9, lr / (1 + 1e-4 steps), 50 epochs, lr and L2 penalty by set; the
penalty l ||w||^2 is a weight decay of 2 l. ABMIL takes the same layers and, as far as we remember
its appendix, the same rates, with 100 epochs and early stopping on a validation set; here it has
the 50 epochs and no early stopping, an attention width of 64 and no dropout. DTFD-MIL has no
published recipe for these sets: ABMIL's, two pseudo-bags (the bags have 5 to 7 instances).
DSMIL: code of Li et al. (train_mil.py): features as they are, Adam (0.5, 0.9), lr 2e-4 with a
cosine, weight decay 5e-3, 80 epochs.
Differences: a step takes `batch_size` bags, not one, and the learning rate is scaled with it;
features are standardised by the training bags of a fold, where Wang et al. take all bags; the last
epoch counts: none is chosen, least of all by test bags.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from mil.classic.deep import Deep
from mil.classic.vmap_training import StackedRecipe
from mil.models import ABMIL, DSMIL, DTFD, build

# set -> (learning rate, L2 penalty); MINNs' README
RATES = {
    "musk1": (5e-4, 0.005),
    "musk2": (5e-4, 0.03),
    "fox": (1e-4, 0.01),
    "tiger": (5e-4, 0.005),
    "elephant": (1e-4, 0.005),
}
DSMIL_RECIPE = StackedRecipe("adam", lr=2e-4, weight_decay=5e-3, beta1=0.5, beta2=0.9, epochs=80)
ATTENTION = {"dropout": 0.0, "hidden": 64, "attention": 64}


def _abmil(dim: int, gated: bool) -> nn.Module:
    return Deep(ABMIL(128, 2, activation="tanh", gated=gated, **ATTENTION), dim)


def _minet(level: str, pooling: str = "max") -> Callable[[int], nn.Module]:
    return lambda dim: build(f"minet_{level}", dim, 2, dropout=0.5, pooling=pooling)


# method -> network for features of width D
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "mi_net": _minet("instance"),
    "mi_net_mean": _minet("instance", "mean"),
    "mi_net_lse": _minet("instance", "lse"),
    "mi_net_embedding": _minet("embedding"),
    "mi_net_deep": _minet("deep"),
    "mi_net_residual": _minet("residual"),
    "abmil": lambda dim: _abmil(dim, gated=False),
    "gated_abmil": lambda dim: _abmil(dim, gated=True),
    "dsmil": lambda dim: DSMIL(dim, 2),
    "dtfd": lambda dim: Deep(DTFD(128, 2, groups=2, **ATTENTION), dim),
}


def choose_recipe(method: str, name: str, batch_size: int, epochs: int) -> StackedRecipe:
    """The recipe of a method on a set; `epochs` 0: the published number."""
    recipe = DSMIL_RECIPE
    if method != "dsmil":
        lr, penalty = RATES[name]
        recipe = StackedRecipe("sgd", lr=lr, weight_decay=2 * penalty, beta1=0.9, decay=1e-4)
    return replace(recipe, batch_size=batch_size, epochs=epochs or recipe.epochs)
