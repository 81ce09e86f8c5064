"""Tiny slides and cohorts in real formats, scripts killed on the way, and scripts on two
processes.
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import h5py
import numpy as np
import tifffile
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# what scripts of ours load late, because it takes a while: loaded once for all processes of tests
PRELOAD = (
    "torch._dynamo",
    "timm",
    "scipy.stats",
    "skimage.color",
    "skimage.filters",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
)


def draw_slide(side: int, seed: int = 0) -> np.ndarray:
    """White glass with two saturated discs of tissue, uint8 (side, side, 3)."""
    rng = np.random.default_rng(seed)
    pixels = np.full((side, side, 3), 240, dtype=np.uint8)
    y, x = np.mgrid[:side, :side]
    for cx, cy in ((0.3, 0.3), (0.7, 0.6)):
        disc = (x - cx * side) ** 2 + (y - cy * side) ** 2 < (0.18 * side) ** 2
        colour = np.array([170, 60, 140])
        pixels[disc] = np.clip(colour + rng.integers(-25, 25, (int(disc.sum()), 3)), 0, 255)
    return pixels


def write_pyramid(
    path: Path, pixels: np.ndarray, mpp: float | None = 0.5, levels: tuple[int, ...] = (1, 2, 4)
) -> Path:
    """A tiled pyramidal TIFF that OpenSlide opens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as writer:
        for index, factor in enumerate(levels):
            options = {
                "tile": (64, 64),
                "compression": "deflate",
                "photometric": "rgb",
                "subfiletype": int(index > 0),
            }
            if mpp is not None:
                options |= {
                    "resolution": (1e4 / (mpp * factor),) * 2,
                    "resolutionunit": "CENTIMETER",
                }
            small = Image.fromarray(pixels).resize(
                (pixels.shape[1] // factor, pixels.shape[0] // factor), Image.Resampling.BOX
            )
            writer.write(np.asarray(small), **options)
    return path


def make_cohort(root: Path, count: int = 3) -> Path:
    """`count` small slides and their labels.csv below `root`."""
    lines = ["case_id,slide_id,label"]
    for index in range(count):
        write_pyramid(root / "slides" / f"S{index:03d}.tiff", draw_slide(512, seed=index))
        lines.append(f"C{index},S{index:03d},{'negative' if index % 2 else 'positive'}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def forget_slides(tiles: Path) -> None:
    """Make coordinates as other tools write them, which do not say of which file they are: a slide
    that is damaged after it was tiled is then found out when it is read.
    """
    for path in (tiles / "coords").iterdir():
        with h5py.File(path, "a") as file:
            del file["coords"].attrs["slide_fingerprint"]


def start_script(module: str, arguments: list[str], said: Path, **variables: str) -> BaseProcess:
    """`python -m module` in a process of its own, whose standard error goes to the file `said`.

    It is a fork of a server that has imported PyTorch: an interpreter of its own takes seconds
    before its first line, and several tests of a file wait for that.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, __name__])  # heeded at its first start
    shared = {"OMP_NUM_THREADS": "1", **variables}
    process = context.Process(target=run_as_main, args=(module, arguments, said, shared))
    process.start()
    return process


def run_as_main(module: str, arguments: list[str], said: Path, variables: dict[str, str]) -> None:
    """What a process of `start_script` does; it ends with the status that the module exits with."""
    import torch  # of the server, unless a pool of ours started that

    with said.open("wb") as stream:
        os.dup2(stream.fileno(), sys.stderr.fileno())
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def kill_when(ready: Callable[[], bool], module: str, arguments: list[str]) -> None:
    """Start a script of ours and SIGKILL it as soon as `ready()`; fails if it ended before that."""
    with TemporaryDirectory() as folder:
        said = Path(folder, "said")
        process = start_script(module, arguments, said)
        deadline = time.monotonic() + 600
        while not ready() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        ended = process.exitcode
        process.kill()
        process.join()
        assert ended is None and ready(), (
            f"{module} ended with {ended} before it could be killed: {said.read_text()[-2000:]}"
        )


def die(number: int) -> NoReturn:
    """What a native library does to its process, without pytest's own report of it."""
    faulthandler.disable()
    os.kill(os.getpid(), number)
    raise AssertionError("a deadly signal returns")


def children() -> set[int]:
    """Processes that this one started and that are not gone."""
    return {
        int(pid)
        for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    }


def run_two_processes(module: str, arguments: list[str]) -> None:
    """A script of ours as torchrun starts it, without paying for torchrun's own start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with TemporaryDirectory() as folder:
        said = [Path(folder, str(rank)) for rank in range(2)]
        processes = [
            start_script(
                module, arguments, said[rank], **shared, RANK=str(rank), LOCAL_RANK=str(rank)
            )
            for rank in range(2)
        ]
        for process, file in zip(processes, said, strict=True):
            process.join(timeout=300)
            assert process.exitcode == 0, file.read_text()


def line_count(path: Path) -> int:
    """Complete lines of a file; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
