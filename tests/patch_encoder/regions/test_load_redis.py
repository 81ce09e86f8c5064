"""load_redis: filling, going on after a kill, comparing, listing, dropping, and memory that is
short.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from patch_encoder import load_redis
from patch_encoder.regions import redis_server
from patch_encoder.regions.redis_server import RegionServer, region_key
from patch_encoder.regions.redis_store import RedisStore
from patch_encoder.regions.region_set import RegionSet, read_region_set
from patch_encoder.regions.store import FileStore
from tests.helpers import ROOT, kill_when
from tests.patch_encoder.regions.cohort import build, make_corners, write_cohort, write_slide
from tests.patch_encoder.regions.conftest import Server
from wsi_common.cli import run


def load(root: Path, server: Server, *keys: str) -> int:
    arguments = [f"regions={root}/regions/tiny", f"redis_url={server.url}", *keys]
    return run(load_redis.main, load_redis.Config, arguments)


@pytest.fixture
def regions(tmp_path: Path) -> RegionSet:
    write_cohort(tmp_path / "features")
    assert build(tmp_path, "region_tiles=3") == 0
    return read_region_set(tmp_path / "regions" / "tiny")


def test_fill_verify_list_drop(
    tmp_path: Path, regions: RegionSet, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert load(tmp_path, server, "action=verify") == 1, "nothing is there"
    assert load(tmp_path, server) == 0
    assert f"{len(regions)} regions of 3 slides in {regions.namespace[:16]}" in caplog.text
    assert load(tmp_path, server, "action=verify") == 0
    keys = server.client().keys("*")
    assert len(keys) == len(regions) + 1, "one key a region, and the description"
    assert all(server.client().ttl(key) == -1 for key in keys)
    server.client().set("of somebody else", "stays")
    caplog.clear()
    assert load(tmp_path, server, "action=list") == 0
    assert f"{regions.namespace[:16]}: complete, tiny, {len(regions)} regions of 3 x 3" in (
        caplog.text
    )
    key = region_key(regions.namespace, 2)
    server.client().setrange(key, 50, b"x!")
    assert load(tmp_path, server, "action=verify") == 1
    assert "region 2 (2 of 9 of slide S0) is missing or differs" in caplog.text
    assert "1 of 36 regions are missing or differ, the set is complete; action=fill" in caplog.text
    caplog.clear()
    assert load(tmp_path, server) == 0 and ", 1 written" in caplog.text
    assert load(tmp_path, server, "action=verify") == 0
    assert load(tmp_path, server, "action=drop") == 0
    assert server.client().keys("*") == [b"of somebody else"]


def test_dropping_one_cohort_leaves_the_other(
    tmp_path: Path, regions: RegionSet, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(tmp_path, "region_tiles=2", output="other") == 0
    other = read_region_set(tmp_path / "other" / "tiny")
    assert load(tmp_path, server) == 0
    assert load(tmp_path, server, f"regions={tmp_path}/other/tiny") == 0
    name = regions.namespace[:16]
    assert load(tmp_path, server, "regions=", "action=drop", f"namespace={name}") == 0
    assert server.client().keys(f"slpd:{name}:*") == []
    ids = np.arange(len(other))
    found = RedisStore(other, url=server.url).fetch(ids)[0]
    assert torch.equal(found, FileStore(other).fetch(ids)[0])
    assert load(tmp_path, server, "action=drop") == 2
    assert f"the region set {name}, found {other.namespace[:16]}" in capsys.readouterr().err
    assert load(tmp_path, server, "action=drop", "namespace=*") == 2
    assert "expected 16 hexadecimal digits" in capsys.readouterr().err
    assert load(tmp_path, server, "action=fill", "regions=") == 2
    assert "expected regions=<folder>" in capsys.readouterr().err


def test_memory_is_compared_before_anything_is_written(
    tmp_path: Path,
    regions: RegionSet,
    server: Server,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = server.client().info("memory")["used_memory"]
    server.client().config_set("maxmemory", used + 5000)
    assert load(tmp_path, server) == 2
    line = capsys.readouterr().err
    assert "for 36 regions, found 0.00 GiB below its maxmemory; raise maxmemory" in line
    server.client().config_set("maxmemory", 0)
    assert server.client().keys("*") == []
    monkeypatch.setattr(redis_server, "free_memory", lambda: 1000)
    assert load(tmp_path, server) == 2
    assert "of memory free on this machine" in capsys.readouterr().err
    assert server.client().keys("*") == []


def test_maxmemory_that_is_reached_on_the_way_is_one_line_and_nothing_is_lost(
    tmp_path: Path,
    server: Server,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_slide(tmp_path / "features", "S0", make_corners(30, 30, 1.0, 0), width=256)
    assert build(tmp_path, "region_tiles=3") == 0
    regions = read_region_set(tmp_path / "regions" / "tiny")
    # another client fills the server meanwhile: the comparison saw room
    monkeypatch.setattr("patch_encoder.regions.redis_filling.check_memory", lambda *_: None)
    used = server.client().info("memory")["used_memory"]
    server.client().config_set("maxmemory", used + 300_000)
    assert load(tmp_path, server) == 2
    line = capsys.readouterr().err
    assert "expected memory for region " in line and "of slide S0), found maxmemory" in line
    assert "config set maxmemory" in line and line.count("\n") == 1
    link = RegionServer(server.url)
    assert link.read_meta(regions.namespace)["complete"] is False
    kept = len(server.client().keys("*"))
    assert 1 < kept < len(regions)
    server.client().config_set("maxmemory", 0)
    assert load(tmp_path, server) == 0
    assert load(tmp_path, server, "action=verify") == 0


def test_a_server_that_would_evict_or_is_not_there_gets_nothing(
    tmp_path: Path,
    regions: RegionSet,
    server: Server,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.client().config_set("maxmemory-policy", "volatile-ttl")
    assert load(tmp_path, server) == 2
    assert "expected maxmemory-policy noeviction, found volatile-ttl" in capsys.readouterr().err
    assert server.client().keys("*") == []
    server.client().config_set("maxmemory-policy", "noeviction")
    server.client().config_set("save", "3600 1")
    assert load(tmp_path, server) == 0
    assert "writes snapshots or a log to its disk" in caplog.text
    server.kill()
    assert load(tmp_path, server) == 2
    line = capsys.readouterr().err
    assert "expected a Redis server, found: " in line and "tools/redis_server.sh" in line


@pytest.mark.process
def test_a_killed_filling_goes_on(tmp_path: Path, server: Server) -> None:
    write_slide(tmp_path / "features", "S0", make_corners(120, 120, 1.0, 0), width=384)
    assert build(tmp_path, "region_tiles=2") == 0
    regions = read_region_set(tmp_path / "regions" / "tiny")
    client = server.client()
    keys = [f"regions={regions.folder}", f"redis_url={server.url}"]
    kill_when(lambda: client.dbsize() > 200, "patch_encoder.load_redis", keys)
    assert client.dbsize() < len(regions)
    meta = RegionServer(server.url).read_meta(regions.namespace)
    assert meta is not None and not meta["complete"]
    assert load(tmp_path, server) == 0
    assert load(tmp_path, server, "action=verify") == 0


@pytest.mark.process
def test_the_script_starts_a_server_that_keeps_regions(
    tmp_path: Path, regions: RegionSet, server: Server
) -> None:
    script = ["bash", str(ROOT / "tools" / "redis_server.sh")]
    folder = server.folder / "started"
    environment = os.environ | {"FOLDER": str(folder)}
    try:
        for _ in range(2):  # the second finds it running
            done = subprocess.run(
                script, env=environment, capture_output=True, text=True, check=True
            )
        url = done.stdout.strip()
        assert url == f"unix://{folder}/redis.sock"
        assert "it is running already" in done.stderr
        assert load(tmp_path, server, f"redis_url={url}") == 0
        settings = RegionServer(url).client.config_get("save", "appendonly", "maxmemory-policy")
        assert settings == {"save": "", "appendonly": "no", "maxmemory-policy": "noeviction"}
        assert len(RedisStore(regions, url=url).fetch(np.arange(3))[0]) == 3
    finally:
        subprocess.run([*script, "stop"], env=environment, check=True)
    assert not (folder / "dump.rdb").exists()
