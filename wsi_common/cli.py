"""The one way into a script: load its configuration, run `main`, turn user errors into one line.

Exit status: 0 done, 1 done with failures that are listed, 2 bad input or configuration, or a place
that cannot be written; 130 interrupted (Ctrl-C), 143 told to end (SIGTERM), both with nothing half
done left behind.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, TypeVar

from wsi_common.config import HelpRequested, load_config
from wsi_common.errors import UserError
from wsi_common.memory import is_out_of_memory

T = TypeVar("T")
# what the operating system says where nothing more can be written, and of other places that cannot
# be used
NO_PLACE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS))
UNUSABLE = NO_PLACE | {
    errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST,
}  # fmt: skip


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a script as Ctrl-C does."""


class PostponedTermination:
    """Within its `with` block a first SIGTERM is only noted, so that a training can write a
    checkpoint before it ends; a second one ends the script as ever.

    Attributes:
        came: whether the signal has come.
    """

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> PostponedTermination:
        self._process, self._ends = os.getpid(), signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._ends)
        if kind is None:
            self.end()

    def end(self) -> None:
        """End the script, if the signal has come.

        Raises:
            Terminated: then.
        """
        if self.came:
            raise Terminated

    def _note(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, self._ends)
        self.came = True
        if os.getpid() != self._process:  # a forked worker that has no handler of its own yet
            os._exit(128 + number)


def launch(main: Callable[[T], int | None], config_class: type[T]) -> None:
    """Run `main(config)` and leave the process with its status."""
    show_log()
    terminate, interrupt = (partial(f, os.getpid()) for f in (_terminate, _interrupt))
    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell ignores it
        signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = partial(_end_all_the_same, terminate, interrupt, sys.unraisablehook)
    try:
        status = run(main, config_class, sys.argv[1:])
    except KeyboardInterrupt as error:
        told = isinstance(error, Terminated)
        reason = "told to end" if told else "interrupted"
        print(f"error: {reason}; finished work is kept, the same command goes on", file=sys.stderr)
        status = 128 + (signal.SIGTERM if told else signal.SIGINT)
    sys.exit(status)


def _terminate(launched: int, number: int, frame: FrameType | None) -> None:
    if os.getpid() != launched:  # a forked worker that has no handler of its own yet
        os._exit(128 + number)
    signal.signal(number, signal.SIG_IGN)  # once is enough; what follows is tidying up
    if _would_be_lost(frame):
        _call_later(partial(_terminate, launched))
        return
    raise Terminated


def _interrupt(launched: int, number: int, frame: FrameType | None) -> None:
    if os.getpid() != launched:  # as above
        os._exit(128 + signal.SIGINT)
    if _would_be_lost(frame):
        _call_later(partial(_interrupt, launched))
        return
    raise KeyboardInterrupt


def _would_be_lost(frame: FrameType | None) -> bool:
    """Whether ctypes is converting an argument here: it makes an ArgumentError of any exception,
    which would count as that of one slide.
    """
    while frame is not None and frame.f_code.co_name != "from_param":
        frame = frame.f_back
    return frame is not None


def _call_later(handler: Callable[[int, FrameType | None], object]) -> None:
    """Call a signal handler once more, a moment later."""
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def _end_all_the_same(
    terminate: Callable[[int, FrameType | None], object],
    interrupt: Callable[[int, FrameType | None], object],
    report: Callable[[Any], object],
    lost: Any,
) -> None:
    """Raise once more, a moment later, what a signal has raised inside of a finaliser, where Python
    drops it.
    """
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        report(lost)
        return
    _call_later(terminate if isinstance(lost.exc_value, Terminated) else interrupt)


def show_log() -> None:
    """Print what is logged, with the time; leaves a log that is set up already as it is."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )


def run(main: Callable[[T], int | None], config_class: type[T], arguments: list[str]) -> int:
    """`launch` without leaving the process: the exit status is returned."""
    try:
        return main(load_config(config_class, arguments)) or 0
    except HelpRequested as request:
        _print_help(f"{_title(main)}\n\n{request}")
        return 0
    except Exception as error:
        line = _explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    finally:
        _give_up_claims()
        _leave_process_group()


def _explain(error: Exception) -> str | None:
    """One line for what is no mistake of ours, else None."""
    if isinstance(error, UserError):
        # from a loader process the message comes as a whole traceback, whose last line is the
        # message
        return str(error).splitlines()[-1].removeprefix("wsi_common.errors.UserError: ")
    if isinstance(error, OSError) and error.errno in UNUSABLE:
        return explain_os_error(error)
    if is_out_of_memory(error):
        reason = " ".join(str(error).split())[:200] or "none left"
        remedy = "lower workers= or batch_size=, and start again"
        return f"expected memory, found: {reason}; finished work is kept: {remedy}"
    return None


def explain_os_error(error: OSError) -> str:
    """One line for a file or folder that cannot be read or written."""
    where = f"{error.filename}: " if error.filename is not None else ""
    reason = os.strerror(error.errno or 0)
    return (
        f"{where}expected a place that can be read and written, found: {reason}; finished work is "
        "kept: mend that or choose another output, and start again"
    )


def _give_up_claims() -> None:
    if "wsi_common.run" in sys.modules:  # as below
        from wsi_common.run import give_up_claims

        give_up_claims()


def _leave_process_group() -> None:
    # a script that never loads torch is spared its two seconds
    if "torch.distributed" in sys.modules:
        from wsi_common.distributed import shutdown

        shutdown()


def _print_help(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has read enough; what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _title(main: Callable[..., Any]) -> str:
    return (sys.modules[main.__module__].__doc__ or "").strip().split("\n")[0]
