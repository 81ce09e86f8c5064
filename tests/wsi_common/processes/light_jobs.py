"""Jobs for worker processes, in a module that is quick to import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch


def exits(status: int) -> None:
    """End the process."""
    os._exit(status)


def dies_on(job: tuple[str, Path, int]) -> None:
    """Killed as often as the job says, then leaves a file; every try leaves one too."""
    name, folder, deaths = job
    tries = len(list(folder.glob(f"{name}.try*")))
    (folder / f"{name}.try{tries}").touch()
    if tries < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / f"{name}.done").touch()


def leaves_its_device(folder: Path, device: str) -> None:
    """A file with device and process, once another device's is there too."""
    (folder / f"{device}.{os.getpid()}").touch()
    deadline = time.monotonic() + 60
    while (
        len({path.name.split(".")[0] for path in folder.iterdir()}) < 2
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)


def loses_its_gpu(job: tuple[str, Path, bool]) -> None:
    """As a failed assertion in a kernel: the first try fails with whatever this process does on its
    GPU from then on.
    """
    name, folder, fails = job
    tries = len(list(folder.glob(f"{name}.try*")))
    (folder / f"{name}.try{tries}").touch()
    if fails and not tries:
        torch.cuda.is_initialized = lambda: True
        torch.cuda.synchronize = lost
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    time.sleep(0.1)


def lost() -> None:
    """What CUDA says then."""
    raise RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")


def doubles(number: int) -> tuple[int, int, int]:
    """Twice the number, the process that found it, and its torch threads."""
    return 2 * number, os.getpid(), torch.get_num_threads()
