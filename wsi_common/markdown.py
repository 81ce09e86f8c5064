"""Tables in Markdown, as results are written to be read."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Write a table, one line of text per row; the last one has no line break.

    Args:
        head: titles of the columns.
        lines: cells of every row, as many as titles.
    """
    ruled = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)
