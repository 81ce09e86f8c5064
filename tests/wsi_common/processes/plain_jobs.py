"""Jobs in a module that imports nothing, so that processes are there at once."""

from __future__ import annotations

import ctypes
import os
import time


def sleeps(number: int) -> None:
    """Say which process this is, and stay; at 0 in native code, where no Python runs, neither a
    signal's handler nor another thread.
    """
    os.write(1, f"{os.getpid()}\n".encode())  # in one piece
    (ctypes.PyDLL(None).sleep if number == 0 else time.sleep)(60)


def tenfold(number: int) -> int:
    """Ten times the number."""
    return 10 * number
