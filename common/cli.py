"""The one way into a script: load its configuration, run `main`, turn user errors into one line.

Exit status: 0 done, 1 done with failures that are listed, 2 bad input or configuration.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from common.config import HelpRequested, load_config
from common.errors import UserError

T = TypeVar("T")


def launch(main: Callable[[T], int | None], config_class: type[T]) -> None:
    """Run `main(config)` and leave the process with its status."""
    show_log()
    sys.exit(run(main, config_class, sys.argv[1:]))


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
        print(f"{_title(main)}\n\n{request}")
        return 0
    except UserError as error:
        # from a loader process the message comes as a whole traceback, whose last line is the
        # message
        print(
            f"error: {str(error).splitlines()[-1].removeprefix('common.errors.UserError: ')}",
            file=sys.stderr,
        )
        return 2
    finally:
        _leave_process_group()


def _leave_process_group() -> None:
    # a script that never loads torch is spared its two seconds
    if "torch.distributed" in sys.modules:
        from common.distributed import shutdown

        shutdown()


def _title(main: Callable[..., Any]) -> str:
    return (sys.modules[main.__module__].__doc__ or "").strip().split("\n")[0]
