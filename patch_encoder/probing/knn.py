"""The k-NN probe: the nearest training tiles vote, nothing is fitted.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), ICCV 2021, and
Wu et al., CVPR 2018: cosine similarity, the 20 nearest tiles, each with a vote of exp(s / 0.07).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from patch_encoder.probing.folds import INNER_FOLDS, count_groups, draw_folds
from patch_encoder.probing.scores import TilePredictions, average
from wsi_common.errors import UserError

CHUNK_BYTES = 64 << 20  # of similarities at a time


def knn_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    balanced: bool = False,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Share of the votes of each class, (T, C).

    Args:
        train_x: features (N, D).
        train_y: class indices (N,).
        test_x: features (T, D).
        classes: C.
        k: neighbours that vote; all training tiles where there are fewer.
        temperature: of the votes.
        balanced: divide the votes of a class by its share of the training tiles, so that a rare
            class is not outvoted by its number alone; DINO does not.
        device: where similarities are computed.
    """
    train = normalize(torch.as_tensor(train_x, dtype=torch.float32, device=device))
    test = normalize(torch.as_tensor(test_x, dtype=torch.float32, device=device))
    labels = torch.as_tensor(train_y, device=device)
    counts = torch.bincount(labels, minlength=classes)
    weights = len(train) / counts.clamp(min=1) if balanced else torch.ones_like(train[0, :1])
    parts = []
    for part in test.split(max(1, CHUNK_BYTES // (4 * len(train)))):
        votes, nearest = weigh_neighbours(part, train, k, temperature)
        shares = votes.new_zeros(len(part), classes)
        parts.append(shares.scatter_add_(1, labels[nearest], votes) * weights)
    shares = torch.cat(parts).double()
    return (shares / shares.sum(1, keepdim=True)).cpu().numpy()


def weigh_neighbours(
    queries: Float[Tensor, "t d"], known: Float[Tensor, "n d"], k: int, temperature: float
) -> tuple[Float[Tensor, "t m"], Int[Tensor, "t m"]]:
    """Weights of the votes of the k nearest (of all, where there are fewer), and which they are.

    Args:
        queries, known: rows of length 1.
        k: neighbours.
        temperature: of the votes.
    """
    similarity, nearest = (queries @ known.T).topk(min(k, len(known)), dim=1)
    # exp(s / T) up to a factor that all votes of a query share
    return torch.softmax(similarity / temperature, dim=1), nearest


def probe_features(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    k: int = 20,
    temperature: float = 0.07,
    balanced: bool = False,
    folds: int = INNER_FOLDS,
    seed: int = 0,
) -> dict[str, float]:
    """Score features of a small labelled set by k-NN, for a training script to call as it trains.

    Args:
        features: (N, D), any float type.
        labels: class of each tile, (N,), of any type that NumPy sorts.
        groups: (N,), tiles that stay together; None: each is on its own.
        k, temperature, balanced: as in `knn_probe`.
        folds: stratified folds that keep groups whole; the same ones for the same labels and seed.
        seed: of the folds.

    Returns:
        `knn_auc`, `knn_average_precision` and `knn_balanced_accuracy`: means over the folds.

    Raises:
        UserError: fewer groups of a class than folds.
    """
    names, targets = np.unique(np.asarray(labels), return_inverse=True)
    groups = np.arange(len(targets)) if groups is None else np.asarray(groups)
    require_folds(targets, groups, folds)
    runs = []
    for number, (train, test) in enumerate(draw_folds(targets, groups, folds, seed)):
        shares = knn_probe(
            features[train], targets[train], features[test], len(names), k, temperature, balanced
        )
        runs.append(TilePredictions(number, groups[test], targets[test], shares))
    return {f"knn_{name}": value for name, value in average(runs).items()}


def require_folds(targets: np.ndarray, groups: np.ndarray, folds: int = INNER_FOLDS) -> None:
    """Refuse a labelled set that `probe_features` cannot divide into folds.

    Args:
        targets: class of each tile, (N,).
        groups: (N,).
        folds: how many are wanted.

    Raises:
        UserError: one class only, or fewer groups of a class than folds.
    """
    counts = count_groups(targets, groups)
    if len(counts) < 2 or min(counts) < folds:
        raise UserError(
            f"probe: expected two classes or more with at least {folds} groups each, found "
            f"{len(counts)} with {min(counts)}; add pictures or leave the class out"
        )
