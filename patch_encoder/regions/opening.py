"""Opens the store that the keys of a script name."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from patch_encoder.cohort.labels import read_labels
from patch_encoder.cohort.selection import read_selection
from patch_encoder.regions.keys import RegionKeys
from patch_encoder.regions.region_set import RegionSet, read_region_set
from patch_encoder.regions.store import FileStore, RamStore, RegionStore
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
SHOWN = 5  # slides that a line of the log names


def read_regions(keys: RegionKeys) -> RegionSet:
    """The set of regions that the keys name.

    Raises:
        UserError: as `read_region_set`, or a table of patients with none of the slides.
    """
    records = read_labels(keys.labels) if keys.labels else []
    patients = {record.slide_id: record.case_id for record in records}
    selection = read_selection(keys.slides_list, ())
    regions = read_region_set(keys.regions, selection.takes_id, patients, keys.features)
    if keys.labels:
        _check_patients(keys, regions.slides, list(patients))
    return regions


def _check_patients(keys: RegionKeys, slides: Sequence[str], known: Sequence[str]) -> None:
    """Say which slides have no patient, since slides of one patient are kept apart."""
    unknown = sorted(set(slides) - set(known))
    if len(unknown) == len(slides):
        raise UserError(
            f"labels={keys.labels}: expected the slides of {keys.regions}, such as {slides[0]}, "
            f"found others, such as {known[0]}; give the table of this cohort, or leave it out"
        )
    if unknown:
        line = "%s: %d of %d slides have no row and count as patients of their own: %s"
        logger.warning(line, keys.labels, len(unknown), len(slides), ", ".join(unknown[:SHOWN]))


def open_store(keys: RegionKeys) -> RegionStore:
    """The store of the regions that the keys name.

    Raises:
        UserError: as `read_regions` and the stores.
    """
    regions = read_regions(keys)
    if keys.store == "ram":
        return RamStore(regions, keys.standardise)
    if keys.store == "redis":
        # the package is needed here alone
        from patch_encoder.regions.redis_store import RedisStore

        return RedisStore(regions, keys.standardise, keys.redis_url, keys.on_missing)
    return FileStore(regions, keys.standardise)
