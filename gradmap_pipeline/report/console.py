"""Lines and tables for people: whole words at the width of a terminal, and each line as it is for a pipe."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, Literal

from ..text import show

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

NARROW = 110
"""Columns of a terminal below which tables of many columns become lists."""
_PIPE = 200
"""Columns of a table that goes to no terminal."""
_INDENT = 2
"""Of the lines on which a long one goes on."""
_DUMB = ("dumb", "unknown")
"""Terminals that show what they are sent, and no more."""
_UNBOUNDED = 10**6
_FLEXIBLE = 20
"""Columns below which cells that go on below are hard to read."""


def make_console() -> Console:
    """A console as wide as the terminal, or wide enough that a log loses nothing; what it is given is text, never markup."""
    from rich.console import Console

    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    plain["file"] = sys.stdout  # as it is now, whatever is there while code of a plugin runs
    return Console(**plain) if sys.stdout.isatty() else Console(width=_PIPE, force_terminal=False, **plain)


def say(console: Console, line: str, *, is_quoted: bool = False) -> None:
    """Print one line, however long; on a terminal, broken at words, unless it `is_quoted` and so printed as it is."""
    is_wrapped = console.is_terminal and not console.is_dumb_terminal and not is_quoted
    width = console.width if is_wrapped else None
    for part in wrap_words(show(line), width):
        console.print(_as_text(part), soft_wrap=True)


def print_line(line: str, stream: IO[str] | None = None) -> None:
    """The same without the library, for errors and other single lines. `stream`: standard output, where none is named."""
    to = stream or sys.stdout
    for part in wrap_words(show(line), _find_width(to)):
        print(part, file=to)


def _find_width(stream: IO[str]) -> int | None:
    """Columns of the terminal that a stream writes to; None where it is no terminal, or one that is dumb."""
    with suppress(OSError, ValueError, AttributeError):
        if stream.isatty() and os.environ.get("TERM", "").lower() not in _DUMB:
            columns = os.environ.get("COLUMNS", "")
            return int(columns) if columns.isdecimal() else os.get_terminal_size(stream.fileno()).columns
    return None


def wrap_words(line: str, width: int | None) -> list[str]:
    """A line in parts of at most `width` columns, the later ones further in. A word longer than that stays whole."""
    if width is None or len(line) <= width:
        return [line]
    inner = " " * (len(line) - len(line.lstrip(" ")) + _INDENT)
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(line, max(width, 2 * len(inner)), subsequent_indent=inner, **options) or [line]


def make_table(*headings: str, right: Sequence[str] = (), flexible: Sequence[str] = ()) -> Table:
    """A table; `right`: the columns of numbers. `flexible`: columns whose cells may go on below, at words."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for heading in headings:
        justify: Literal["left", "right"] = "right" if heading in right else "left"
        table.add_column(_as_text(heading), justify=justify, overflow="fold", ratio=1 if heading in flexible else None)
    return table


def add_row(table: Table, *cells: str | Sequence[str]) -> None:
    """Add a row of cells; one of several lines is a list of them."""
    table.add_row(*(_as_text(*([cell] if isinstance(cell, str) else cell)) for cell in cells))


def fits(console: Console, table: Table) -> bool:
    """Whether a table can be printed with every cell on its line: headings and flexible columns may go on below, at words."""
    return sum(_least_widths(table, at_words=False)) + _width_between(console, table) <= console.width


def print_table(console: Console, table: Table) -> None:
    """Print a table: no cell is cut, and none is broken in a word where there is room for the words."""
    room = console.width - _width_between(console, table)
    for at_words in (False, True):
        widths = _least_widths(table, at_words=at_words)
        if sum(widths) <= room:
            _share_out(widths, _full_widths(table), room - sum(widths))
            for column, width in zip(table.columns, widths, strict=True):
                column.width = width
            break
    for column in table.columns:
        column.ratio = None
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.print(_as_text(line.rstrip()), soft_wrap=True)


def _share_out(widths: list[int], full: Sequence[int], spare: int) -> None:
    """Widen the columns that lack most, a blank at a time."""
    for _ in range(spare):
        lacking = [whole / width for width, whole in zip(widths, full, strict=True)]
        place = lacking.index(max(lacking))
        if lacking[place] <= 1:
            return
        widths[place] += 1


def _width_between(console: Console, table: Table) -> int:
    """Columns of edges and of the blanks between columns."""
    from rich.measure import Measurement

    whole = Measurement.get(console, console.options.update(width=_UNBOUNDED), table).maximum
    return whole - sum(_full_widths(table))


def _full_widths(table: Table) -> list[int]:
    return [max(1, *(_longest_line(text) for text in _texts_of(column))) for column in table.columns]


def _least_widths(table: Table, *, at_words: bool) -> list[int]:
    """`at_words`: of every column, not of the flexible ones alone."""
    widths = []
    for column in table.columns:
        heading, *cells = _texts_of(column)
        words, lines = (max(map(longest, cells), default=1) for longest in (_longest_word, _longest_line))
        least = words if at_words else max(words, min(lines, _FLEXIBLE)) if column.ratio else lines
        widths.append(max(1, _longest_word(heading), least))
    return widths


def _texts_of(column: Any) -> list[str]:
    """Heading and cells, all of them texts of `_as_text`."""
    return [str(text) for text in (column.header, *column.cells)]


def _longest_line(text: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, text.split("\n")))


def _longest_word(text: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, text.split()), default=0)


def _as_text(*lines: str) -> Text:
    from rich.text import Text

    return Text("\n".join(map(show, lines)))


def align(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Columns side by side, two blanks apart, as plain lines; those named by place end at one edge."""
    shown = [tuple(map(show, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = []
    for row in shown:
        cells = (
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines
