"""A job that cannot be asked to end, in a module that imports nothing."""

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
