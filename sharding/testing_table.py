"""Tables of what went wrong, in plain text of a fixed width: what assertions are read by.

A failure is read in a terminal, in a log of continuous integration and in a diff, so a table is
lines of text without colour, at most `WIDTH` columns wide. Columns that do not fit are clipped, the
widest first: paths and source lines on the left, because their ends tell them apart, everything
else on the right.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

__all__ = ["WIDTH", "counted", "format_table", "shortened", "shown_source"]

WIDTH = 100
"""Columns of a table."""

_GAP = "  "
_NARROWEST = 8  # a column is clipped no further
_TAILS = ("leaf", "source", "argument")


def format_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[str] = (),
    most: int = 20,
) -> str:
    """A table as text: a line of headings, a line for each row.

    Args:
        headings: of the columns.
        rows: as many cells each; line breaks in them become spaces.
        right: headings of the columns that are set flush right.
        most: rows shown; a last line counts the others.

    >>> print(format_table(["leaf", "bytes"], [["w", "128"], ["b", "8"]], right=["bytes"]))
    leaf  bytes
    w       128
    b         8
    """
    shown = [[" ".join(cell.split()) for cell in row] for row in rows[:most]]
    lines = [list(headings), *shown]
    widths = [max(len(line[n]) for line in lines) for n in range(len(headings))]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > WIDTH and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    written = []
    for line in lines:
        cells = []
        for heading, cell, width in zip(headings, line, widths, strict=True):
            cell = shortened(cell, width, tail=heading in _TAILS)
            cells.append(cell.rjust(width) if heading in right else cell.ljust(width))
        written.append(_GAP.join(cells).rstrip())
    if len(rows) > most:
        written.append(f"… and {len(rows) - most} more")
    return "\n".join(written)


def shortened(text: str, width: int, *, tail: bool = False) -> str:
    """A text of at most ``width`` characters: its beginning, or its end.

    >>> shortened("layers/0/attn/wq", 10), shortened("layers/0/attn/wq", 10, tail=True)
    ('layers/0/…', '…0/attn/wq')
    """
    if len(text) <= width:
        return text
    return "…" + text[len(text) - width + 1 :] if tail else text[: width - 1] + "…"


def counted(count: int, one: str, more: str = "") -> str:
    """A number with its noun.

    >>> counted(1, "leaf", "leaves"), counted(2, "collective")
    ('1 leaf', '2 collectives')
    """
    return f"{count} {one if count == 1 else more or one + 's'}"


def shown_source(source: str) -> str:
    """A ``file:line`` relative to the working folder where it is in it.

    >>> shown_source(""), shown_source("/elsewhere/model.py:12")
    ('', '/elsewhere/model.py:12')
    """
    here = os.getcwd() + os.sep
    return source.removeprefix(here)
