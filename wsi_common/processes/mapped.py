"""Results in memory that two processes map, so that nobody copies them."""

from __future__ import annotations

import mmap
import os
from multiprocessing import reduction
from typing import Any


class Mapped:
    """A result with `size` bytes of `memory` that outlives the process that wrote it, and with the
    rest, plain values, in `value`.
    """

    def __init__(self, value: Any, size: int) -> None:
        self.value, self.size = value, size
        self._descriptor = os.memfd_create("results")
        os.ftruncate(self._descriptor, size)
        self.memory = mmap.mmap(self._descriptor, size)

    def __getstate__(self) -> dict[str, Any]:
        return {"value": self.value, "size": self.size}  # the memory follows by `send`

    def send(self, pipe: Any) -> None:
        """Hand the memory to the process at the other end; it stays while somebody maps it."""
        reduction.send_handle(pipe, self._descriptor, None)
        os.close(self._descriptor)

    def receive(self, pipe: Any) -> None:
        """Map what the process at the other end sends."""
        descriptor = reduction.recv_handle(pipe)
        self.memory = mmap.mmap(descriptor, self.size)
        os.close(descriptor)
