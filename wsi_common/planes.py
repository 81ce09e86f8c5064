"""Features as points of a plane: UMAP where it is installed, and points coloured by group."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from wsi_common.figures import PALETTE, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OTHERS = "others"
NEIGHBOURS = 15  # of UMAP, its own default


def make_umap(rows: int, seed: int) -> Any | None:
    """UMAP (McInnes et al., 2018) by cosine, not fitted; None without the package umap-learn, or
    with too few rows.
    """
    if importlib.util.find_spec("umap") is None or rows <= NEIGHBOURS:
        return None
    with warnings.catch_warnings():
        # of one of its classes, which is not used here
        warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)
        import umap
    # a seed allows no other number of jobs; UMAP warns where it has to change it
    return umap.UMAP(n_neighbors=NEIGHBOURS, metric="cosine", random_state=seed, n_jobs=1)


def name_groups(groups: Sequence[str]) -> list[str]:
    """Name the groups for the legend: if there are more groups than colours, those with the most
    members keep their names and the rest become `others`.
    """
    counts = Counter(groups)
    if len(counts) <= len(PALETTE):
        return list(groups)
    kept = {
        name
        for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: len(PALETTE)]
    }
    return [name if name in kept else OTHERS for name in groups]


def scatter_groups(axes: Axes, points: Float[np.ndarray, "n 2"], names: Sequence[str]) -> None:
    """Scatter points in the colours of their groups, which are as `name_groups` leaves them."""
    ordered = sorted(set(names), key=lambda name: (name == OTHERS, name))
    colours = dict(zip((name for name in ordered if name != OTHERS), PALETTE, strict=False)) | {
        OTHERS: QUIET
    }
    size = point_diameter(len(points)) ** 2
    for name in ordered:
        mine = points[np.asarray(names) == name]
        text = name.replace("$", r"\$")
        axes.scatter(
            mine[:, 0],
            mine[:, 1],
            s=size,
            color=colours[name],
            alpha=0.7,
            linewidths=0,
            label=text,
            zorder=1 if name == OTHERS else 2,
        )
    axes.set(xticks=[], yticks=[])


def point_diameter(points: int) -> float:
    """The diameter at which so many points leave room between them, in points of 1/72 inch."""
    return float(np.sqrt(np.clip(4000 / points, 4, 30)))
