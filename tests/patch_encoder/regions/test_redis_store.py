"""Regions from a real Redis server: the same bits as from files, and one line for every fault."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import redis
import torch

from patch_encoder.regions import redis_store, value_stream
from patch_encoder.regions.redis_filling import fill_namespace
from patch_encoder.regions.redis_server import RegionServer, meta_key, region_key
from patch_encoder.regions.redis_store import RedisStore
from patch_encoder.regions.region_set import RegionSet, read_region_set
from patch_encoder.regions.store import FileStore
from patch_encoder.regions.values import HEADER_BYTES, pack_value
from tests.patch_encoder.regions.cohort import build, write_cohort
from tests.patch_encoder.regions.conftest import Server
from tests.patch_encoder.regions.test_stores import open_regions, pick_ids
from wsi_common.errors import UserError


@pytest.fixture
def regions(tmp_path: Path, server: Server) -> RegionSet:
    """A set whose regions are on the server."""
    write_cohort(tmp_path / "features")
    assert build(tmp_path, "region_tiles=3", "min_fill=0") == 0
    found = read_region_set(tmp_path / "regions" / "tiny")
    assert fill_namespace(RegionServer(server.url), found) == len(found)
    return found


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "FIRST_WAIT", 0.02)


def key_of(regions: RegionSet, region: int) -> str:
    return region_key(regions.namespace, region)


@pytest.mark.parametrize("standardise", ["none", "slide"])
def test_redis_gives_the_bits_of_the_files(
    regions: RegionSet, server: Server, standardise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(value_stream, "KEYS_PER_REQUEST", 7)  # several requests, the last shorter
    files = FileStore(regions, standardise)
    ids = pick_ids(files)
    for url in (server.url, server.unix_url, f"{server.url}/0"):
        with RedisStore(regions, standardise, url) as store:
            for wanted in (ids, ids[:1], ids[:0]):
                found, valid = store.fetch(wanted)
                expected, same = files.fetch(wanted)
                assert torch.equal(found, expected) and torch.equal(valid, same)


def test_the_url_comes_from_the_key_or_the_environment(
    regions: RegionSet, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(5)
    expected, _ = FileStore(regions).fetch(ids)
    monkeypatch.setenv("REDIS_URL", server.url)
    assert torch.equal(open_regions(tmp_path, "store=redis").fetch(ids)[0], expected)
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    store = open_regions(tmp_path, "store=redis", f"redis_url={server.unix_url}")
    assert torch.equal(pickle.loads(pickle.dumps(store)).fetch(ids)[0], expected)
    with pytest.raises(UserError, match="redis_url=http://host: expected redis://"):
        RegionServer("http://me:secret@host")


def test_a_password_and_another_database(regions: RegionSet, server: Server) -> None:
    server.client().config_set("requirepass", "secret")
    url = f"redis://:secret@127.0.0.1:{server.port}/3"
    fill_namespace(RegionServer(url), regions)
    ids = np.arange(4)
    assert torch.equal(RedisStore(regions, url=url).fetch(ids)[0], FileStore(regions).fetch(ids)[0])
    with pytest.raises(UserError, match="give the password") as caught:
        RedisStore(regions, url=server.url)
    with pytest.raises(UserError) as caught:
        RedisStore(regions, url=url.replace("secret", "wrong"))
    assert "wrong" not in str(caught.value).replace("WRONGPASS", "")


def test_a_selection_reads_from_the_full_set(
    regions: RegionSet, server: Server, tmp_path: Path
) -> None:
    names = tmp_path / "list.txt"
    names.write_text("S2\nS1\n")
    keys = (f"slides_list={names}", f"redis_url={server.url}")
    part = open_regions(tmp_path, "store=redis", *keys)
    every = np.arange(len(part))
    assert torch.equal(part.fetch(every)[0], open_regions(tmp_path, keys[0]).fetch(every)[0])


def spoil(regions: RegionSet, client: redis.Redis, kind: str) -> None:
    """Do to region 4 what happens to values."""
    key = key_of(regions, 4)
    value = bytearray(client.get(key))
    if kind == "evicted":
        client.delete(key)
        return
    if kind == "truncated":
        del value[-5:]
    elif kind == "foreign":
        value = bytearray(pickle.dumps(np.zeros((12, 3, 3), np.float32)))
    elif kind == "foreign, same length":
        value[:] = bytes(len(value))
    elif kind == "another region":
        value = bytearray(client.get(key_of(regions, 5)))
    elif kind == "another version":
        value[4] = 9
    elif kind == "other tiles":
        value = bytearray(
            pack_value(4, FileStore(regions).fetch(np.array([4]))[0][0].numpy(), np.eye(3) > 2)
        )
    else:
        value[
            {"bit of the header": 13, "bit of a feature": HEADER_BYTES + 40, "bit of the mask": -1}[
                kind
            ]
        ] ^= 4
    client.set(key, bytes(value))


FAULTS = {
    "evicted": "is not on the server (evicted, restarted empty, or another namespace)",
    "truncated": "has a value of 229 bytes, expected 234",
    "foreign": "bytes, expected 234",
    "foreign, same length": "holds a value that is no region",
    "another region": "holds the region 5 of a set",
    "another version": "has the version 9.1, expected 1.1",
    "other tiles": "has the tiles of another region",
    "bit of the header": "is damaged: its checksum is another",
    "bit of a feature": "is damaged: its checksum is another",
    "bit of the mask": "is damaged: its checksum is another",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_spoiled_value_is_named_replaced_and_mended(
    regions: RegionSet, server: Server, kind: str
) -> None:
    with server.client() as client:
        spoil(regions, client, kind)
    store = RedisStore(regions, url=server.url)
    with pytest.raises(UserError) as caught:
        store.fetch(np.array([2, 4, 1]))
    line = str(caught.value)
    assert line.startswith(f"region 4 (4 of {regions.counts[0]} of slide S0) ")
    assert FAULTS[kind] in line and "\n" not in line
    assert f"run tools/load_redis.sh regions={regions.folder} or set on_missing=hdf5" in line
    ids = np.array([1, 4, 9, 4])
    expected, _ = FileStore(regions).fetch(ids)
    assert len(store.fetch(np.array([9]))[0]) == 1, "the connection serves on"
    fallback = RedisStore(regions, url=server.url, on_missing="hdf5")
    assert torch.equal(fallback.fetch(ids)[0], expected) and fallback.misses == 2
    assert fill_namespace(RegionServer(server.url), regions) == 1, "that one is written"
    assert torch.equal(store.fetch(ids)[0], expected)


def test_no_server_is_one_line(regions: RegionSet, server: Server) -> None:
    server.kill()
    for url in (server.url, server.unix_url):
        with pytest.raises(UserError) as caught:
            RedisStore(regions, url=url)
        line = str(caught.value)
        assert line.startswith(f"{url}: expected a Redis server, found: ") and "\n" not in line
        assert "tools/redis_server.sh" in line and "set store=hdf5" in line
    ids = pick_ids(FileStore(regions))
    fallback = RedisStore(regions, url=server.url, on_missing="hdf5")
    assert torch.equal(fallback.fetch(ids)[0], FileStore(regions).fetch(ids)[0])
    assert fallback.misses == len(ids)


@pytest.mark.parametrize("url", ["redis://localhost:abc", "redis://localhost:6379?db=x"])
def test_an_address_that_cannot_be_is_one_line(regions: RegionSet, url: str) -> None:
    with pytest.raises(UserError, match="expected redis://host:port/db or unix:///path/to/socket"):
        RedisStore(regions, url=url)


def test_a_server_that_dies_between_batches_is_one_line(regions: RegionSet, server: Server) -> None:
    store, fallback = (
        RedisStore(regions, url=server.url, on_missing=choice) for choice in ("error", "hdf5")
    )
    ids = np.array([5, 2])
    expected, _ = store.fetch(ids)
    fallback.fetch(ids)
    server.kill()
    with pytest.raises(UserError) as caught:
        store.fetch(ids)
    line = str(caught.value)
    assert "region 5 (5 of" in line and "slide S0" in line and "Connection refused" in line
    assert "tools/load_redis.sh" in line and "\n" not in line
    assert torch.equal(fallback.fetch(ids)[0], expected) and fallback.misses == 2


def test_a_server_that_comes_back_in_time_is_not_noticed(
    regions: RegionSet, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "FIRST_WAIT", 0.5)
    store = RedisStore(regions, url=server.url)
    ids = np.array([5, 2])
    expected, _ = store.fetch(ids)
    server.kill()

    def restart() -> None:
        server.start()
        fill_namespace(RegionServer(server.url), regions)

    time.sleep(0.05)
    thread = threading.Thread(target=restart)
    thread.start()
    while server.process.poll() is not None:
        time.sleep(0.01)
    thread.join()
    assert torch.equal(store.fetch(ids)[0], expected)


def test_a_server_that_restarts_empty_is_named(regions: RegionSet, server: Server) -> None:
    store = RedisStore(regions, url=server.url)
    store.fetch(np.arange(3))
    server.kill()
    server.start()
    with pytest.raises(UserError, match=r"region 6 \(6 of .* restarted empty.*load_redis"):
        store.fetch(np.array([6, 1]))
    with pytest.raises(UserError, match="expected the regions .*, found none at all; run tools"):
        RedisStore(regions, url=server.url)


def test_a_hanging_server_is_given_up(
    regions: RegionSet, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(value_stream, "REPLY_SECONDS", 0.1)
    store = RedisStore(regions, url=server.url)
    server.process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(UserError, match="region 3 .* from a Redis server, found: timed out"):
        store.fetch(np.array([3]))
    assert time.monotonic() - started < 30
    server.process.send_signal(signal.SIGCONT)
    monkeypatch.undo()
    assert len(store.fetch(np.array([3]))[0]) == 1


def test_other_sets_partial_sets_and_old_formats_are_refused(
    regions: RegionSet, server: Server, tmp_path: Path
) -> None:
    assert build(tmp_path, "region_tiles=3", "stride=1", output="other") == 0
    other = read_region_set(tmp_path / "other" / "tiny")
    with pytest.raises(UserError) as caught:
        RedisStore(other, url=server.url)
    assert regions.namespace[:16] in str(caught.value), "what is there instead"
    link = RegionServer(server.url)
    fill_namespace(link, other)
    ids = np.arange(6)
    for found in (regions, other):
        assert torch.equal(
            RedisStore(found, url=server.url).fetch(ids)[0], FileStore(found).fetch(ids)[0]
        ), "two sets share a server"
    meta = link.read_meta(regions.namespace)
    for change, line in (
        ({"complete": False}, "only a part of them .*; run tools/load_redis.sh"),
        ({"format": 0}, "in format 1, found 0"),
        ({"width": 5}, "of 3 x 3 tiles with 12 features, found"),
    ):
        link.write_meta(regions.namespace, meta | change)
        with pytest.raises(UserError, match=line):
            RedisStore(regions, url=server.url)
    server.client().set(meta_key(regions.namespace), "no JSON")
    with pytest.raises(UserError, match="in format 1, found None"):
        RedisStore(regions, url=server.url)


def test_a_server_that_evicts_is_refused(regions: RegionSet, server: Server) -> None:
    server.client().config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(UserError, match="expected maxmemory-policy noeviction, found allkeys-lru"):
        RedisStore(regions, url=server.url)


def test_a_connection_that_was_broken_leaves_no_descriptor(
    regions: RegionSet, server: Server
) -> None:
    store = RedisStore(regions, url=server.url)
    store.fetch(np.arange(3))
    server.kill()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(UserError):
            store.fetch(np.arange(3))
    assert len(os.listdir("/proc/self/fd")) <= before
