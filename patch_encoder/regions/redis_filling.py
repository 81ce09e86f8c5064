"""Fills a Redis server with the regions of a set, compares them, and drops them.

Filling compares what is there byte by byte and writes what is missing or differs, so that the same
call starts, goes on after a kill, and mends. The description of the namespace says `complete` only
after the last region.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from patch_encoder.regions.files import gather_tiles
from patch_encoder.regions.redis_server import (
    FORMAT,
    RegionServer,
    import_redis,
    region_key,
    short_digest,
)
from patch_encoder.regions.region_set import RegionSet
from patch_encoder.regions.values import pack_value, value_bytes
from wsi_common.errors import UserError
from wsi_common.progress import Progress

logger = logging.getLogger(__name__)
CHUNK = 16  # regions that are compared or written at a time
EXISTS_CHUNK = 1000


class Chunk(NamedTuple):
    """Consecutive regions with their keys, their values, and what the server has there."""

    regions: list[int]
    keys: list[str]
    values: list[bytes]
    found: list[bytes | None]

    def differing(self) -> list[int]:
        """Places whose value on the server is missing or another."""
        return [place for place, value in enumerate(self.values) if self.found[place] != value]


def describe_set(regions: RegionSet, complete: bool) -> dict[str, Any]:
    """What the server says of a namespace."""
    return {
        "format": FORMAT,
        "dtype": "float16",
        "namespace": regions.namespace,
        "encoder": regions.encoder,
        "region_tiles": regions.region_tiles,
        "width": regions.width,
        "slides": regions.slides,
        "counts": regions.counts.tolist(),
        "regions": len(regions),
        "complete": complete,
    }


def fill_namespace(server: RegionServer, regions: RegionSet) -> int:
    """Put all regions of a set on a server; how many were written.

    Raises:
        UserError: no server, one that evicts, too little memory; what is written stays.
    """
    server.check_settings()
    known = server.read_meta(regions.namespace) is not None
    check_memory(server, regions)
    server.write_meta(regions.namespace, describe_set(regions, complete=False))
    written = 0
    with server.explained():
        for chunk in walk_chunks(server, regions, compare=known):
            places = chunk.differing()
            _write(server, regions, chunk, places)
            written += len(places)
    server.write_meta(regions.namespace, describe_set(regions, complete=True))
    return written


def _write(server: RegionServer, regions: RegionSet, chunk: Chunk, places: list[int]) -> None:
    if not places:
        return
    pipe = server.client.pipeline(transaction=False)
    for place in places:
        pipe.set(chunk.keys[place], chunk.values[place])
    try:
        pipe.execute()
    except import_redis().OutOfMemoryError:
        region = regions.describe(chunk.regions[places[0]])
        raise UserError(
            f"{server.name}: expected memory for {region}, found maxmemory reached; raise it "
            "(redis-cli config set maxmemory) or drop another namespace, and run it again: what is "
            "written stays"
        ) from None


def find_differences(server: RegionServer, regions: RegionSet) -> list[int]:
    """Regions that the server does not have, or has with another value."""
    with server.explained():
        return [
            chunk.regions[place]
            for chunk in walk_chunks(server, regions, compare=True)
            for place in chunk.differing()
        ]


def walk_chunks(server: RegionServer, regions: RegionSet, *, compare: bool) -> Iterator[Chunk]:
    """All regions in order, 16 at a time; without `compare` the server is not asked."""
    with Progress("regions", len(regions), "regions") as counter:
        for slide in range(len(regions.slides)):
            tiles = regions.tables[slide].open()
            for ids in np.split(numbers := regions.region_numbers(slide), _cuts(numbers)):
                features = gather_tiles(tiles, regions.rows[ids]).numpy()
                keys = [region_key(regions.namespace, region) for region in ids.tolist()]
                values = [
                    pack_value(region, values, regions.rows[region] >= 0)
                    for region, values in zip(ids.tolist(), features, strict=True)
                ]
                found = server.client.mget(keys) if compare else [None] * len(keys)
                yield Chunk(ids.tolist(), keys, values, found)
                counter.advance(len(ids))


def _cuts(numbers: np.ndarray) -> np.ndarray:
    return np.arange(CHUNK, len(numbers), CHUNK)


def check_memory(server: RegionServer, regions: RegionSet) -> None:
    """Compare what the regions that are not there yet will take with what is free.

    Raises:
        UserError: they do not fit.
    """
    each = measure_key(server, value_bytes(regions.region_tiles, regions.width))
    there = count_regions(server, regions)
    needed, (free, limit) = each * (len(regions) - there), server.free_bytes()
    if needed > free:
        raise UserError(
            f"{server.name}: expected {needed / 2**30:.2f} GiB for {len(regions) - there} regions, "
            f"found {free / 2**30:.2f} GiB {limit}; raise maxmemory, take a larger machine, or set "
            "store=hdf5, which needs no server"
        )
    total = each * len(regions) / 2**30
    line = "%s: %d regions of %d bytes take %.2f GiB"
    logger.info(line, server.name, len(regions), each, total)


def measure_key(server: RegionServer, size: int) -> int:
    """Bytes that a value of `size` bytes takes on the server, with all that is around it."""
    key = f"slpd:probe:{secrets.token_hex(8)}"
    with server.explained():
        try:
            server.client.set(key, bytes(size), ex=60)
            return int(server.client.memory_usage(key) or size)
        except import_redis().OutOfMemoryError:  # the comparison with what is free says so
            return size
        finally:
            server.client.delete(key)


def count_regions(server: RegionServer, regions: RegionSet) -> int:
    """Regions of a set that the server has."""
    keys = [region_key(regions.namespace, number) for number in range(len(regions))]
    with server.explained():
        return sum(
            server.client.exists(*keys[start : start + EXISTS_CHUNK])
            for start in range(0, len(keys), EXISTS_CHUNK)
        )


def drop_namespace(server: RegionServer, namespace: str) -> int:
    """Remove a region set from a server; how many keys there were. Its description goes first, so
    that nobody takes what is left for complete.
    """
    client, digest = server.client, short_digest(namespace)
    with server.explained():
        dropped = client.unlink(f"slpd:{digest}:meta")
        keys: list[bytes] = []
        for key in client.scan_iter(match=f"slpd:{digest}:*", count=EXISTS_CHUNK):
            keys.append(key)
            if len(keys) == EXISTS_CHUNK:
                dropped += client.unlink(*keys)
                keys = []
        return dropped + (client.unlink(*keys) if keys else 0)
