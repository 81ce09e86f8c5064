"""A case of the drill: a command, what is broken, and what has to come of it; each runs in a process
of its own, forked from one that has loaded the programs already.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from wsi_common.cli import launch

TOLD_TO_WAIT = 60.0  # seconds that a case may take
MISTAKE = 70  # exit status of a child that ends with a traceback
UNSUPPORTED = 77  # exit status of a child that cannot make its fault here


def nothing(*_: object) -> None:
    """No fault of this kind."""


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        name: kind of fault and what is broken, as in `bags: cut off`.
        command: script and arguments, from the folder of the case.
        status: expected exit status; negative: killed by that signal.
        line: regular expression that a line of the log, or of failures.csv, has to match.
        damage: breaks files in the folder of the case before the start.
        inside: what the process does to itself before the start: limits, mounts, hanging readers.
        number: signal that it is sent.
        when: file whose presence says that it is time for the signal.
        kept: files that have to be there afterwards, unchanged where they were there before.
        again: the same command, undisturbed, has to end with 0 afterwards.
    """

    name: str
    command: str
    status: int
    line: str = ""
    damage: Callable[[Path], None] = nothing
    inside: Callable[[], None] = nothing
    number: int = 0
    when: str = ""
    kept: tuple[str, ...] = ()
    again: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a case: exit status, the line that was looked for, and what is wrong."""

    status: int
    line: str
    problems: tuple[str, ...] = ()

    @property
    def skipped(self) -> bool:
        """Whether the fault cannot be made on this machine."""
        return self.status == UNSUPPORTED


def run_case(case: Case, template: Path, folder: Path) -> Outcome:
    """Run a case in a copy of the template."""
    shutil.copytree(template, folder, symlinks=True)
    case.damage(folder)
    before = {name: digest(folder / name) for name in case.kept}
    status, log = run_child(case.command, folder, case.inside, case.number, case.when, case.kept)
    text = log + "".join(path.read_text() for path in sorted(folder.rglob("failures.csv")))
    found = next((line for line in text.splitlines() if re.search(case.line, line)), "")
    problems = [] if status == case.status else [f"status {status}"]
    problems += [] if found or not case.line else [f"no line matches {case.line}"]
    problems += ["a traceback"] if "Traceback" in text else []
    errors = [line for line in log.splitlines() if line.startswith("error")]
    problems += [f"{len(errors)} lines of error"] if len(errors) != (case.status >= 2) else []
    problems += [f"{line} is gone" for line in log.splitlines() if line.startswith("gone: ")]
    if case.status >= 0 and list(folder.rglob(".*.tmp")):
        problems.append("a temporary file is left")
    for name, content in before.items():
        if content is not None and digest(folder / name) != content:
            problems.append(f"{name} is changed")
    if case.again and not problems:
        status_again, log_again = run_child(case.command, folder)
        problems += [f"again: {status_again}: {log_again[-300:]}"] if status_again else []
    shown = found or next(iter(errors), log.strip().splitlines()[-1] if log.strip() else "")
    return Outcome(status, shown, () if status == UNSUPPORTED else tuple(problems))


def digest(path: Path) -> bytes | None:
    """Content of a file; None where there is none."""
    return path.read_bytes() if path.is_file() else None


def run_child(
    command: str,
    folder: Path,
    inside: Callable[[], None] = nothing,
    number: int = 0,
    when: str = "",
    kept: tuple[str, ...] = (),
) -> tuple[int, str]:
    """Exit status and log of a script in a process of its own."""
    log = folder.with_suffix(".log")
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(be_child(command, folder, log, inside, kept))
    deadline, sent = time.monotonic() + TOLD_TO_WAIT, False
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if number and not sent and any(folder.glob(when)):
            os.kill(child, number)
            sent = True
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1]), log.read_text(errors="replace")


def be_child(
    command: str, folder: Path, log: Path, inside: Callable[[], None], kept: tuple[str, ...]
) -> int:
    """The forked process: the script as `python -m` starts it, its output in `log`."""
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    script, *arguments = command.split()
    module = importlib.import_module(script)
    status = 0
    try:
        inside()
        sys.argv = [script, *arguments]
        launch(module.main, module.Config)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = MISTAKE
    # seen from here, where a file system may be mounted that nobody else sees
    for name in kept:
        if not Path(name).is_file():
            print(f"gone: {name}", file=sys.stderr)
    sys.stderr.flush()
    return status
