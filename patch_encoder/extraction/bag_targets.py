"""Where the bags of an extraction go: to the files of a folder, or into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from patch_encoder.bags.bag import Bag, make_bag
from patch_encoder.bags.writer import BagWriter
from wsi_common.checkpoint import save_tensors


class Writer(Protocol):
    """A bag that grows batch by batch."""

    def append(self, rows: np.ndarray) -> None:
        """The features (n, D) of the next n tiles."""

    def finish(
        self, coords: np.ndarray, attributes: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> None:
        """Add corners (n, 2), geometry and provenance; the bag is whole from now on."""

    def discard(self) -> None:
        """Leave nothing of a bag that is not whole."""


class BagTarget(Protocol):
    """Opens one writer per slide."""

    def open(self, slide_id: str, shape: tuple[int, int]) -> Writer:
        """A writer for at most `shape` features (N, D)."""


class BagFolder:
    """Bags in `folder/h5_files/<slide_id>.h5`.

    Args:
        folder: `<features>/<encoder>`.
        dtype: float16 or float32.
        pt: write `pt_files/<slide_id>.pt` as well.
    """

    def __init__(self, folder: Path, dtype: str, *, pt: bool = False) -> None:
        self.folder, self.dtype, self.pt = folder, dtype, pt

    def open(self, slide_id: str, shape: tuple[int, int]) -> Writer:
        """A bag under a temporary name, whose room is taken on the disk."""
        file = self.folder / "h5_files" / f"{slide_id}.h5"
        if not self.pt:
            return BagWriter(file, shape, self.dtype)
        return TwinWriter(
            file, shape, self.dtype, tensor=self.folder / "pt_files" / f"{slide_id}.pt"
        )


class TwinWriter(BagWriter):
    """A bag that is stored a second time as a plain tensor."""

    def __init__(self, path: Path, shape: tuple[int, int], dtype: str, *, tensor: Path) -> None:
        super().__init__(path, shape, dtype)
        self.tensor = tensor

    def finish(
        self, coords: np.ndarray, attributes: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> None:
        """The tensor first: where the bag is, the slide is done."""
        save_tensors(self.tensor, torch.from_numpy(self.features()))
        super().finish(coords, attributes, provenance)


class BagMemory:
    """Bags that are in no file.

    Attributes:
        bags: slide id -> bag, of the slides that are finished.
    """

    def __init__(self) -> None:
        self.bags: dict[str, Bag] = {}

    def open(self, slide_id: str, shape: tuple[int, int]) -> Writer:
        """A bag that grows in memory."""
        return MemoryWriter(self.bags, slide_id)


class MemoryWriter:
    """One slide of `BagMemory`."""

    def __init__(self, bags: dict[str, Bag], slide_id: str) -> None:
        self._bags, self._slide_id = bags, slide_id
        self._rows: list[torch.Tensor] = []

    def append(self, rows: np.ndarray) -> None:
        """The features (n, D) of the next n tiles."""
        self._rows.append(torch.from_numpy(rows))

    def finish(
        self, coords: np.ndarray, attributes: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> None:
        """Enter the bag."""
        corners = torch.from_numpy(coords.astype(np.int64))
        bag = make_bag(torch.cat(self._rows), corners, dict(attributes), self._slide_id)
        self._bags[self._slide_id] = replace(bag, provenance=dict(provenance))

    def discard(self) -> None:
        """Forget the rows."""
        self._rows.clear()
