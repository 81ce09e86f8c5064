"""Real Redis servers on free ports, for tests that a server serves, dies, or loses regions in."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis


class Server:
    """A redis-server of this test alone, on a free port of 127.0.0.1 and a socket file."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.url = f"redis://127.0.0.1:{self.port}"
        self.unix_url = f"unix://{folder}/r.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self, *options: str) -> None:
        """Start it, empty, and wait until it answers."""
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--unixsocket", f"{self.folder}/r.sock", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "no", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.ConnectionError:
                time.sleep(0.02)
        raise AssertionError("the server does not answer")

    def client(self) -> redis.Redis:
        """A client of redis-py."""
        return redis.Redis(port=self.port)

    def kill(self) -> None:
        """SIGKILL: it is gone with all that it held."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server() -> Iterator[Server]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed; apt-get install redis-server")
    with tempfile.TemporaryDirectory() as folder:  # short: the path of a socket has 107 bytes
        running = Server(Path(folder))
        yield running
        running.kill()
