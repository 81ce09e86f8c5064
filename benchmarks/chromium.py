"""A headless Chromium that is told what to do through two pipes (DevTools protocol), to look at
pages that lie on a disk and to time them.

Source: Chrome DevTools Protocol, `--remote-debugging-pipe`: JSON messages that end in a zero byte,
read by the browser from descriptor 3 and written to descriptor 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--no-first-run", "--disable-extensions", "--disable-background-networking",
    "--remote-debugging-pipe", "--force-color-profile=srgb",
)  # fmt: skip
# what the browser answers for a page that is gone
LEFT = (
    "Inspected target navigated or closed",
    "Execution context was destroyed.",
    "Cannot find default execution context",
)


def find_chromium() -> str | None:
    """The browser's program, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class PageLeft(AssertionError):
    """The page was left for another one before it answered."""


class Chromium:
    """A browser with one page; use as a context manager.

    Args:
        program: of the browser.
        size: (width, height) of the window, px.
        timeout: seconds after which an answer is given up.
    """

    def __init__(self, program: str, size: tuple[int, int] = (1400, 900), timeout: float = 60):
        self.timeout, self._number, self._events = timeout, 0, deque[dict[str, Any]]()
        self._rest = b""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        command = [program, *FLAGS, f"--window-size={size[0]},{size[1]}"]
        command.append(f"--user-data-dir={self._profile.name}")
        # descriptors 3 and 4 are taken by the shell, which becomes the browser
        line = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        answer = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = answer["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    _session = ""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.timeout
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._number:
                if answer.get("error", {}).get("message") in LEFT:
                    raise PageLeft(method)
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._events.append(answer)

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser did not answer for {self.timeout:g} s"
            block = os.read(self._from, 1 << 20)
            assert block, "the browser ended"
            self._rest += block
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, path: Path, fragment: str = "") -> None:
        """Go to a page on the disk."""
        self.call("Page.navigate", url="about:blank")
        self._events.clear()
        address = path.resolve().as_uri() + (f"#{fragment}" if fragment else "")
        self.call("Page.navigate", url=address)
        self.wait_for("location.protocol === 'file:' && document.documentElement !== null")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page, which a promise is awaited for."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The value of an expression as soon as it is true, on the page that is opened meanwhile if
        one is.
        """
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            with suppress(PageLeft):
                if found := self.evaluate(expression):
                    return found
            time.sleep(0.02)
        raise AssertionError(f"{expression} did not come true in {self.timeout:g} s")

    def press(self, key: str) -> None:
        """Press and release a key."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def point(self, x: float, y: float) -> None:
        """Move the pointer, CSS px."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def problems(self) -> list[str]:
        """Exceptions, and errors of the console, since the page was opened."""
        self.evaluate("0")  # what was said before this has come
        found = []
        for event in self._events:
            about = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(about["exceptionDetails"]))
            elif event.get("method") == "Log.entryAdded" and about["entry"]["level"] == "error":
                found.append(about["entry"]["text"] + " " + about["entry"].get("url", ""))
            elif event.get("method") == "Runtime.consoleAPICalled" and about["type"] == "error":
                found.append(str(about["args"]))
        return found

    def cpu_seconds(self) -> float:
        """Processor seconds of all processes of the browser since its start."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it ended meanwhile
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self._process.pid:  # its session
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()
