"""Points of a plane coloured by group: slide, label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from common.figures import PALETTE, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OTHERS = "others"


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
