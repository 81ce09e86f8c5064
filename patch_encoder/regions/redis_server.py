"""A Redis server that holds regions: how it is reached, what it must be set to, what fits in it."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patch_encoder.regions.value_stream import CONNECT_SECONDS, REPLY_SECONDS
from wsi_common.errors import UserError
from wsi_common.memory import free_memory

logger = logging.getLogger(__name__)
DEFAULT_URL = "redis://localhost:6379"
FORMAT = 1
RETRIES = 3
FIRST_WAIT, LONGEST_WAIT = 0.2, 2.0  # seconds before a request is tried again
START = "start one with tools/redis_server.sh and fill it with tools/load_redis.sh"
LOCAL = ("localhost", "127.0.0.1", "::1")


def import_redis() -> Any:
    """The package, or one line that says how to get it."""
    try:
        import redis
    except ImportError:
        raise UserError(
            "a Redis server: expected the package redis, found none; pip install 'redis>=5,<9', or "
            "set store=hdf5, which needs no server"
        ) from None
    return redis


class RegionServer:
    """A server, by its URL; connected when it is first asked something.

    Args:
        url: `redis://[[user]:password@]host:port/db` or `unix:///path`; empty: REDIS_URL of the
            environment, else localhost.

    Raises:
        UserError: no such URL, or the package redis is missing.
    """

    def __init__(self, url: str = "") -> None:
        self.url = url or os.environ.get("REDIS_URL", "") or DEFAULT_URL
        self.name = re.sub(r"//[^/]*@", "//", self.url)  # without the password
        if not self.url.startswith(("redis://", "unix://")):
            raise UserError(
                f"redis_url={self.name}: expected redis://host:port/db or unix:///path/to/socket"
            )
        redis = import_redis()
        from redis.backoff import ExponentialBackoff
        from redis.retry import Retry

        try:
            self.client = redis.Redis.from_url(
                self.url,
                socket_connect_timeout=CONNECT_SECONDS,
                socket_timeout=REPLY_SECONDS,
                retry=Retry(ExponentialBackoff(LONGEST_WAIT, FIRST_WAIT), RETRIES),
            )
        except ValueError as error:  # a port or a database that is no number
            raise UserError(
                f"redis_url={self.name}: expected redis://host:port/db or unix:///path/to/socket, "
                f"found: {error}"
            ) from None
        self.address: dict[str, Any] = self.client.connection_pool.connection_kwargs

    @property
    def is_local(self) -> bool:
        """Whether it shares the memory of this machine."""
        return "path" in self.address or self.address.get("host", "localhost") in LOCAL

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What redis-py raises meanwhile becomes one line.

        Raises:
            UserError: no server, a wrong password, or a request that it refuses.
        """
        errors = (import_redis().RedisError, OSError)
        try:
            yield
        except errors as error:
            raise self.failure(error) from None

    def failure(self, error: Exception, what: str = "") -> UserError:
        """The line for an error of redis-py or of a socket.

        Args:
            error: the error.
            what: what was wanted of the server.
        """
        reason = " ".join(str(error).split()) or type(error).__name__
        wanted = what or "a Redis server"
        if isinstance(error, import_redis().AuthenticationError) or "NOAUTH" in reason:
            remedy = "give the password, as in redis://:password@host:port"
        else:
            remedy = f"{START}, or set store=hdf5"
        return UserError(f"{self.name}: expected {wanted}, found: {reason}; {remedy}")

    def read_meta(self, namespace: str) -> dict[str, Any] | None:
        """The description of a namespace; None where the server does not have it."""
        with self.explained():
            text = self.client.get(meta_key(namespace))
        if text is None:
            return None
        try:
            meta = json.loads(text)
            return meta if isinstance(meta, dict) else {}
        except ValueError:
            return {}

    def write_meta(self, namespace: str, meta: dict[str, Any]) -> None:
        """Describe a namespace."""
        with self.explained():
            self.client.set(meta_key(namespace), json.dumps(meta))

    def list_namespaces(self) -> list[str]:
        """Short digests of the region sets on the server, sorted; SCAN does not block it."""
        with self.explained():
            keys = list(self.client.scan_iter(match="slpd:*:meta", count=1000))
        return sorted(key.decode("utf-8", "replace").split(":")[1] for key in keys)

    def check_settings(self) -> None:
        """Refuse a server that may throw regions away, warn of one that writes them to its disk.

        Raises:
            UserError: an eviction policy.
        """
        with self.explained():
            info = self.client.info()
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise UserError(
                f"{self.name}: expected maxmemory-policy noeviction, found {policy}, which drops "
                "regions when memory is short; redis-cli config set maxmemory-policy noeviction"
            )
        try:
            snapshots = self.client.config_get("save").get("save", "")
        except import_redis().ResponseError:  # a managed server tells nobody
            snapshots = ""
        if snapshots or info.get("aof_enabled"):
            logger.warning(
                "%s: writes snapshots or a log to its disk, which doubles its memory meanwhile; "
                "redis-cli config set save '' appendonly no",
                self.name,
            )

    def free_bytes(self) -> tuple[int, str]:
        """Bytes that the server may still take, and what sets the limit."""
        with self.explained():
            info = self.client.info("memory")
        if self.is_local:
            free, limit = free_memory(), "of memory free on this machine"
        else:
            free = int(info.get("total_system_memory", sys.maxsize)) - int(info["used_memory"])
            limit = "of the server's memory free"
        most = int(info.get("maxmemory", 0))
        if most and most - int(info["used_memory"]) < free:
            free, limit = max(0, most - int(info["used_memory"])), "below its maxmemory"
        return free, limit


def short_digest(namespace: str) -> str:
    """What stands in keys."""
    return namespace[:16]


def meta_key(namespace: str) -> str:
    """Key of the description of a region set."""
    return f"slpd:{short_digest(namespace)}:meta"


def region_key(namespace: str, number: int) -> str:
    """Key of the region `number` of a set."""
    return f"slpd:{short_digest(namespace)}:{number}"
