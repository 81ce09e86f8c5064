"""Where the features of one slide's tiles lie, and how they are mapped into memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from patch_encoder.bags.bag import open_bag


@dataclass(frozen=True)
class FeatureTable:
    """A table (n, D) of features in a file.

    Attributes:
        path: a feature bag or a region file.
        shape: (n, D).
        dtype: as stored.
        offset: byte where the table starts; None where it is chunked or compressed.
    """

    path: Path
    shape: tuple[int, int]
    dtype: str
    offset: int | None

    @property
    def is_mappable(self) -> bool:
        """Whether single tiles can be read without reading the slide."""
        return self.offset is not None

    def open(self) -> Float[Tensor, "n d"]:
        """The table, mapped where it can be; else it is read.

        The mapping is torch's, which closes the file: NumPy's keeps a descriptor per slide, and a
        cohort has more slides than a process may have open files.
        """
        if self.offset is None:
            return open_bag(self.path).read()
        dtype = getattr(torch, self.dtype)
        size = self.shape[0] * self.shape[1] * dtype.itemsize
        whole = torch.from_file(
            str(self.path), shared=False, size=self.offset + size, dtype=torch.uint8
        )
        part = whole[self.offset :]
        if self.offset % dtype.itemsize:  # nothing but an odd foreign file
            part = part.clone()
        return part.view(dtype).view(self.shape)
