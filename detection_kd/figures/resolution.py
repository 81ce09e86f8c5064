"""Pictures and page of graders at several resolutions: agreement against speed, and the attention
of teacher and students on the same patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from detection_kd.graded_patches.patch_pixels import PatchPixels
from detection_kd.graded_patches.resolution import reduce_resolution
from detection_kd.losses.attention_transfer import find_attention, normalise_jointly, resize_maps
from detection_kd.models.low_resolution import GradingNetwork
from wsi_common.figures import MARKERS, data_uri, new_figure, palette_colour, save_figure, styled
from wsi_common.files import write_text
from wsi_common.pages import fill_template

TEMPLATES = Path(__file__).parents[1] / "templates"
SEEN: dict[str, Any] = {"cmap": "magma", "vmin": 0, "vmax": 1}
CHANGED: dict[str, Any] = {"cmap": "coolwarm", "vmin": -1, "vmax": 1}
Row = Mapping[str, Any]


@styled()
def draw_pareto(rows: Sequence[Row], path: Path) -> Path:
    """Quadratic kappa (95 % by case) over patches per second; one colour per way of learning, one
    marker per form and ratio. Rows without a speed, such as colour alone, are level lines.
    """
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    lines = [row for row in rows if row["per_second"] is None]
    for row, style in zip(lines, cycle((":", "--", "-.", (0, (1, 4))))):
        label = f"ratio {row['ratio']}: {row['trunk']}"
        axes.axhline(row["kappa_quadratic"], color="#666666", linestyle=style, label=label)
    rows = [row for row in rows if row["per_second"] is not None]
    terms = list(dict.fromkeys(row["terms"] for row in rows))
    forms = list(dict.fromkeys((row["ratio"], row["form"]) for row in rows))
    for row in rows:
        kappa = row["kappa_quadratic"]
        low, high = (row[f"kappa_quadratic_ci_{end}"] for end in ("low", "high"))
        bars = None if low is None else [[max(kappa - low, 0)], [max(high - kappa, 0)]]
        axes.errorbar(
            row["per_second"],
            kappa,
            yerr=bars,
            color=palette_colour(terms.index(row["terms"])),
            marker=MARKERS[forms.index((row["ratio"], row["form"])) % len(MARKERS)],
            linestyle="none",
            capsize=2,
        )
    for index, name in enumerate(terms):
        axes.plot([], [], "o", color=palette_colour(index), label=name)
    for index, (ratio, form) in enumerate(forms):
        label = "ratio 1" if ratio == 1 else f"ratio {ratio} {form}"
        axes.plot([], [], MARKERS[index % len(MARKERS)], color="#666666", label=label)
    axes.set(xscale="log", xlabel="patches per second", ylabel="quadratic kappa")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    axes.tick_params(axis="x", which="both", labelrotation=45)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return save_figure(figure, path)


@styled()
def draw_attention(
    networks: Mapping[str, GradingNetwork],
    pixels: PatchPixels,
    count: int,
    device: torch.device,
    path: Path,
) -> Path:
    """Patches of rising grade with the AT+ map of their true grade, per network; the first network
    is the teacher, and below every student's map is its difference to the teacher's.

    Args:
        networks: by name, the teacher first.
        pixels: of the test patches.
        count: how many patches.
        device: of the networks.
        path: of the picture.
    """
    chosen = _choose_patches(pixels.patches.labels, count)
    view = pixels.read(chosen).to(device).float() / 255
    labels = pixels.patches.labels[chosen]
    maps = [_find_maps(network.to(device).eval(), view, labels) for network in networks.values()]
    names = [name.replace(": ", "\n") for name in networks]
    rows = [("", view.permute(0, 2, 3, 1).cpu().numpy(), {}), (names[0], maps[0], SEEN)]
    for name, own in zip(names[1:], maps[1:]):
        rows += [(name, own, SEEN), ("difference\nto the teacher", own - maps[0], CHANGED)]
    figure = new_figure(1.5 * len(chosen) + 1.8, 1.5 * len(rows))
    axes = figure.subplots(len(rows), len(chosen), squeeze=False)
    for line, (name, pictures, style) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
        for place, picture in zip(line, pictures, strict=True):
            place.imshow(picture, **style)
    for place, label in zip(axes[0], labels.tolist(), strict=True):
        place.set_title(pixels.patches.grades[label])
    for each in axes.flat:
        each.set(xticks=[], yticks=[])
        for spine in each.spines.values():
            spine.set_visible(False)
    return save_figure(figure, path)


def _choose_patches(labels: np.ndarray, count: int) -> np.ndarray:
    """Patches of all grades in turn, by rising grade."""
    grades = np.unique(labels)
    members = [np.flatnonzero(labels == grade) for grade in grades]
    numbers = [
        own[turn] for turn in range(-(-count // len(grades))) for own in members if turn < len(own)
    ][:count]
    return np.array(sorted(numbers, key=lambda number: labels[number]), np.int64)


@torch.inference_mode()
def _find_maps(
    network: GradingNetwork, view: Float[Tensor, "b 3 s s"], labels: np.ndarray
) -> Float[np.ndarray, "b s s"]:
    """AT+ map of the true grade, jointly normalised over the grades, at the size of the view."""
    output = network(reduce_resolution(view, network.scale.ratio))
    maps = normalise_jointly(find_attention(output.maps, network.head.weight))
    own = maps[torch.arange(len(labels)), torch.from_numpy(labels).to(maps.device)]
    return resize_maps(own[:, None], (view.shape[2], view.shape[3]))[:, 0].cpu().numpy()


def write_page(
    output: Path,
    title: str,
    tables: Mapping[str, Sequence[Row]],
    figures: Mapping[str, Path],
    confusions: Mapping[str, tuple[tuple[str, ...], np.ndarray]],
) -> Path:
    """Write `<output>/resolution.html`, which needs no other file; returns its path.

    Args:
        output: the folder.
        title: of the page.
        tables: `arms`, `differences` and `two_speed` of `evaluate_resolution`.
        figures: pictures by name.
        confusions: of each arm its grades, and the share of a true grade's patches by called grade.
    """
    html = fill_template(
        TEMPLATES,
        "resolution.html.j2",
        title=title,
        **tables,
        figures={name: data_uri(path.read_bytes(), "png") for name, path in figures.items()},
        confusions=confusions,
    )
    write_text(output / "resolution.html", html)
    return output / "resolution.html"
