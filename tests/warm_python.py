"""An interpreter that has imported PyTorch already, for tests of shell scripts that start a dozen.

`start_server` writes a small program and starts a server for it; the program takes what `python`
takes (`-m MODULE ARGUMENT ...`, `-c CODE ...` or `FILE ...`) and has the server fork a process for it, with the
caller's folder, variables and streams. It ends with that process' status, and if it is killed, so
is the process and all that it has started. What an interpreter costs before its first line, seconds
of importing PyTorch, is paid once.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import time
from contextlib import suppress
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.helpers import start_script

FORK = get_context("fork")
PROGRAM = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
status = server.recv(1)
sys.exit(status[0] if status else 1)
"""


def start_server(folder: Path) -> tuple[BaseProcess, Path]:
    """The server, which is killed when no longer needed, and the program that stands for `python`;
    both lie in `folder`, whose path is short enough for a socket.
    """
    address, program = folder / "socket", folder / "python"
    server = start_script("tests.warm_python", [str(address)], folder / "said")
    while not address.exists() and server.is_alive():
        time.sleep(0.01)
    assert server.is_alive(), (folder / "said").read_text()
    program.write_text(PROGRAM.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    return server, program


def serve(address: str) -> None:
    """Answer each call in a process of its own, until this one is killed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            caller, _ = listener.accept()
            FORK.Process(target=answer, args=(caller,)).start()
            caller.close()


def answer(caller: socket.socket) -> None:
    """Run what is asked for, and send its status; end it where the caller has gone."""
    length, streams, *_ = socket.recv_fds(caller, 8, 3)
    request = caller.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
    process = FORK.Process(target=run, args=(streams, *json.loads(request)))
    process.start()
    for stream in streams:
        os.close(stream)
    if caller in connection.wait([caller, process.sentinel]):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()
    code = process.exitcode
    with suppress(OSError):
        caller.send(bytes([code if code >= 0 else 128 - code]))


def run(streams: list[int], arguments: list[str], folder: str, variables: dict[str, str]) -> None:
    """Be the interpreter that was called in `folder` with these arguments and variables."""
    os.setpgid(0, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin = os.fdopen(0)  # multiprocessing gives its processes none
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    paths = variables.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [*([] if variables.get("PYTHONSAFEPATH") else [folder]), *filter(None, paths)]
    kind, *rest = arguments
    if kind == "-c":
        code, *sys.argv[1:] = rest
        exec(code, {"__name__": "__main__"})
    elif kind == "-m":
        module, *sys.argv[1:] = rest
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
