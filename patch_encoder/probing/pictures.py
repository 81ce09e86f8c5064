"""Pictures of labelled tiles -> what an encoder takes, in batches, and their features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from patch_encoder.extraction.network import Network
from patch_encoder.models.encoders import Encoder
from patch_encoder.slides.pixels import convert_to_rgb
from wsi_common.errors import UserError
from wsi_common.progress import progress


class Pictures(Dataset[Tensor]):
    """Items of an encoder's transform, one per picture file."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[np.ndarray], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(read_picture(self.paths[index]))


def read_picture(path: Path) -> np.ndarray:
    """uint8 (H, W, 3) of a picture file; grey three times, transparency on white.

    Raises:
        UserError: it cannot be decoded, or has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(
                    f"{path}: expected 8 bits per channel, found mode {image.mode}; convert it"
                )
            has_alpha = "A" in image.mode or "transparency" in image.info
            return convert_to_rgb(np.asarray(image.convert("RGBA" if has_alpha else "RGB")))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(
            f"{path}: expected a picture, found {error}; remove it or its row"
        ) from None


def join_items(items: list[Tensor]) -> Tensor:
    """Stack items of one shape."""
    shapes = {tuple(item.shape) for item in items}
    if len(shapes) > 1:
        raise UserError(
            f"pictures: expected one size after the encoder's transform, found {sorted(shapes)}; "
            "cut them to one size"
        )
    return torch.stack(items)


def load_batches(
    pictures: Dataset[Tensor], index: Sequence[int], batch_size: int, workers: int
) -> DataLoader[Tensor]:
    """Batches of the pictures `index`, in this order."""
    return DataLoader(
        pictures,
        batch_size,
        sampler=list(index),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=join_items,
    )


def encode_pictures(
    paths: Sequence[Path],
    encoder: Encoder,
    device: torch.device,
    precision: str,
    batch_size: int = 64,
    workers: int = 0,
) -> np.ndarray:
    """Features of picture files, float32 (N, D), as extraction computes them.

    Args:
        paths: N pictures.
        encoder: as `build_encoder` makes it.
        device, precision: resolved.
        batch_size: tiles per step.
        workers: processes that decode; 0: this one.
    """
    network = Network(encoder.model, device, precision, batch_size)
    loader = load_batches(
        Pictures(paths, encoder.transform), range(len(paths)), batch_size, workers
    )
    parts = [
        network.launch(batch).features()
        for batch in progress(loader, f"encode {encoder.name}", len(loader), "batches")
    ]
    return torch.cat(parts).numpy()
