"""Decoded tiles on disk, shared by epochs, runs and machines.

Only tiles at their stored places are worth keeping (`jitter=0`): no offset is ever drawn twice. A
shard holds 32 tiles of one slide, spread over it, as JPEG of quality 95 (25 kB each at 256 px).
It is written whole when the first of its tiles is drawn, and a visit of the slide draws from one
shard. A file that is damaged, or of other settings, is made anew.

A shard is one line of JSON (SHA-256 of what follows; for each picture its bytes, or why the tile
cannot be read) and the JPEG streams.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import cv2
import numpy as np
from jaxtyping import UInt8

from patch_encoder.slides import SlideError
from patch_encoder.slides.names import compute_fingerprint
from patch_encoder.tile_stream.plan import Draw, TilePlan
from wsi_common.files import atomic_path, sha256_bytes

logger = logging.getLogger(__name__)
QUALITY = [
    *(cv2.IMWRITE_JPEG_QUALITY, 95),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
]
IN_MEMORY = 4  # shards that a process keeps
Entry = bytes | str  # a picture, or why it cannot be read


class TileCache:
    """The shards of a plan.

    Args:
        folder: where they lie.
        plan: whose `shard` is set.
        context_factor: of the second picture of each tile; 0: there is none.
        decode: a draw -> its pictures (pictures, 3, s, s), or why it cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        plan: TilePlan,
        context_factor: int,
        decode: Callable[[Draw], UInt8[np.ndarray, "pictures 3 s s"] | str],
    ) -> None:
        self._folder, self._plan, self._decode = folder, plan, decode
        self._context_factor = context_factor
        self._shards: OrderedDict[Path, list[list[Entry]]] = OrderedDict()
        self._names = dict[tuple[int, float], str]()

    def read(self, draw: Draw, out: UInt8[np.ndarray, "pictures 3 s s"]) -> str:
        """The tile of a draw; why it cannot be read, else an empty string."""
        shard, number = self._plan.shard_of(draw.slide, draw.tile)
        entries = self._open(draw, shard)[number]
        for entry, picture in zip(entries, out, strict=False):
            if isinstance(entry, str):
                return entry
            picture[:] = _decode_jpeg(entry)
        return ""

    def _open(self, draw: Draw, shard: int) -> list[list[Entry]]:
        """The entries of each tile of a shard."""
        path = self._folder / self._name(draw) / f"{shard}.tiles"
        if path not in self._shards:
            tiles = self._plan.tiles_of(draw.slide, shard)
            entries = _read_shard(path, len(tiles))
            if entries is None:
                entries = [self._encode(self._plan.at_tile(draw, tile)) for tile in tiles]
                _write_shard(path, entries)
            self._shards[path] = entries
            while len(self._shards) > IN_MEMORY:
                self._shards.popitem(last=False)
        self._shards.move_to_end(path)
        return self._shards[path]

    def _encode(self, draw: Draw) -> list[Entry]:
        pictures = self._decode(draw)
        if isinstance(pictures, str):
            return [pictures]
        return [_encode_jpeg(picture) for picture in pictures]

    def _name(self, draw: Draw) -> str:
        """Folder of a slide's shards: all that decides their pixels is in its name."""
        known = draw.slide, draw.mpp
        if known not in self._names:
            plan, source = self._plan, self._plan.sources[draw.slide]
            settings = (plan.tile_size, draw.side, self._context_factor, plan.shard)
            try:
                fingerprint = compute_fingerprint(source.path)
            except OSError as error:
                raise SlideError(f"slide {source.path}: cannot be read: {error}") from None
            parts = (fingerprint, source.coordinates.digest(), repr(settings))
            self._names[known] = sha256_bytes(*(part.encode() for part in parts))[:32]
        return self._names[known]


def prepare_cache(folder: str) -> None:
    """Make the folder of a cache, and write to it once: a reader that could not keep its shards
    would count them as unreadable tiles.

    Raises:
        OSError: it cannot be written.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=folder).close()


def _read_shard(path: Path, tiles: int) -> list[list[Entry]] | None:
    """The entries of each tile, None where the file is missing or damaged."""
    if not path.is_file():
        return None
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        header = json.loads(head)
        if header["sha256"] != sha256_bytes(body) or len(header["tiles"]) != tiles:
            raise ValueError("other content than its header says")
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s: damaged (%s); it is made anew", path, error)
        return None
    entries, start = [], 0
    for pictures in header["tiles"]:
        entries.append([])
        for size in pictures:
            if isinstance(size, str):
                entries[-1].append(size)
            else:
                entries[-1].append(body[start : start + size])
                start += size
    return entries


def _write_shard(path: Path, entries: Sequence[Sequence[Entry]]) -> None:
    sizes = [[e if isinstance(e, str) else len(e) for e in pictures] for pictures in entries]
    body = b"".join(e for pictures in entries for e in pictures if isinstance(e, bytes))
    head = json.dumps({"sha256": sha256_bytes(body), "tiles": sizes})
    with atomic_path(path) as temporary:
        temporary.write_bytes(head.encode() + b"\n" + body)


def _encode_jpeg(picture: UInt8[np.ndarray, "3 s s"]) -> bytes:
    done, stream = cv2.imencode(".jpg", picture[::-1].transpose(1, 2, 0), QUALITY)
    assert done
    return stream.tobytes()


def _decode_jpeg(stream: bytes) -> UInt8[np.ndarray, "3 s s"]:
    pixels = cv2.imdecode(np.frombuffer(stream, np.uint8), cv2.IMREAD_COLOR)
    return pixels.transpose(2, 0, 1)[::-1]
