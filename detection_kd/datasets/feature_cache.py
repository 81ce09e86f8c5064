"""What a frozen backbone makes of a set of tiles, on disk: computed once, memory-mapped by every
run that can use it.

One `.npy` (N, C, h, w) a stage and quarter turn, named by a digest of everything that decides its
numbers (backbone, tiles, input scale, precision) and by nothing else: runs with other adapters,
losses, splits or seeds share it, and a run that adds a stage computes only that one. Pooling
without parameters is done before (h = w = 1); else whole maps are kept, which takes h x w times the
room. Every process fills its share of the rows of a temporary file of full size, which is then
renamed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from wsi_common.device import autocast
from wsi_common.distributed import World, barrier, gather_objects
from wsi_common.errors import UserError
from wsi_common.files import AtomicFile, sha256_bytes, write_json
from wsi_common.progress import progress

logger = logging.getLogger(__name__)
BATCH = 32  # tiles; fixed, so that cached features do not depend on the training batch
PROBES = 8  # tiles that are computed again before a file is used
TOLERANCE = 0.05  # of a probe's norm: other batches and 16-bit arithmetic stay far below it
DTYPES = ("float32", "float16")
Maps = Float[np.ndarray, "n _c _h _w"]


@dataclass(frozen=True)
class CacheKey:
    """Everything that decides the numbers of a file, but for stage and turn.

    Attributes:
        backbone, tiles: digests of the backbone's file and of the set of tiles.
        input_scale: of the student.
        pooled: whether maps are averaged.
        precision, dtype: of the backbone's arithmetic and of the file.
    """

    backbone: str
    tiles: str
    input_scale: float
    pooled: bool
    precision: str
    dtype: str

    def path(self, folder: Path, turn: int, stage: int) -> Path:
        """Where one stage of one quarter turn lies."""
        digest = sha256_bytes(json.dumps(asdict(self), sort_keys=True).encode())[:20]
        return folder / f"{digest}_turn{turn}_stage{stage}.npy"


class CachedMaps(Dataset):
    """Item: (a map (C, h, w) a stage, teacher feature (D,)); all chosen rows of the first turn,
    then of the second, ...

    Args:
        turns: by turn and stage, (N, C, h, w).
        teacher: (N, D).
        rows: which of the N are in this set.
    """

    def __init__(
        self, turns: Sequence[Sequence[Maps]], teacher: Float[Tensor, "n d"], rows: Sequence[int]
    ) -> None:
        self.turns, self.teacher, self.rows = turns, teacher, np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.turns) * len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor]:
        maps, teacher = self.__getitems__([index])
        return [x[0] for x in maps], teacher[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """A whole batch at a time, float32: [(B, C, h, w), ...] and (B, D)."""
        turns, places = np.divmod(np.asarray(indices), len(self.rows))
        rows = self.rows[places]
        batch = []
        for stage in range(len(self.turns[0])):
            maps = np.empty((len(rows), *self.turns[0][stage].shape[1:]), np.float32)
            for turn in np.unique(turns):
                maps[turns == turn] = self.turns[turn][stage][rows[turns == turn]]
            batch.append(torch.from_numpy(maps))
        return batch, self.teacher[torch.from_numpy(rows)]


def join_batch(batch: tuple[list[Tensor], Tensor]) -> tuple[list[Tensor], Tensor]:
    """`collate_fn` for `CachedMaps`, whose batches come put together."""
    return batch


def cache_maps(
    folder: Path,
    key: CacheKey,
    frozen: nn.Module,
    stages: Sequence[int],
    turned: Sequence[Dataset],
    world: World,
    workers: int,
) -> list[list[Maps]]:
    """Maps of all tiles by quarter turn and stage, memory-mapped; files that are missing or do not
    fit are made.

    Args:
        folder: of the cache.
        key: what the files are named by.
        frozen: uint8 tiles (B, 3, H, W) -> [(B, C, h, w), ...], one a stage of `stages`; on its
            device.
        stages: stages.
        turned: the same tiles in each quarter turn.
        world: this process; all take part.
        workers: decoding processes.

    Raises:
        UserError: no room on the disk, or features that float16 cannot hold.
    """
    paths = [[key.path(folder, turn, stage) for stage in stages] for turn in range(len(turned))]
    jobs = []
    for files, tiles in zip(paths, turned, strict=True):
        probes = next(_batches(frozen, tiles, _spread(len(tiles)), key, world))  # type: ignore[arg-type]
        jobs += [
            _CacheJob(path, (len(tiles), *probe.shape[1:]), stage, tiles)  # type: ignore[arg-type]
            for stage, (path, probe) in enumerate(zip(files, probes, strict=True))
            if not _usable(path, (len(tiles), *probe.shape[1:]), probe, key.dtype)  # type: ignore[arg-type]
        ]
    missing: list[str] = gather_objects([str(job.path) for job in jobs])[0]  # type: ignore[assignment] # as the first sees it
    jobs = [job for job in jobs if str(job.path) in missing]
    if world.is_main and jobs:
        _require_room(
            folder, sum(int(np.prod(job.shape)) for job in jobs) * np.dtype(key.dtype).itemsize
        )
    for turn, tiles in enumerate(turned):
        mine = [job for job in jobs if job.tiles is tiles]
        if mine:
            _fill(
                mine,
                key,
                frozen,
                world,
                workers,
                f"backbone features, turn {turn + 1} of {len(turned)}",
            )
    return [[np.load(path, mmap_mode="r") for path in files] for files in paths]


@dataclass(frozen=True)
class _CacheJob:
    """A file to be made: its name and shape, and the place of its stage among those of `frozen`."""

    path: Path
    shape: tuple[int, ...]
    stage: int
    tiles: Dataset


def _spread(count: int) -> list[int]:
    return np.linspace(0, count - 1, min(PROBES, count)).round().astype(int).tolist()


def _batches(
    frozen: nn.Module,
    tiles: Dataset,
    rows: Sequence[int],
    key: CacheKey,
    world: World,
    workers: int = 0,
    title: str = "",
) -> Iterator[list[Maps]]:
    loader = DataLoader(Subset(tiles, rows), BATCH, num_workers=workers)
    for pixels, _ in progress(
        loader, title, len(loader), "batches", enabled=bool(title) and world.is_main
    ):
        with autocast(world.device, key.precision):
            maps = [x.to(getattr(torch, key.dtype)).cpu() for x in frozen(pixels.to(world.device))]
        if not all(x.isfinite().all() for x in maps):
            raise UserError(
                f"backbone features: expected finite {key.dtype} numbers, found others; set "
                "cache_dtype=float32"
            )
        yield [x.numpy() for x in maps]


def _usable(path: Path, shape: tuple[int, ...], probe: Maps, dtype: str) -> bool:
    """Whether the file has this shape and type, and the numbers that the backbone gives for the
    probed tiles now.
    """
    if not path.is_file():
        return False
    try:
        kept = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        logger.warning("%s: cannot be read (%s), is made again", path, error)
        return False
    if kept.shape == shape and kept.dtype == dtype:
        difference = kept[_spread(len(kept))].astype(np.float32) - probe.astype(np.float32)
        if np.linalg.norm(difference) <= TOLERANCE * np.linalg.norm(probe.astype(np.float32)):
            return True
    logger.warning("%s: not what the backbone gives for these tiles now, is made again", path)
    return False


def _require_room(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: expected {needed / 2**20:,.0f} MiB free for the backbone's features, "
            f"found {free / 2**20:,.0f}; "
            "set cache_dir= to another disk, cache_dtype=float16, pooling=mean (one cell a map), "
            "or cache=false"
        )
    logger.info("%s: %.1f MiB of backbone features to compute", folder, needed / 2**20)


def _fill(
    jobs: list[_CacheJob], key: CacheKey, frozen: nn.Module, world: World, workers: int, title: str
) -> None:
    """Make the files of one turn; process r of n writes the r-th of n blocks of rows."""
    outputs = [AtomicFile(job.path) for job in jobs] if world.is_main else []
    try:
        for output, job in zip(outputs, jobs, strict=world.is_main):
            _reserve(output.temporary, job.shape, key.dtype)
        names: list[str] = gather_objects([str(output.temporary) for output in outputs])[0]  # type: ignore[assignment]
        arrays = [np.load(name, mmap_mode="r+") for name in names]
        count = jobs[0].shape[0]
        start, end = (count * rank // world.size for rank in (world.rank, world.rank + 1))
        for maps in (
            _batches(frozen, jobs[0].tiles, range(start, end), key, world, workers, title)
            if end > start
            else ()
        ):
            for array, job in zip(arrays, jobs, strict=True):
                array[start : start + len(maps[0])] = maps[job.stage]
            start += len(maps[0])
        for array in arrays:
            array.flush()
        barrier()  # all rows are there
        for output in outputs:
            output.commit()
            write_json(output.path.with_suffix(".json"), asdict(key) | {"file": output.path.name})
        barrier()  # all names are there
    finally:
        for output in outputs:
            output.discard()


def _reserve(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """An empty array file whose room on the disk is taken: a full disk shows here, not as a crash
    while it is mapped.
    """
    np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape).flush()
    with path.open("r+b") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{path.parent}: the disk is full; set cache_dir= to another disk or cache=false"
            ) from None
