"""Views of self-distillation: milliseconds per tile of DINO's PIL loop and of ours, interleaved.

The PIL loop is torchvision's transforms on one picture after the other, as DINO's DataLoader
workers run them: from tiles that are PIL pictures already to a batch of normalised tensors. Ours
starts from the raw bytes of a batch. There are two sizes: DINO's 2 x 224 + 8 x 96 px from tiles of
256 px, and 2 x 64 + 2 x 32 px from 128 px. Both draw the preset `dino`, each from random numbers
of its own; `pathology`, which torchvision cannot draw, is measured beside it. In a round all take
turns. Figures are medians over rounds, ratios medians of the rounds' ratios. A GPU, where there is
one, takes batches of its own size, copied to it within the measured time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rounds import clock, measure_ratios, say
from patch_encoder.selfdistill.view_recipe import PRESETS, ViewRecipe
from patch_encoder.selfdistill.views import make_views

PIL_LOOP = "PIL loop"
SIZES = {
    "2 x 224 + 8 x 96 from 256 px": (256, {}),
    "2 x 64 + 2 x 32 from 128 px": (
        128,
        {"global_size": 64, "local_size": 32, "local_number": 2, "local_scale": (0.1, 0.4)},
    ),
}


def draw_tiles(count: int, side: int) -> Tensor:
    """uint8 (count, 3, side, side): smooth random colours with noise, as costly as tissue."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, side // 8, side // 8, generator=generator) * 255
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic")
    noise = 10 * torch.randn(smooth.shape, generator=generator)
    return (smooth + noise).round().clamp(0, 255).to(torch.uint8)


def build_pil_loop(recipe: ViewRecipe) -> Callable[[Image.Image], list[Tensor]]:
    """DINO's augmentation of one picture, built of torchvision's transforms."""
    from torchvision import transforms as T

    def blur(picture: Image.Image) -> Image.Image:
        low, high = recipe.blur_sigma
        radius = low + (high - low) * float(torch.rand(()))
        return picture.filter(ImageFilter.GaussianBlur(radius))

    def view(side: int, scale: tuple[float, float], p_blur: float, p_solarise: float) -> T.Compose:
        return T.Compose(
            [
                T.RandomResizedCrop(side, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(recipe.horizontal_flip),
                T.RandomApply([T.ColorJitter(*recipe.jitter)], recipe.jitter_probability),
                T.RandomGrayscale(recipe.grey_probability),
                T.RandomApply([blur], p_blur),
                T.RandomApply([ImageOps.solarize], p_solarise),
                T.ToTensor(),
                T.Normalize(recipe.mean, recipe.std),
            ]
        )

    kinds = [*recipe.global_kinds, *[recipe.local_kind] * recipe.local_number]
    views = [view(kind.side, kind.scale, kind.blur, kind.solarise) for kind in kinds]
    return lambda picture: [transform(picture) for transform in views]


def run_pil_loop(recipe: ViewRecipe, pictures: list[Image.Image]) -> list[Tensor]:
    """All views of all pictures as batches, one per view."""
    augment = build_pil_loop(recipe)
    return [torch.stack(views) for views in zip(*map(augment, pictures))]


def make_contestants(
    side: int, sizes: dict, tiles: int, device: torch.device, gpu_tiles: int
) -> dict[str, tuple[Callable[[], object], int]]:
    """{name: (one run, its tiles)}."""
    batch, indices = draw_tiles(tiles, side), torch.arange(tiles)
    pictures = [Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()) for tile in batch]
    recipes = {name: replace(PRESETS[name], **sizes) for name in ("dino", "pathology")}
    calls = {PIL_LOOP: (lambda: run_pil_loop(recipes["dino"], pictures), tiles)}
    for name, recipe in recipes.items():
        calls[f"ours, {name}"] = (lambda r=recipe: make_views(batch, None, indices, r, 0), tiles)
    if device.type != "cuda":
        return calls
    large = draw_tiles(gpu_tiles, side).pin_memory()

    def run_on_gpu(recipe: ViewRecipe) -> None:
        make_views(large.to(device, non_blocking=True), None, torch.arange(gpu_tiles), recipe, 0)
        torch.cuda.synchronize()

    for name, recipe in recipes.items():
        calls[f"ours, {name}, GPU"] = (lambda r=recipe: run_on_gpu(r), gpu_tiles)
    return calls


def measure(
    calls: dict[str, tuple[Callable[[], object], int]], rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds per tile and how many times as fast as the PIL loop."""
    clocks = {
        name: lambda call=call, count=count: clock(call) / count
        for name, (call, count) in calls.items()
    }
    found = measure_ratios(clocks, PIL_LOOP, rounds)
    return {name: {"ms/tile": ms, "ratio": ratio} for name, (ms, ratio) in found.items()}


def run_views(
    tiles: int, rounds: int, device: torch.device, gpu_tiles: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by size of the views."""
    figures = {}
    for title, (side, sizes) in SIZES.items():
        say(f"views: {title}")
        calls = make_contestants(side, sizes, tiles, device, gpu_tiles)
        figures[title] = measure(calls, rounds)
    return figures
