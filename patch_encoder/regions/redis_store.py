"""Regions from a Redis server that load_redis has filled (`store=redis`).

Source: SLPD keeps its regions in Redis. Differences: one request for about 16 regions instead of
one for each; half precision and a checksum instead of pickled float32, which is twice as long and
runs whatever code it holds; a namespace per region set, so that cohorts share a server; and every
fault names its region and the remedy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patch_encoder.regions.redis_server import (
    FIRST_WAIT,
    FORMAT,
    RETRIES,
    RegionServer,
    region_key,
    short_digest,
)
from patch_encoder.regions.region_set import RegionSet
from patch_encoder.regions.store import FileStore, RegionStore
from patch_encoder.regions.value_stream import ValueStream
from patch_encoder.regions.values import HEADER_BYTES, find_damage, mask_bytes, value_bytes
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)


class RedisStore(RegionStore):
    """Regions of a set on a server.

    Args:
        regions: the set.
        standardise: as RegionStore.
        url: as RegionServer.
        on_missing: "error", or "hdf5": what the server lost or damaged is read from the files.

    Attributes:
        misses: regions that were read from the files instead.

    Raises:
        UserError: no server, another region set, one that is not complete, a server that evicts.
    """

    def __init__(
        self,
        regions: RegionSet,
        standardise: str = "none",
        url: str = "",
        on_missing: str = "error",
    ) -> None:
        super().__init__(regions, standardise)
        self.url, self.on_missing, self.misses = url, on_missing, 0
        self.remedy = f"run tools/load_redis.sh regions={regions.folder} or set on_missing=hdf5"
        self._gone = False  # on_missing=hdf5: the server is not asked any more
        self._files = FileStore(regions) if on_missing == "hdf5" else None
        try:
            self._check_server()
        except UserError as error:
            if self._files is None:
                raise
            self._leave_server(str(error))

    def _check_server(self) -> None:
        server = RegionServer(self.url)
        meta = server.read_meta(self.regions.namespace)
        where = f"{server.name}: expected the regions {short_digest(self.regions.namespace)}"
        if meta is None:
            others = ", ".join(server.list_namespaces()) or "none at all"
            raise UserError(f"{where}, found {others}; {self.remedy}")
        check_meta(meta, self.regions, f"{where} of {self.regions.folder}", self.remedy)
        server.check_settings()
        server.client.close()

    def _leave_server(self, reason: str) -> None:
        self._gone = True
        logger.warning("store=redis: %s; all regions are read from the files", reason)

    def _read(self, ids: np.ndarray) -> Tensor:
        features = torch.empty(len(ids), self.region_tiles**2, self.width, dtype=torch.float16)
        if not self._gone:
            problems = self._read_values(ids, features)
        if self._gone:
            problems = dict.fromkeys(range(len(ids)), "")
        if not problems:
            return features
        if self._files is None:
            place = min(problems)
            raise UserError(
                f"{self.regions.describe(int(ids[place]))} {problems[place]}; {self.remedy}"
            )
        places = sorted(problems)
        if not self.misses and not self._gone:
            line = "store=redis: %s %s; it is read from the files, as are others like it"
            logger.warning(line, self.regions.describe(int(ids[places[0]])), problems[places[0]])
        self.misses += len(places)
        features[places] = self._files._read(ids[places])
        return features

    def _read_values(self, ids: np.ndarray, features: Tensor) -> dict[int, str]:
        """Fill `features`, over a new connection where the old one broke: three more times.

        Returns:
            place -> what is wrong with the value there.
        """
        for attempt in range(RETRIES + 1):
            try:
                if "stream" not in self._opened:
                    self._opened["stream"] = ValueStream(RegionServer(self.url).address)
                return self._receive(self._opened["stream"], ids, features)
            except OSError as error:
                self.close()
                reason = error
            if attempt < RETRIES:
                time.sleep(FIRST_WAIT * 2**attempt)
        return self._lose_server(reason, int(ids[0]))

    def _receive(self, stream: ValueStream, ids: np.ndarray, features: Tensor) -> dict[int, str]:
        numbers = self.regions.numbers[ids].tolist()
        headers = np.empty((len(ids), HEADER_BYTES), np.uint8)
        masks = np.empty((len(ids), mask_bytes(self.region_tiles)), np.uint8)
        bodies = features.flatten(1).numpy().view(np.uint8)
        keys = [region_key(self.regions.namespace, number) for number in numbers]
        expected = value_bytes(self.region_tiles, self.width)
        problems = {}
        for place, length in stream.read(keys, [headers, bodies, masks]):
            if length < 0:
                problem = "is not on the server (evicted, restarted empty, or another namespace)"
            elif length != expected:
                problem = f"has a value of {length} bytes, expected {expected}"
            else:
                value = (headers[place], bodies[place], masks[place])
                valid = self.regions.rows[ids[place]] >= 0
                problem = find_damage(numbers[place], *value, valid)
            if problem:
                problems[place] = problem
        return problems

    def _lose_server(self, error: Exception, region: int) -> dict[int, str]:
        name = self.regions.describe(region)
        problem = RegionServer(self.url).failure(error, f"{name} from a Redis server")
        if self._files is None:
            raise problem
        self._leave_server(str(problem))
        return {}

    def close(self) -> None:
        """Close the connection."""
        for stream in self._opened.values():
            stream.close()
        super().close()


def check_meta(meta: Mapping[str, Any], regions: RegionSet, where: str, remedy: str) -> None:
    """Refuse a namespace that is not complete, or not what this version reads.

    Raises:
        UserError: either.
    """
    if meta.get("format") != FORMAT:
        raise UserError(f"{where} in format {FORMAT}, found {meta.get('format')}; {remedy}")
    shape = (meta.get("region_tiles"), meta.get("width"))
    if shape != (regions.region_tiles, regions.width):
        raise UserError(
            f"{where} of {regions.region_tiles} x {regions.region_tiles} tiles with "
            f"{regions.width} features, found {shape}; {remedy}"
        )
    if not meta.get("complete"):
        raise UserError(f"{where}, found only a part of them (filling was interrupted); {remedy}")
