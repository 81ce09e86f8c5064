"""The keys of scripts that read regions."""

from __future__ import annotations

from dataclasses import dataclass

from patch_encoder.cohort.keys import SlidesListKeys
from patch_encoder.regions.store import STANDARDISE
from wsi_common.config import REQUIRED, key

STORES = ("hdf5", "ram", "redis")


@dataclass
class RegionKeys(SlidesListKeys):
    """Where regions come from, and how their features are scaled."""

    regions: str = key(
        REQUIRED, "folder of region files; <regions>/<encoder> of build_regions", path=True
    )
    features: str = key(
        "", "folder of feature bags; of indexed regions, where it moved since", path=True
    )
    labels: str = key("", "labels.csv of the cohort; patients come from it", path=True)
    store: str = key(
        "hdf5",
        "where features are read from; hdf5: the files through memory maps, ram: all in memory, "
        "redis: a server that load_redis has filled",
        choices=STORES,
        runtime=True,
    )
    redis_url: str = key(
        "",
        "Redis server; redis://[:password@]host:port/db or unix:///path; empty: REDIS_URL of the "
        "environment, else redis://localhost:6379",
        runtime=True,
    )
    on_missing: str = key(
        "error",
        "what store=redis does about regions that the server lost or damaged; hdf5: they are read "
        "from the files and counted",
        choices=("error", "hdf5"),
        runtime=True,
    )
    standardise: str = key(
        "none",
        "scale of the features; slide: each feature has mean 0 and standard deviation 1 over the "
        "tiles of its slide, which takes a slide's stain away",
        choices=STANDARDISE,
    )
