"""Reads many large values from Redis straight into arrays.

redis-py collects every reply in a buffer and copies it out of there twice, which takes longer than
the transfer. Here one socket asks for 16 values at a time (a single reply of 128 regions was
slower: the server has to hold it), one request ahead of the reply that is read, and every value
goes from the socket to its place in the arrays.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

KEYS_PER_REQUEST = 16
AHEAD = 2  # requests that the server has not answered yet
CONNECT_SECONDS, REPLY_SECONDS = 5.0, 30.0
BUFFER = 512  # a line and a header; what is longer than it is not copied twice


class RefusedRequest(OSError):
    """The server answers with an error, or with something else than was asked for."""


class ValueStream:
    """One connection to a server.

    Args:
        address: `path`, or `host` and `port`; `username`, `password` and `db` where there are any:
            the arguments of redis-py's connections.

    Raises:
        OSError: no connection.
    """

    def __init__(self, address: Mapping[str, Any]) -> None:
        self._socket = _connect(address)
        self._replies = self._socket.makefile("rb", buffering=BUFFER)
        self._line_break = bytearray(2)  # ends every value
        try:
            self._greet(address)
        except BaseException:
            self.close()
            raise

    def _greet(self, address: Mapping[str, Any]) -> None:
        """Say the password and choose the database."""
        if address.get("password"):
            names = [address["username"]] if address.get("username") else []
            self._send([b"AUTH", *(text.encode() for text in (*names, address["password"]))])
            self._line(b"+")
        if address.get("db"):
            self._send([b"SELECT", str(address["db"]).encode()])
            self._line(b"+")

    def read(self, keys: Sequence[str], parts: Sequence[np.ndarray]) -> Iterator[tuple[int, int]]:
        """Read the values of `keys`, which come one by one: what is done with a value passes while
        the server prepares the next ones.

        Args:
            keys: of B values.
            parts: arrays (B, bytes) uint8, contiguous; a value fills its row of each in turn.

        Yields:
            The place of a value and its length, -1 where there is none; a value of another length
            than its rows have is dropped.

        Raises:
            OSError: the connection broke or timed out, or the server refused; close it.
        """
        chunks = [
            [key.encode() for key in keys[start : start + KEYS_PER_REQUEST]]
            for start in range(0, len(keys), KEYS_PER_REQUEST)
        ]
        # slices of these take a tenth of the time that NumPy's take
        views = [(memoryview(part).cast("B"), part.shape[1]) for part in parts if len(keys)]
        place = 0
        for chunk in chunks[:AHEAD]:
            self._send([b"MGET", *chunk])
        for number, chunk in enumerate(chunks):
            if self._line(b"*") != len(chunk):
                raise RefusedRequest("expected as many values as keys, found others")
            for _ in chunk:
                rows = [view[place * size : (place + 1) * size] for view, size in views]
                yield place, self._value(rows)
                place += 1
            if number + AHEAD < len(chunks):
                self._send([b"MGET", *chunks[number + AHEAD]])

    def _value(self, rows: Sequence[memoryview]) -> int:
        """Read one value into its rows, or past it where it does not fit; its length."""
        length = self._line(b"$")
        if length < 0:
            return length
        fits = length == sum(map(len, rows))
        for row in rows if fits else [memoryview(bytearray(length))]:
            self._fill(row)
        self._fill(memoryview(self._line_break))
        return length

    def _send(self, words: Sequence[bytes]) -> None:
        lines = [b"*%d\r\n" % len(words)]
        lines += (b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
        self._socket.sendall(b"".join(lines))

    def _line(self, kind: bytes) -> int:
        """The number on the next line of a reply; 0 where it is text."""
        line = self._replies.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the server closed the connection")
        if line[:1] != kind:
            raise RefusedRequest(line[1:].decode("utf-8", "replace").strip())
        try:
            return 0 if kind == b"+" else int(line[1:])
        except ValueError:
            raise RefusedRequest(f"expected a number, found {line[1:20]!r}") from None

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._replies.readinto(view)
            if not count:
                raise ConnectionError("the server closed the connection")
            view = view[count:]

    def close(self) -> None:
        """Close the connection."""
        self._replies.close()
        self._socket.close()

    def __del__(self) -> None:
        """A store that nobody closes leaves no open socket."""
        if hasattr(self, "_replies"):  # else it never connected
            self.close()


def _connect(address: Mapping[str, Any]) -> socket.socket:
    if "path" in address:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_SECONDS)
        try:
            connection.connect(address["path"])
        except OSError:
            connection.close()
            raise
    else:
        place = (address.get("host", "localhost"), int(address.get("port", 6379)))
        connection = socket.create_connection(place, CONNECT_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(REPLY_SECONDS)
    return connection
