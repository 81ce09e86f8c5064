"""Regions a second from every store, against the way of the original SLPD.

    python -m benchmarks.regions

The contestants hand out the same batches of regions of 16 x 16 tiles with 384 features: `original`
asks a Redis server for one region at a time over TCP, unpickles float32 arrays and stacks them, as
the authors' data set and the loader's collation do; `original, GET alone` leaves both away. Ours
are `fetch` of a store, all checks included: Redis over TCP and over a socket file, HDF5 (regions
that point into bags, and copies), RAM. One interleaved run for one process, one for two processes
at a time, which start a round together; a process has one thread. Files are in the system's cache.
Figures are medians over rounds, ratios are taken within a round. CPU time is that of a region, the
server's included; unlike rates it leaves out what other jobs of the machine take. The server is
started for this.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import pickle
import re
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import redis
import torch

from benchmarks.rounds import cpu_seconds, make_parser, say
from patch_encoder.bags.bag import open_bag
from patch_encoder.bags.writer import write_bag
from patch_encoder.regions.files import describe_settings, write_regions
from patch_encoder.regions.grid import lay_regions
from patch_encoder.regions.redis_filling import fill_namespace
from patch_encoder.regions.redis_server import RegionServer, region_key
from patch_encoder.regions.redis_store import RedisStore
from patch_encoder.regions.region_set import read_region_set
from patch_encoder.regions.store import FileStore, RamStore, RegionStore
from patch_encoder.tiles.slide_grid import SlideGrid
from wsi_common.memory import reuse_large_blocks

SIDE, WIDTH, STEP = 16, 384, 256
ORIGINAL = "original"
Fetch = Callable[[np.ndarray], object]


@dataclass(frozen=True)
class Contestant:
    """A way to hand out batches.

    Attributes:
        open: opens it in a process.
        held: bytes that the regions take where they lie, on the server, the disk or in memory.
        moved: bytes that come from there for one region.
    """

    open: Callable[[], Fetch]
    held: int
    moved: int


@contextmanager
def run_server(folder: Path) -> Iterator[tuple[str, str]]:
    """A Redis server; its URLs over TCP and over a socket file."""
    if shutil.which("redis-server") is None:
        raise SystemExit("error: expected redis-server, found none; apt-get install redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    command += ["--unixsocket", f"{folder}/r.sock", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                with redis.Redis(port=port) as client:
                    client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}", f"unix://{folder}/r.sock"
    finally:
        process.terminate()
        process.wait()


def make_regions(folder: Path, slides: int, regions: int) -> None:
    """Bags of `slides` slides with `regions` full regions each, and both forms of their files."""
    rng = np.random.default_rng(0)
    cells = np.stack(np.meshgrid(np.arange(regions * SIDE), np.arange(SIDE)), -1).reshape(-1, 2)
    sizes = dict.fromkeys(("patch_size", "patch_size_level0", "target_size"), STEP)
    geometry: dict[str, Any] = {"patch_level": 0, "target_mpp": 0.5, "mpp": 0.5, "overlap": 0.0}
    for number in range(slides):
        bag_path = folder / "bags" / f"slide_{number}.h5"
        features = rng.standard_normal((len(cells), WIDTH), np.float32).astype(np.float16)
        write_bag(bag_path, features, cells * STEP, sizes | geometry)
        bag, grid = open_bag(bag_path), SlideGrid(STEP, (0, 0))
        for form in ("indexed", "materialised"):
            settings = describe_settings(bag, form, SIDE, SIDE, 0.0)
            path = folder / form / bag_path.name
            write_regions(path, bag, lay_regions(cells * STEP, grid, SIDE), settings, "random")


def fill_as_original(url: str, store: RegionStore) -> int:
    """One pickled float32 array (D, G, G) per region; bytes that the server needs for them."""
    client = redis.Redis.from_url(url)
    before = client.info("memory")["used_memory"]
    for region in range(len(store)):
        features = store.fetch(np.array([region]))[0][0].float().permute(2, 0, 1).contiguous()
        client.set(region, pickle.dumps(features.numpy()))
    return client.info("memory")["used_memory"] - before


def open_original(url: str, unpickle: bool = True) -> Fetch:
    """One GET a region."""
    client = redis.Redis(host="127.0.0.1", port=int(url.rpartition(":")[2]))

    def fetch(ids: np.ndarray) -> object:
        values = [client.get(int(region)) for region in ids]
        if not unpickle:
            return values
        # these values are this benchmark's own
        return torch.stack([torch.from_numpy(pickle.loads(value)) for value in values])

    return fetch


def open_ours(make: Callable[[], RegionStore]) -> Fetch:
    """`fetch` of a store."""
    return make().fetch


def find_contestants(folder: Path, tcp: str, unix: str) -> dict[str, Contestant]:
    """All contestants by name, with the server filled for them."""
    sets = {name: read_region_set(folder / name) for name in ("indexed", "materialised")}
    copied = FileStore(sets["materialised"])
    count, half = len(copied), 2 * WIDTH * SIDE**2
    pickled = fill_as_original(tcp, copied)
    server = RegionServer(tcp)
    before = server.client.info("memory")["used_memory"]
    fill_namespace(server, sets["indexed"])
    filled = server.client.info("memory")["used_memory"] - before
    value = server.client.strlen(region_key(sets["indexed"].namespace, 0))
    sizes = {
        name: sum(path.stat().st_size for path in (folder / name).glob("*.h5"))
        for name in ("bags", "indexed", "materialised")
    }
    long = server.client.strlen("0")
    ram = RamStore(sets["indexed"])
    return {
        ORIGINAL: Contestant(partial(open_original, tcp), pickled, long),
        "original, GET alone": Contestant(partial(open_original, tcp, False), pickled, long),
        "Redis, TCP": Contestant(
            partial(open_ours, partial(RedisStore, sets["indexed"], url=tcp)), filled, value
        ),
        "Redis, socket file": Contestant(
            partial(open_ours, partial(RedisStore, sets["indexed"], url=unix)), filled, value
        ),
        "HDF5, indexed": Contestant(
            partial(open_ours, partial(FileStore, sets["indexed"])),
            sizes["bags"] + sizes["indexed"],
            half,
        ),
        "HDF5, materialised": Contestant(
            partial(open_ours, partial(FileStore, sets["materialised"])),
            sizes["materialised"],
            half,
        ),
        "RAM": Contestant(partial(open_ours, lambda: ram), count * half, half),
    }


def check_same(contestants: dict[str, Contestant], count: int) -> None:
    """All hand out the same numbers."""
    ids = np.random.default_rng(1).permutation(count)[:8]
    expected = contestants["RAM"].open()(ids)[0].float()
    for name, contestant in contestants.items():
        found = contestant.open()(ids)
        if name == ORIGINAL:
            assert torch.equal(found.permute(0, 2, 3, 1), expected), name
        elif not name.startswith(ORIGINAL):
            assert torch.equal(found[0].float(), expected), name


def reset_peak() -> None:
    """Forget the largest resident size of this process so far."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process, bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def serve(link: Connection, contestant: Contestant, batches: list[np.ndarray]) -> None:
    """A process that fetches all batches whenever it is told to, and answers by how much its
    resident memory grew at most.
    """
    torch.set_num_threads(1)
    reuse_large_blocks()  # as a training does
    reset_peak()
    before, fetch = resident("VmRSS"), contestant.open()
    while link.recv():
        for batch in batches:
            fetch(batch)
        link.send(resident("VmHWM") - before)


def start_processes(
    contestants: dict[str, Contestant], count: int, processes: int, options: argparse.Namespace
) -> dict[str, list[Connection]]:
    """So many processes for every contestant, with batches of their own; the ends of their pipes.
    They end when they are sent False.
    """
    rng = np.random.default_rng(processes)
    links: dict[str, list[Connection]] = {name: [] for name in contestants}
    for name, contestant in contestants.items():
        for _ in range(processes):
            ours, theirs = multiprocessing.Pipe()
            batches = [rng.integers(0, count, options.batch) for _ in range(options.batches)]
            multiprocessing.get_context("fork").Process(
                target=serve, args=(theirs, contestant, batches), daemon=True
            ).start()
            links[name].append(ours)
    return links


def measure(
    contestants: dict[str, Contestant], count: int, processes: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Figures of every contestant with so many processes, which all take turns."""
    links = start_processes(contestants, count, processes, options)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    work: dict[str, list[float]] = {name: [] for name in contestants}
    memory = dict.fromkeys(contestants, 0)
    fetched = processes * options.batches * options.batch
    for round_ in range(options.rounds + 1):
        for name in contestants:
            begun, used = time.perf_counter(), cpu_seconds()
            for link in links[name]:
                link.send(True)
            memory[name] = max(memory[name], *(link.recv() for link in links[name]))
            if round_:
                seconds[name].append((time.perf_counter() - begun) / fetched)
                work[name].append((cpu_seconds() - used) / fetched)
        say(f"{processes} processes, round {round_} of {options.rounds}")
    for link in itertools.chain(*links.values()):
        link.send(False)
    return {
        name: {
            "regions/s": 1 / statistics.median(seconds[name]),
            "ratio": divide(seconds[ORIGINAL], seconds[name]),
            "CPU ms": 1e3 * statistics.median(work[name]),
            "CPU ratio": divide(work[ORIGINAL], work[name]),
            "held KiB": contestant.held / count / 1024,
            "moved KiB": contestant.moved / 1024,
            "process MiB": memory[name] / 2**20,
        }
        for name, contestant in contestants.items()
    }


def divide(one: list[float], other: list[float]) -> float:
    """Median ratio of two figures of the same rounds; CPU time counts in hundredths of a second."""
    return statistics.median(a / max(b, 1e-9) for a, b in zip(one, other, strict=True))


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, slides=8, regions=32, batch=128, batches=4, rounds=9, workers=2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("regions")
        make_regions(folder, options.slides, options.regions)
        with run_server(folder) as (tcp, unix):
            contestants = find_contestants(folder, tcp, unix)
            count = options.slides * options.regions
            check_same(contestants, count)
            for processes in sorted({1, options.workers}):
                results[processes] = measure(contestants, count, processes, options)
    if options.json:
        print(json.dumps(results))
        return
    size = f"{SIDE} x {SIDE} tiles x {WIDTH} features"
    print(f"{count} regions of {size}, batches of {options.batch}, {options.rounds} rounds")
    for processes, rows in results.items():
        print(f"{processes} processes")
        for who, figures in rows.items():
            print(f"  {who:22}" + "".join(f"{what:>12} {x:8.2f}" for what, x in figures.items()))


if __name__ == "__main__":
    main()
