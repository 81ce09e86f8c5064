"""Errors that a user can mend, and the nearest valid name for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one line that gives expected, found and remedy. Entry points print it without a
    traceback.
    """


class DamagedFile(UserError):
    """A file that is there and does not hold what it should: truncated, empty, malformed.

    Work that left such a file is not done. A script makes its own anew, and lists those of others.
    """


class FullDisk(UserError):
    """There is no room for what is written, nor for what comes after it."""


def did_you_mean(name: str, valid: Iterable[object]) -> str:
    """`did you mean 'x'?` for the closest of `valid`, else the sorted list of all of them."""
    options = sorted(str(option) for option in valid)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return (
        f"valid: {', '.join(options[:40])}" + (", ..." if len(options) > 40 else "")
        if options
        else "nothing is valid here"
    )
