"""The faults: files broken on purpose, and processes that are short of disk, memory or answers."""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

from patch_encoder.extraction import tile_batches
from patch_encoder.tile_stream.plan import Draw
from patch_encoder.tile_stream.reader import TileReader
from patch_encoder.tissue import slide_tiles
from tests.fault_drill.case import UNSUPPORTED

Damage = Callable[[Path], None]
CLONE_NEWNS = 0x20000


def write(name: str, content: bytes | str) -> Damage:
    """A file with this content."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def picture(name: str, side: int) -> Damage:
    """A black square picture."""

    def damage(folder: Path) -> None:
        Image.new("RGB", (side, side)).save(folder / name)

    return damage


def cut(name: str, share: float = 0.5) -> Damage:
    """A file without its end."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def replace_text(name: str, old: str, new: str) -> Damage:
    """A text file with something else in it."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_text()
        assert old in content, (name, old)
        (folder / name).write_text(content.replace(old, new))

    return damage


def remove(name: str) -> Damage:
    """A file or folder that is not there."""

    def damage(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return damage


def copy(name: str, to: str | bytes) -> Damage:
    """A copy under another name."""

    def damage(folder: Path) -> None:
        target = folder / os.fsdecode(to)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(folder / name, target)

    return damage


def link(name: str, to: str) -> Damage:
    """A symbolic link."""
    return lambda folder: os.symlink(to, folder / name)


def both(*damages: Damage) -> Damage:
    """Several faults."""

    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def hdf5(name: str, fill: Callable[[h5py.File], None]) -> Damage:
    """An HDF5 file of another content."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        with h5py.File(folder / name, "w") as file:
            fill(file)

    return damage


def array(name: str, **arrays: object) -> Damage:
    """An HDF5 file with these arrays."""
    return hdf5(name, lambda file: file.update(arrays))


def features(name: str, change: Callable[[np.ndarray], object]) -> Damage:
    """A bag with other features, attributes and digest gone."""

    def damage(folder: Path) -> None:
        with h5py.File(folder / name) as file:
            rows, corners = file["features"][()], file["coords"][()]
        array(name, features=change(rows), coords=corners)(folder)

    return damage


def references(file: h5py.File) -> None:
    """Features that point to other objects."""
    file["features"] = np.full((3, 4), file.ref, h5py.ref_dtype)


def cyclic_links(file: h5py.File) -> None:
    """Features that are nowhere."""
    file["features"], file["coords"] = h5py.SoftLink("/coords"), h5py.SoftLink("/features")


def external_link(file: h5py.File) -> None:
    """Features of another file."""
    file["features"] = h5py.ExternalLink("s01.h5", "features")


def external_storage(file: h5py.File) -> None:
    """Values that are the bytes of another file."""
    file.create_dataset("features", (3, 4), "f4", external=[("/etc/passwd", 0, 48)])


def group(file: h5py.File) -> None:
    """Groups in place of arrays."""
    file.create_group("features")
    file.create_group("coords")


class Code:
    """What a checkpoint must not do."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch executed",)


def code(name: str) -> Damage:
    """A checkpoint that would run code."""
    return write(name, pickle.dumps(Code()))


def other_weights(name: str) -> Damage:
    """A checkpoint of another architecture."""

    def damage(folder: Path) -> None:
        content = torch.load(folder / name, weights_only=True)
        content["model"] = {"other.weight": torch.zeros(2, 2)}
        torch.save(content, folder / name)

    return damage


def at_tile(slide: str, tile: int, act: Callable[[], None]) -> Callable[[], None]:
    """`act` when extraction comes to this tile of this slide."""

    def inside() -> None:
        read, seen = tile_batches.read_tile, []

        def reader(opened: object, geometry: object, x: int, y: int) -> np.ndarray:
            seen.append(geometry.name)  # type: ignore[attr-defined]
            if seen[-1] == slide and seen.count(slide) == tile + 1:
                act()
            return read(opened, geometry, x, y)  # type: ignore[arg-type]

        tile_batches.read_tile = reader

    return inside


def at_drawn_tile(slide: str, act: Callable[[], None]) -> Callable[[], None]:
    """`act` when a pre-training draws a tile from this slide."""

    def inside() -> None:
        read = TileReader._read_pictures

        def reader(self: TileReader, draw: Draw, out: np.ndarray) -> None:
            if self.plan.sources[draw.slide].name == slide:
                act()
            read(self, draw, out)

        TileReader._read_pictures = reader  # type: ignore[method-assign]

    return inside


def at_overview(slide: str, act: Callable[[], None]) -> Callable[[], None]:
    """`act` when the tiling comes to this slide."""

    def inside() -> None:
        read = slide_tiles.read_overview

        def reader(opened: object, side: int) -> object:
            if opened.slide_id == slide:  # type: ignore[attr-defined]
                act()
            return read(opened, side)  # type: ignore[arg-type]

        slide_tiles.read_overview = reader  # type: ignore[assignment]

    return inside


def hang() -> None:
    """No answer, for longer than a case lasts."""
    time.sleep(600)


def die(number: int) -> Callable[[], None]:
    """A deadly signal, as native libraries and the kernel send it."""
    return lambda: os.kill(os.getpid(), number)


def limit_files(size: int) -> Callable[[], None]:
    """No file grows beyond `size` bytes, from the first slide on."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_memory(more: int) -> Callable[[], None]:
    """Address space for so many bytes more than there are now."""

    def inside() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    return inside


def mount(folder: str, options: str) -> Callable[[], None]:
    """A file system over `folder` that this process alone sees: full, or read-only."""

    def inside() -> None:
        path = Path(folder).absolute()
        path.mkdir(parents=True, exist_ok=True)
        library = ctypes.CDLL(None, use_errno=True)
        commands = [["mount", "--make-rprivate", "/"]]
        if options == "ro":
            commands += [["mount", "--bind", path, path]]
            commands += [["mount", "-o", "remount,bind,ro", path]]
        else:
            commands += [["mount", "-t", "tmpfs", "-o", options, "none", path]]
        done = library.unshare(CLONE_NEWNS) == 0 and all(
            subprocess.run(command, capture_output=True, check=False).returncode == 0
            for command in commands
        )
        if not done:
            print("a file system cannot be mounted here", file=sys.stderr)
            raise SystemExit(UNSUPPORTED)

    return inside
