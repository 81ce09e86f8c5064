"""From tiles and draws to normalised views: cut, colour and normalise in batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from patch_encoder.selfdistill import photometric
from patch_encoder.selfdistill.crops import cut_one_by_one, cut_together
from patch_encoder.selfdistill.view_draws import ViewDraws
from patch_encoder.selfdistill.view_recipe import ViewRecipe
from patch_encoder.stain.augment import WHITE, map_hed
from patch_encoder.stain.optical_density import recolour_intensity

CACHED = 150_000  # pixels that a CPU works on at a time: more fall out of its cache
LARGE = 2**23  # pixels that an accelerator works on at a time: bounds its memory
JITTER = (
    photometric.adjust_brightness,
    photometric.adjust_contrast,
    photometric.adjust_saturation,
    photometric.adjust_hue,
)
"""The operations of `ViewDraws.factors`."""


def render_views(
    tiles: UInt8[Tensor, "b 3 s s"],
    sources: np.ndarray,
    draws: ViewDraws,
    side: int,
    recipe: ViewRecipe,
    on_cpu: bool,
) -> Float[Tensor, "n 3 v v"]:
    """Cut, colour and normalise N views of one side; `sources` (N,) are their tiles.

    Views whose colours change in the same order are worked on together. With `on_cpu` every step
    takes the form that suits a CPU: parts that stay in its cache, views one by one. The other form
    works on any device, in few large steps.
    """
    together = np.lexsort((draws.sigma, draws.stained, draws.jitter_group()))
    size = max(1, (CACHED if on_cpu else LARGE) // side**2)
    cut_views = cut_one_by_one if on_cpu else cut_together
    views = torch.empty(len(together), 3, side, side, device=tiles.device)
    mean, std = (
        torch.tensor(values, device=tiles.device)[:, None, None]
        for values in (recipe.mean, recipe.std)
    )
    scale, shift = 1 / (255 * std), mean / std
    for start in range(0, len(together), size):
        rows = together[start : start + size]
        drawn = draws[rows]
        cut = cut_views(tiles, sources[rows], drawn.boxes, drawn.flips, side)
        colour_views(cut, drawn, on_cpu)
        views.index_copy_(0, torch.from_numpy(rows).to(tiles.device), cut.mul_(scale).sub_(shift))
    return views


def colour_views(views: Float[Tensor, "n 3 v v"], draws: ViewDraws, on_cpu: bool) -> None:
    """Everything that is drawn but the geometry, in place, in DINO's order and stains first."""
    factors, sigma = (torch.from_numpy(values).to(views) for values in (draws.factors, draws.sigma))
    blur = photometric.blur_one_by_one if on_cpu else photometric.blur_views
    change = change_slices if on_cpu else change_together
    if draws.stained.any():
        stains = map(torch.from_numpy, (draws.stain_factors, draws.stain_shifts))
        maps = (part.to(views) for part in map_hed(*stains))
        change(views, draws.stained, jitter_stains, *maps)
    for rows in _find_runs(draws.jitter_group()):
        for number in draws.order[rows.start] if draws.jittered[rows.start] else ():
            JITTER[number](views[rows], factors[rows, number])
    change(views, draws.grey, photometric.drop_colour)
    change(views, draws.sigma > 0, blur, sigma)
    change(views, draws.solarised, photometric.solarise)


def jitter_stains(
    views: Float[Tensor, "n 3 v v"], matrix: Float[Tensor, "n 3 3"], offset: Float[Tensor, "n 3"]
) -> None:
    """Map the density of each view, in place."""
    rows = recolour_intensity(views.flatten(2), matrix, offset, light=WHITE)
    torch.clamp(rows.view_as(views), 0, 255, out=views)


def change_slices(
    views: Tensor, chosen: np.ndarray, operation: Callable[..., None], *strengths: Tensor
) -> None:
    """Apply an operation to the chosen views, each with its own strength, where they lie."""
    for rows in _find_runs(chosen):
        if chosen[rows.start]:
            operation(views[rows], *(strength[rows] for strength in strengths))


def change_together(
    views: Tensor, chosen: np.ndarray, operation: Callable[..., None], *strengths: Tensor
) -> None:
    """The same for all of them at once, on a copy."""
    if not chosen.any():
        return
    index = torch.from_numpy(np.flatnonzero(chosen)).to(views.device)
    part = views[index]
    operation(part, *(strength[index] for strength in strengths))
    views[index] = part


def _find_runs(values: np.ndarray) -> list[slice]:
    """Slices of neighbours with the same value."""
    if len(values) == 1:
        return [slice(0, 1)]
    ends = [*(np.flatnonzero(np.diff(values.astype(np.int64))) + 1).tolist(), len(values)]
    return [slice(start, end) for start, end in zip([0, *ends], ends)]
