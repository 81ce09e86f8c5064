"""Figures of a student beside its teacher: tiles in the teacher's principal plane, learning
curves, R2 by dimension.

Axes are fitted on the teacher alone and the student is projected into them, so that a tile lies at
the same place in both panels where the student is right. With the package umap-learn a second row
shows UMAP, fitted in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from wsi_common.figures import PALETTE, QUIET, new_figure, save_figure, styled
from wsi_common.planes import make_umap, name_groups, point_diameter, scatter_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Features = Float[np.ndarray, "n d"]
MOST_POINTS = 4000  # more hide each other
CURVES = {
    "loss": ("loss",),
    "agreement": ("cosine", "r2", "cka"),
    "neighbours in common": ("knn_1", "knn_5", "knn_10"),
}


def write_student_figures(
    folder: str | Path,
    student: Features,
    teacher: Features,
    groups: Sequence[str],
    r2: Float[np.ndarray, " d"],
    epochs: Sequence[Mapping[str, Any]],
    grouped_by: str = "slide",
) -> None:
    """Write `student_vs_teacher.png`, `learning_curves.png` and `r2_by_dimension.png`; the first
    needs a teacher that varies.

    Args:
        folder: where to.
        student, teacher: features of the validation tiles.
        groups: slide or label of every tile.
        r2: R2 of every dimension, NaN where it is not defined.
        epochs: metrics of every epoch, in order.
        grouped_by: what `groups` are, for the legend.
    """
    folder = Path(folder)
    if np.ptp(teacher, axis=0).any():
        save_figure(
            draw_planes(student, teacher, groups, grouped_by), folder / "student_vs_teacher.png"
        )
    save_figure(draw_learning_curves(epochs), folder / "learning_curves.png")
    save_figure(draw_r2(r2), folder / "r2_by_dimension.png")


@styled()
def draw_planes(
    student: Features, teacher: Features, groups: Sequence[str], grouped_by: str = "slide"
) -> Figure:
    """Draw teacher and student in the teacher's first two principal components, by group."""
    cosine = np.mean(
        np.sum(student * teacher, 1)
        / (np.linalg.norm(student, axis=1) * np.linalg.norm(teacher, axis=1)).clip(1e-12)
    )
    titles = (f"teacher, {len(teacher):,} tiles", f"student, mean cosine {cosine:.3f}")
    chosen = np.random.default_rng(0).permutation(len(teacher))[:MOST_POINTS]
    student = student[chosen]
    teacher = teacher[chosen]
    names = name_groups([groups[i] for i in chosen])
    rows = [project_on_principal_plane(student, teacher)]
    umap = make_umap(len(teacher), seed=0)
    if umap is not None:
        rows.append(project_on_umap(umap, student, teacher))
    figure = new_figure(8.6, 3.9 * len(rows))
    panels = figure.subplots(len(rows), 2, squeeze=False, sharex="row", sharey="row")
    for row, (points, labels) in zip(panels, rows, strict=True):
        for axes, title, places in zip(row, titles, points, strict=True):
            scatter_groups(axes, places, names)
            axes.set(title=title, xlabel=labels[0])
        row[0].set_ylabel(labels[1])
    handles, texts = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        texts,
        loc="outside right upper",
        markerscale=6 / point_diameter(len(names)),
        title=grouped_by,
        alignment="left",
    )
    return figure


def project_on_principal_plane(
    student: Features, teacher: Features
) -> tuple[list[Float[np.ndarray, "n 2"]], list[str]]:
    """Project [teacher, student] on the teacher's first two components; returns the points and the
    labels of the axes with their share of the variance.
    """
    from sklearn.decomposition import PCA  # loads for seconds

    wanted = min(2, *teacher.shape)
    plane = PCA(
        wanted, svd_solver="full" if min(teacher.shape) < 500 else "randomized", random_state=0
    ).fit(teacher)
    points = [np.pad(plane.transform(x), ((0, 0), (0, 2 - wanted))) for x in (teacher, student)]
    shares = np.pad(plane.explained_variance_ratio_, (0, 2 - wanted))
    return points, [
        f"PC {i + 1} of the teacher ({share:.0%} of its variance)" for i, share in enumerate(shares)
    ]


def project_on_umap(
    umap: Any, student: Features, teacher: Features
) -> tuple[list[Float[np.ndarray, "n 2"]], list[str]]:
    """Project [teacher, student] on a UMAP of the teacher; returns the points and the labels of the
    axes.
    """
    plane = umap.fit(teacher)
    return [np.asarray(plane.embedding_), np.asarray(plane.transform(student))], [
        "UMAP 1 of the teacher",
        "UMAP 2",
    ]


@styled()
def draw_learning_curves(epochs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss, agreement and neighbourhoods by epoch, and mark the epoch that is kept."""
    x = [line["epoch"] for line in epochs]
    best = max(epochs, key=lambda line: line["cosine"])["epoch"]
    figure = new_figure(9.6, 3.1)
    for axes, (title, names) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        axes.axvline(best, color=QUIET, linewidth=1, linestyle=":")
        drawn = [name for name in names if all(name in line for line in epochs)]
        for colour, name in zip(PALETTE, drawn, strict=False):
            values = [line[name] for line in epochs]
            axes.plot(
                x,
                values,
                color=colour,
                marker="o",
                markersize=3,
                linewidth=1.5,
                label=f"{name}  {values[x.index(best)]:.3f}",
            )
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid()
        if drawn:
            axes.legend(title=f"at epoch {best}", alignment="left")
    return figure


@styled()
def draw_r2(r2: Float[np.ndarray, " d"]) -> Figure:
    """Draw a histogram of R2 over the teacher's dimensions; the first bar counts all below -0.5."""
    known = r2[~np.isnan(r2)]
    figure = new_figure(5.4, 3.4)
    axes = figure.subplots()
    axes.hist(known.clip(-0.5, 1), bins=np.linspace(-0.5, 1, 31), color=PALETTE[0])
    if len(known):
        median = float(np.median(known))
        axes.axvline(
            max(median, -0.5), color=PALETTE[1], linewidth=1.5, label=f"median {median:.3f}"
        )
        axes.legend()
    below = int((known < -0.5).sum())
    axes.set(
        xlim=(-0.5, 1),
        xlabel="R2 (1: exact, 0: no better than the mean)",
        ylabel="dimensions of the teacher",
    )
    axes.set_title(f"{len(known)} dimensions" + f", {below} below -0.5" * (below > 0), pad=8)
    return figure
