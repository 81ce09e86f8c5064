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

Deep is the 256-128-64 tile network of the classical MIL benchmarks (MI-Net, whose layers ABMIL
keeps): a MIL model behind further fully connected layers, the last of the three being the model's
own embedding. SIMPLE names the rows that a deep method has to beat: mean, max and min of a bag's
instances into an SVM or a logistic model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.classic.vmap_training import StackedRecipe
from mil.models import ABMIL, DSMIL, DTFD, build
from mil.models.output import MILOutput, Packed, Target, initialise

SIMPLE = ("rbf_svm", "logistic")


def pool_bags(bags: Sequence[Float[np.ndarray, "_ d"]]) -> Float[np.ndarray, "b three_d"]:
    """Mean, max and min over the instances, side by side."""
    return np.stack([np.concatenate([bag.mean(0), bag.max(0), bag.min(0)]) for bag in bags])


def build_baseline(name: str) -> Any:
    """A pipeline of standardisation and `rbf_svm` (C = 3) or `logistic` (C = 0.05)."""
    from sklearn.linear_model import LogisticRegression  # a while to load
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    model = SVC(C=3.0) if name == "rbf_svm" else LogisticRegression(C=0.05, max_iter=2000)
    return make_pipeline(StandardScaler(), model)


def predict_simple(
    name: str, vectors: Float[np.ndarray, "b f"], targets: Int[np.ndarray, " b"], test: np.ndarray
) -> Int[np.ndarray, " t"]:
    """Classes of the test bags by a model of the others, standardised by the others."""
    return build_baseline(name).fit(vectors[~test], targets[~test]).predict(vectors[test])


class Deep(nn.Module):
    """Linear, ReLU for each of `widths`, then the model.

    Args:
        model: a MIL model with `forward_packed` for features as wide as the last of `widths`.
        dim: feature width D.
        widths: of the layers.
    """

    model: Any  # one of MODELS

    def __init__(self, model: nn.Module, dim: int, widths: tuple[int, ...] = (256, 128)) -> None:
        super().__init__()
        pairs = zip([dim, *widths], widths, strict=False)
        self.layers = nn.Sequential(
            *(layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU()))
        )
        initialise(self.layers)
        self.model = model

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """As the model's."""
        return self.model(self.layers(features), coords, target)

    def forward_packed(self, features: Float[Tensor, "t d"], offsets: Int[Tensor, " b1"]) -> Packed:
        """As the model's."""
        return self.model.forward_packed(self.layers(features), offsets)


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
