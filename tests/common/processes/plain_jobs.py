"""Jobs in a module that imports nothing, so that processes are there at once."""

from __future__ import annotations

import os
import signal
import time


def sleeps(number: int) -> None:
    """Say which process this is, and stay; at 0 as deaf to SIGTERM as native code."""
    os.write(1, f"{os.getpid()}\n".encode())  # in one piece
    if number == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    time.sleep(60)


def tenfold(number: int) -> int:
    """Ten times the number."""
    return 10 * number
