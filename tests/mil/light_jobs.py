"""Jobs for worker processes: dying ones and waiting ones, in a module that is quick to import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


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
    while len({path.name.split(".")[0] for path in folder.iterdir()}) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
