"""How the views of a tile are drawn: the settings of all augmentation, and three presets.

Sources: `dino` is DINO's multi-crop augmentation (Caron et al., "Emerging properties in
self-supervised vision transformers", ICCV 2021; main_dino.py of its code). `pathology` adds the
symmetries of a slide, the stain jitter of Tellez et al. (IEEE TMI 2018), milder colours, and leaves
solarisation out. `ect` cuts views at almost their own scale out of a larger field, so that cells
keep their shape (extended-context translation; Zimmermann et al., "Virchow2", arXiv 2408.00738).
Patch shuffle and pyramid view are the two additions of INTELLIGENS. Its paper publishes neither
grid nor probability, so that both are our reading of its abstract.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from patch_encoder.models.encoder_table import IMAGENET
from wsi_common.errors import UserError

Range = tuple[float, float]
LARGEST_TURN = 1 / 6  # of the circle of hues; `adjust_hue` takes no more
SMALL_SIDE = 96  # px; views up to this side have their own limit of blur


@dataclass(frozen=True)
class ViewKind:
    """What distinguishes one kind of view from another.

    Attributes:
        side: height and width of the view, px.
        scale: smallest and largest area of its box, as a share of `reference` squared.
        reference: side whose square the area is a share of, px; None: the side of the tile.
        blur, solarise: probabilities.
    """

    side: int
    scale: Range
    reference: int | None
    blur: float
    solarise: float


@dataclass(frozen=True)
class ViewRecipe:
    """All settings of the views. Probabilities are per view; lengths are px of the view.

    Attributes:
        global_size, local_size: sides of the views.
        local_number: local views per tile; there are always two global ones.
        global_scale, local_scale: area of the box as a share of the tile's area.
        scale_of_view: take both as shares of the view's own area instead.
        aspect: narrowest and widest box, width over height.
        context_scale: area of the pyramid view's box as a share of the context image's area.
        horizontal_flip, vertical_flip, transpose: probabilities; 1/2 for all three draws each of
            the eight symmetries equally often, quarter turns among them.
        hed: factors and shifts of the stains are uniform in 1 +- hed and +- hed.
        hed_probability: probability of this stain jitter.
        jitter: strength of brightness, contrast, saturation and hue, as in torchvision.
        jitter_probability, grey_probability: probabilities.
        global_blur, global_solarise: probabilities for the first and the second global view; the
            pyramid view takes the second.
        local_blur: probability for local views.
        blur_sigma: smallest and largest sigma.
        small_blur_sigma: largest sigma for views of at most 96 px.
        shuffle_probability: probability that the student's copy of a global view is shuffled.
        shuffle_grid: squares per side of a shuffled view.
        mean, std: statistics of the network's input, for intensities in [0, 1].
    """

    global_size: int = 224
    local_size: int = 96
    local_number: int = 8
    global_scale: Range = (0.4, 1.0)
    local_scale: Range = (0.05, 0.4)
    scale_of_view: bool = False
    aspect: Range = (3 / 4, 4 / 3)
    context_scale: Range = (0.6, 1.0)
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    transpose: float = 0.0
    hed: float = 0.0
    hed_probability: float = 0.0
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    grey_probability: float = 0.2
    global_blur: tuple[float, float] = (1.0, 0.1)
    global_solarise: tuple[float, float] = (0.0, 0.2)
    local_blur: float = 0.5
    blur_sigma: Range = (0.1, 2.0)
    small_blur_sigma: float = 2.0
    shuffle_probability: float = 0.0
    shuffle_grid: int = 7
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]

    def __post_init__(self) -> None:
        assert 0 <= self.jitter[3] <= LARGEST_TURN, self.jitter

    def weaken(self, colour: float, blur: float) -> ViewRecipe:
        """The recipe with this share of its changes of colour and of its blurred views."""
        first, second = self.global_blur
        brightness, contrast, saturation, hue = self.jitter
        return replace(
            self,
            hed=colour * self.hed,
            jitter=(colour * brightness, colour * contrast, colour * saturation, colour * hue),
            grey_probability=colour * self.grey_probability,
            global_blur=(blur * first, blur * second),
            local_blur=blur * self.local_blur,
        )

    @property
    def global_kinds(self) -> list[ViewKind]:
        """The first and the second global view."""
        return [
            ViewKind(
                self.global_size,
                self.global_scale,
                self.global_size if self.scale_of_view else None,
                blur,
                solarise,
            )
            for blur, solarise in zip(self.global_blur, self.global_solarise)
        ]

    @property
    def context_kind(self) -> ViewKind:
        """The pyramid view: most of its field, coloured like the second global view."""
        return replace(self.global_kinds[1], scale=self.context_scale, reference=None)

    @property
    def local_kind(self) -> ViewKind:
        """Each of the local views."""
        reference = self.local_size if self.scale_of_view else None
        return ViewKind(self.local_size, self.local_scale, reference, self.local_blur, 0.0)

    def largest_sigma(self, side: int) -> float:
        """The largest sigma of blur for views of this side, px."""
        return self.small_blur_sigma if side <= SMALL_SIDE else self.blur_sigma[1]


PRESETS = {
    "dino": ViewRecipe(),
    "pathology": ViewRecipe(
        vertical_flip=0.5,
        transpose=0.5,
        hed=0.05,
        hed_probability=0.5,
        jitter=(0.2, 0.2, 0.1, 0.05),
        grey_probability=0.1,
        global_solarise=(0.0, 0.0),
        small_blur_sigma=1.2,
    ),
    "ect": ViewRecipe(
        local_size=98,
        global_scale=(0.9, 1.1),
        local_scale=(0.9, 1.1),
        scale_of_view=True,
        aspect=(0.95, 1.05),
        vertical_flip=0.5,
    ),
}


def check_recipe(recipe: ViewRecipe, tile_side: int, patch_size: int = 1) -> None:
    """Refuse a recipe that the tiles or the network cannot serve.

    Args:
        recipe: what is asked for.
        tile_side: side of the tiles, px.
        patch_size: side of the network's patches, px; 1 for networks without patches.

    Raises:
        UserError: the first setting that does not fit, in one line.
    """
    for name, kind in (("global", recipe.global_kinds[0]), ("local", recipe.local_kind)):
        if kind.side < 1 or kind.side % patch_size:
            raise UserError(
                f"views.{name}_size={kind.side}: expected a positive multiple of the network's "
                f"patch of {patch_size} px"
            )
        _check_scale(name, kind, tile_side, recipe.aspect[1])
    if recipe.local_number < 0:
        raise UserError(
            f"views.local_number={recipe.local_number}: expected 0 (no local views) or more"
        )
    if not 0 <= recipe.shuffle_probability <= 1:
        raise UserError(
            f"shuffle.probability={recipe.shuffle_probability:g}: expected 0 (off) to 1"
        )
    if recipe.shuffle_probability:
        _check_grid(recipe.shuffle_grid, recipe.global_size, patch_size)


def _check_scale(name: str, kind: ViewKind, tile_side: int, widest: float) -> None:
    low, high = kind.scale
    if not 0 < low <= high or (kind.reference is None and high > 1):
        raise UserError(
            f"views.{name}_scale=[{low:g},{high:g}]: expected 0 < smallest <= largest area, at "
            "most 1 where it is a share of the tile"
        )
    longest = round((kind.reference or 0) * math.sqrt(high * widest))
    if longest > tile_side:
        raise UserError(
            f"views.{name}_size={kind.side}: expected tiles of at least {longest} px for "
            f"views.preset=ect, found {tile_side}; take larger tiles or smaller views"
        )


def _check_grid(grid: int, side: int, patch_size: int) -> None:
    """Squares have to fill the view, and patches the squares."""
    if grid < 2 or side % grid or side // grid % patch_size:
        fitting = [
            str(count)
            for count in range(2, side + 1)
            if side % count == 0 and side // count % patch_size == 0
        ]
        remedy = f"one of {', '.join(fitting)}" if fitting else "shuffle.probability=0"
        raise UserError(
            f"shuffle.grid={grid}: expected squares that fill a view of {side} px and hold whole "
            f"patches of {patch_size} px: {remedy}"
        )
