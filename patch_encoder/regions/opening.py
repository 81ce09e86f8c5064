"""Opens the store that the keys of a script name."""

from __future__ import annotations

from collections.abc import Mapping

from patch_encoder.cohort.labels import read_labels
from patch_encoder.cohort.selection import read_selection
from patch_encoder.regions.keys import RegionKeys
from patch_encoder.regions.region_set import RegionSet, read_region_set
from patch_encoder.regions.store import FileStore, RamStore, RegionStore


def read_regions(keys: RegionKeys, cases: Mapping[str, str] | None = None) -> RegionSet:
    """The set of regions that the keys name.

    Args:
        keys: of the script.
        cases: slide id -> patient, where `labels` does not say it.

    Raises:
        UserError: as `read_region_set`.
    """
    records = read_labels(keys.labels) if keys.labels else []
    patients = dict(cases or {}) | {record.slide_id: record.case_id for record in records}
    selection = read_selection(keys.slides_list, ())
    return read_region_set(keys.regions, selection.takes_id, patients, keys.features)


def open_store(keys: RegionKeys, cases: Mapping[str, str] | None = None) -> RegionStore:
    """The store of the regions that the keys name.

    Raises:
        UserError: as `read_regions` and the stores.
    """
    regions = read_regions(keys, cases)
    if keys.store == "ram":
        return RamStore(regions, keys.standardise)
    if keys.store == "redis":
        # the package is needed here alone
        from patch_encoder.regions.redis_store import RedisStore

        return RedisStore(regions, keys.standardise, keys.redis_url, keys.on_missing)
    return FileStore(regions, keys.standardise)
