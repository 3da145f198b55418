"""Text that comes from names, options, plugins and libraries, as it may reach a terminal: nothing in it is a command."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_UNSEEN_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
"""Control characters, lone surrogates, separators of lines and paragraphs."""
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction, and so the order, of the text around them."""
_NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def show(text: object) -> str:
    """One line of text, with everything in it that a terminal would obey written as an escape: `\\x1b`."""
    shown = str(text)
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(_escape(character) if _is_obeyed(character) else character for character in shown)


def show_lines(text: str) -> str:
    """As `show`, of text whose line breaks are meant."""
    return "\n".join(map(show, text.split("\n")))


def _is_obeyed(character: str) -> bool:
    return unicodedata.category(character) in _UNSEEN_CATEGORIES or character in _DIRECTIONS


def _escape(character: str) -> str:
    number = ord(character)
    return _NAMED.get(character) or (f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}")


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """JSON as its standard has it: what is not a finite number is null, what is not JSON is its text."""
    return json.dumps(_finite(value), allow_nan=False, default=str, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "model_dump"):  # of pydantic, which takes too long to import for the commands that need no model
        value = value.model_dump()
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def name_without_place(name: str) -> str:
    """The name of a data set without the folders of this machine that it lies in, for what is passed on."""
    return Path(name).name if Path(name).is_absolute() else name


def shorten_titles(titles: Sequence[str]) -> list[str]:
    """Titles such as `perplexity on /data/test.txt` without folders, for headings; as they are where two would be the same."""
    short = [on.join((name, name_without_place(place))) for name, on, place in (title.partition(" on ") for title in titles)]
    return short if len(set(short)) == len(set(titles)) else list(titles)


def join_ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in order, three or more in a row by their ends: `2, 5 to 11, 15, 16`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def without_places(value: Any) -> Any:
    """JSON whose texts that are paths of this machine, from its root, are cut to their names, for what is passed on."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    return name_without_place(value) if isinstance(value, str) and _is_place(value) else value


def _is_place(text: str) -> bool:
    """Whether a text is the path of something that is here, or that could be made in a folder that is."""
    path = Path(text)
    if not path.is_absolute() or not text.isprintable():
        return False
    with suppress(OSError, ValueError):  # too long for a name
        return path.exists() or (path.parent != Path(path.anchor) and path.parent.is_dir())
    return False


def format_seconds(seconds: float | None) -> str:
    """Short text: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min, 12 days, 31,710 years."""
    if seconds is None:
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    days = whole // 86400
    if days < 3:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{days} days" if days < 3 * 365 else f"{days // 365:,} years"


def join_words(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def format_bytes(size: float) -> str:
    """A size in powers of ten, as disks are sold."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1000:.0f} kB" if size else ""
