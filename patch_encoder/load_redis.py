"""Put regions on a Redis server for store=redis, compare them, list what is there, drop it.

    python -m patch_encoder.load_redis regions=runs/regions/uni2_h
    python -m patch_encoder.load_redis regions=runs/regions/uni2_h action=verify

Every region set has a namespace of its own, so that cohorts share a server. Filling goes on where
it was ended, and writes what is missing or damaged.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from patch_encoder.regions.redis_filling import (
    drop_namespace,
    fill_namespace,
    find_differences,
)
from patch_encoder.regions.redis_server import RegionServer, short_digest
from patch_encoder.regions.region_set import RegionSet, read_region_set
from wsi_common.cli import launch
from wsi_common.config import key
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
SHOWN = 10  # regions that are named


@dataclass
class Config:
    """Keys of the loading of regions."""

    regions: str = key(
        "", "folder of region files; not needed to list, nor to drop by namespace", path=True
    )
    features: str = key(
        "", "folder of feature bags; of indexed regions, where it moved since", path=True
    )
    redis_url: str = key(
        "",
        "Redis server; redis://[:password@]host:port/db or unix:///path; empty: REDIS_URL of the "
        "environment, else redis://localhost:6379",
        runtime=True,
    )
    action: str = key(
        "fill",
        "fill: write what is missing or differs; verify: compare all values with the files; list: "
        "the region sets on the server; drop: remove one",
        choices=("fill", "verify", "list", "drop"),
    )
    namespace: str = key("", "region set to drop, as action=list names it; empty: that of regions")


def need_regions(config: Config) -> RegionSet:
    """The set that the keys name."""
    if not config.regions:
        raise UserError(f"action={config.action}: expected regions=<folder>, found none")
    return read_region_set(config.regions, features=config.features)


def verify(server: RegionServer, regions: RegionSet) -> int:
    """Compare all values; the exit status."""
    meta = server.read_meta(regions.namespace)
    found = find_differences(server, regions)
    for region in found[:SHOWN]:
        logger.error("%s is missing or differs", regions.describe(region))
    complete = bool(meta and meta.get("complete"))
    good = complete and not found
    logger.log(
        logging.INFO if good else logging.ERROR,
        "%s: %d of %d regions are missing or differ, the set is %s%s",
        *(server.name, len(found), len(regions)),
        "complete" if complete else "not complete",
        "" if good else "; action=fill mends it",
    )
    return int(not good)


def list_sets(server: RegionServer) -> None:
    """Log the region sets of a server, one a line."""
    names = server.list_namespaces()
    for name in names:
        meta = server.read_meta(name) or {}
        side, state = meta.get("region_tiles"), "complete" if meta.get("complete") else "partial"
        logger.info(
            "%s: %s, %s, %s regions of %s x %s tiles, %s features, %d slides",
            *(name, state, meta.get("encoder"), meta.get("regions"), side, side),
            *(meta.get("width"), len(meta.get("slides", []))),
        )
    logger.info("%s: %d region sets", server.name, len(names))


def drop(server: RegionServer, config: Config) -> None:
    """Remove one region set."""
    namespace = config.namespace or short_digest(need_regions(config).namespace)
    if not re.fullmatch(r"[0-9a-f]{16}", namespace):
        raise UserError(
            f"namespace={namespace}: expected 16 hexadecimal digits; action=list names them"
        )
    count = drop_namespace(server, namespace)
    if not count:
        known = ", ".join(server.list_namespaces()) or "none"
        raise UserError(f"{server.name}: expected the region set {namespace}, found {known}")
    logger.info("%s: dropped %d keys of %s", server.name, count, namespace)


def main(config: Config) -> int:
    server = RegionServer(config.redis_url)
    if config.action == "verify":
        return verify(server, need_regions(config))
    if config.action == "list":
        list_sets(server)
    elif config.action == "drop":
        drop(server, config)
    else:
        regions = need_regions(config)
        written = fill_namespace(server, regions)
        logger.info(
            "%s: %d regions of %d slides in %s, %d written",
            *(server.name, len(regions), len(regions.slides), short_digest(regions.namespace)),
            written,
        )
    return 0


if __name__ == "__main__":
    launch(main, Config)
