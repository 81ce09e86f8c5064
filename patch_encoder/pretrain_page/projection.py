"""Features of tiles in a plane: principal components, and UMAP where the package is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from wsi_common.figures import new_figure, styled
from wsi_common.planes import make_umap, name_groups, point_diameter, scatter_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = 3.4  # inches


def project_on_principal_plane(
    features: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " 2"]]:
    """The first two principal components of each row, and their shares of the variance.

    The largest entry of each axis is positive, so that signs do not change from run to run.
    """
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    axes, shares = axes[:2], (lengths**2 / max((lengths**2).sum(), 1e-12))[:2]
    largest = np.abs(axes).argmax(axis=1)
    axes = axes * np.sign(axes[range(len(axes)), largest])[:, None]
    missing = 2 - len(axes)  # of a single row
    return (
        np.pad(centred @ axes.T, ((0, 0), (0, missing))),
        np.pad(shares, (0, missing)),
    )


@styled()
def draw_planes(
    features: Float[np.ndarray, "n d"], groupings: dict[str, Sequence[str]], seed: int
) -> Figure:
    """Draw the planes, one row per grouping: `slide`, `label`, ... -> the group of each tile."""
    plane, shares = project_on_principal_plane(features)
    panels = {("PC 1", "PC 2"): plane}
    titles = [f"principal components, {shares.sum():.0%} of the variance"]
    umap = make_umap(len(features), seed)
    if umap is not None:
        panels["UMAP 1", "UMAP 2"] = np.asarray(umap.fit_transform(features), np.float64)
        titles.append("UMAP, cosine")
    size = (PANEL * len(panels) + 1.6, PANEL * len(groupings))
    figure = new_figure(*size)
    grid = figure.subplots(len(groupings), len(panels), squeeze=False)
    for row, (kind, groups) in zip(grid, groupings.items(), strict=True):
        names = name_groups(list(groups))
        for axes, title, (labels, points) in zip(row, titles, panels.items(), strict=True):
            scatter_groups(axes, points, names)
            axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
        row[-1].legend(
            title=kind,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            markerscale=6 / point_diameter(len(names)),
            alignment="left",
        )
    return figure
